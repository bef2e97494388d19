"""Recursive Language Models: an LLM answers questions about contexts of any size by writing code in a REPL that holds them"""
__version__ = "0.1.0"

_home = dict(
    prep_shell='tools', make_run_repl='tools', advanced_toolloop='core', REPL_SYSTEM_PROMPT='prompts',
    RLM='rlm', Budget='usage', Usage='usage', RLMError='usage', local_model='local', benchmark_vanilla='benchmarks', benchmark_rlm='benchmarks')
__all__ = list(_home)

def __getattr__(name):
    "Import a name's module when the name is first used, so that `import rlm` costs nothing"
    if name not in _home: raise AttributeError(f"module 'rlm' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'rlm.{_home[name]}'), name)

def __dir__(): return sorted({*globals(), *__all__})
