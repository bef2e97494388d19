"Needles and several models: grading, failures that stay with their model, what is sent, the table for people and machines"
import json, re, subprocess, sys
import pytest
from rlm.bench_models import *
from rlm.benchmarks import make_haystack, wilson
from rlm.models import ScriptedModel, repl_call
from rlm.reach import CLOUDS, read_name
from rlm import usage as U
from ollama_server import Fault, OllamaServer, code, message
from scripted_server import closed_port

@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for k in [*(v for v, _ in CLOUDS.values()), 'OLLAMA_HOST', 'OLLAMA_API_KEY']: monkeypatch.delenv(k, raising=False)

CELL = "import re\nprint(re.search(r'magic number is (\\d+)', context)[1])"
def found(ms): return f"FINAL({ms[-1]['content'].split()[0]})"
def finder(n=9, **kw): return ScriptedModel(*[repl_call(CELL), found]*n, **kw)
def guesser(): return ScriptedModel(default='FINAL(42)', name='guess')
def ollama_finder(n=9): return [code(CELL), lambda body: f"FINAL({body['messages'][-1]['content'].split()[0]})"]*n

def test_importing_it_is_light():
    code = "import sys, rlm.bench_models; print([m for m in ('litellm', 'matplotlib', 'httpx') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

# One needle ----------------------------------------------------------------------------------------------------------
def test_one_needle():
    events = []
    t = niah(finder(), lines=500, seed=7, listener=events.append)
    assert t.right and t.answer == t.expected == make_haystack(500, 7).answers[0] and re.fullmatch(r'\d{7}', t.expected)
    assert (t.lines, t.seed, t.iterations, t.calls, t.stop_reason, t.error) == (500, 7, 2, 2, 'final', None) and t.tokens == t.result.usage.total_tokens > 0
    assert [e['type'] for e in events][0] == 'run' and events[-1]['type'] == 'final'
    assert json.loads(json.dumps(t.as_dict))['answer'] == t.expected and 'result' not in t.as_dict and 'right' in str(t)

def test_a_wrong_answer_is_wrong():
    t = niah(guesser(), lines=100)
    assert not t.right and t.answer == '42' and 'WRONG' in str(t)

def test_settings_reach_ollama():
    with OllamaServer(*ollama_finder()) as s: t = niah('thinker:4b', lines=300, host=s.host, think=True, num_ctx=4096, temperature=.6)
    assert t.right and (t.model, t.provider) == ('thinker:4b', f'ollama at {s.host}') and t.cost is None
    assert all(b['think'] is True and b['options'] == dict(num_ctx=4096, temperature=.6) for b in s.chats) and len(s.chats) == t.calls == 2

def test_turns_are_limited():
    t = niah(ScriptedModel(default=repl_call('print(1)')), lines=100, max_iterations=3)
    assert t.iterations <= 3 and t.stop_reason == 'iterations' and not t.right

def test_errors_of_one_needle_are_raised():
    with pytest.raises(U.GatewayUnreachable, match='ollama serve'): niah('qwen3:4b', host=f'127.0.0.1:{closed_port()}')

# Several models ------------------------------------------------------------------------------------------------------
def test_the_same_haystacks_for_all():
    t = bench_models([finder(name='a'), finder(name='b')], lines=200, trials=3, seed=5)
    assert [[x.expected for x in r.trials] for r in t.rows] == [[make_haystack(200, s).answers[0] for s in (5, 6, 7)]]*2
    assert [(r.model, r.provider, r.n, r.right, r.accuracy, r.interval) for r in t.rows] == [(m, 'python', 3, 3, 1., wilson(3, 3)) for m in 'ab']

def test_a_model_that_fails_does_not_lose_the_others():
    def broken(messages, **kw): raise ZeroDivisionError('inside')
    down = f'http://127.0.0.1:{closed_port()}'
    with OllamaServer(signed_in=False) as s:
        models = [broken, 'nope:1b', f'{down}/qwen3:4b', 'glm-5:cloud', 'http://a b:c/qwen', dict(model='openai/x', base_url=f'{down}/v1', api_key='none', num_retries=0), finder(name='good')]
        seen = []
        t = bench_models(models, lines=100, trials=2, host=s.host, progress=seen.append)
    bad, good = t.rows[:-1], t.rows[-1]
    assert good.right == 2 and good.error is None
    assert [r.n for r in bad] == [0]*6 and bad[0].trials[1].error == 'ZeroDivisionError: inside'
    assert [r.error.split(':')[0] for r in bad[1:]] == ['ModelNotFound', 'GatewayUnreachable', 'AuthError', 'GatewayUnreachable', 'GatewayUnreachable']
    assert [len(r.trials) for r in bad] == [2, 0, 0, 1, 0, 1]
    for says in ('`ollama pull nope:1b`', '`ollama serve`', '`ollama signin`', 'inside'): assert says in str(t) and says in t._repr_markdown_()
    assert [o['done'] for o in seen] == [1, 2, 4, 6, 8, 10, 12, 13, 14] and {o['total'] for o in seen} == {14} and seen[-1]['row'] is good and seen[-1]['trial'].right

def test_a_name_of_nothing_is_a_row():
    t = bench_models(['a/', 'x\n\x1b[2Jy', finder()], lines=50, trials=1)
    assert [r.error and r.error.split(':')[0] for r in t.rows] == ['ModelNotFound', 'ModelNotFound', None] and len(str(t).splitlines()) == 8 and '\x1b' not in str(t) + t._repr_markdown_()

def test_a_fault_in_one_trial_is_not_a_wrong_answer():
    with OllamaServer(*ollama_finder(1), Fault(400, 'no'), *ollama_finder(1)) as s:
        row = bench_models(['smol:135m'], lines=100, trials=3, host=s.host).rows[0]
    assert (row.n, row.right, row.accuracy, row.error) == (2, 2, 1., None) and row.as_dict['failed'] == 1 and 'BadRequest' in row.trials[1].error

def test_the_table_for_people_and_machines():
    t = bench_models([finder(name='a|b'), guesser(), 'http://127.0.0.1:9/x'], lines=100, trials=1)
    lines = str(t).splitlines()
    assert lines[0].split() == ['model', 'provider', 'accuracy', 'time', 'iterations', 'tokens', 'cost']
    assert '100% (1 of 1; 21% to 100%)' in lines[1] and '0% (0 of 1; 0% to 79%)' in lines[2] and 'failed' in lines[3] and '$0.0000' in lines[1]
    assert 'a\\|b' in t._repr_markdown_() and len(repr(t)) < 100
    d = json.loads(json.dumps(t.as_dict))
    assert (d['lines'], d['trials'], d['seed']) == (100, 1, 0) and [r['accuracy'] for r in d['rows']] == [1., 0., None] and d['rows'][0]['trials'][0]['right'] is True
    assert {'model', 'provider', 'accuracy', 'time', 'iterations', 'tokens', 'cost', 'error'} <= set(d['rows'][0])

def test_one_model_need_not_be_a_list():
    assert len(bench_models(finder(), lines=50, trials=1).rows) == len(bench_models(dict(model=finder()), lines=50, trials=1).rows) == 1
    with pytest.raises(ValueError, match='trials=0'): bench_models(finder(), trials=0)

def test_a_gateway_serves_the_models_that_are_named_there():
    "Not the bundled one, which needs no address"
    from rlm.bench_models import candidate
    kw = dict(base_url='http://gw/v1', api_key='k')
    assert candidate('small', **kw).to == dict(model='openai/small', **kw) and candidate('small', **kw).provider == 'gateway'
    assert candidate('bundled', **kw).to == dict(model=None) and candidate(None, **kw).name == 'bundled'

def test_who_takes_part(monkeypatch):
    monkeypatch.setenv('GROQ_API_KEY', 'x')
    assert bench_specs() == ['bundled', 'groq/openai/gpt-oss-20b'] and bench_specs(local=False, auto=False) == []
    assert bench_specs(['qwen3:4b', 'http://box:1/qwen3:4b', 'someone/qwen'], cloud=['groq', 'openai:gpt-5-mini']) == ['bundled', 'qwen3:4b', 'http://box:1/qwen3:4b', 'ollama/someone/qwen', 'groq/openai/gpt-oss-20b', 'openai/gpt-5-mini']
    assert {read_name(o)[0] for o in bench_specs(['a', 'b/c', 'h:1/d'], local=False, auto=False)} == {'ollama'}
    with pytest.raises(U.ModelNotFound): bench_specs(cloud=['nobody'])

# The picture ---------------------------------------------------------------------------------------------------------
def test_the_picture(tmp_path):
    t = bench_models([finder(name='a'), finder(name='a'), 'http://127.0.0.1:9/x'], lines=50, trials=1)
    for end, head in (('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')):
        t.plot(tmp_path/f'm.{end}')
        assert (tmp_path/f'm.{end}').read_bytes().startswith(head)
    assert [len(ax.patches) for ax in t.plot().axes] == [2, 2, 2]
    with pytest.raises(U.RLMError, match='.png, .svg or .pdf'): t.plot(tmp_path/'m.docx')
    with pytest.raises(U.RLMError, match='No such file'): t.plot(tmp_path/'no'/'m.png')

def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for k in [k for k in sys.modules if k.startswith('matplotlib')]: monkeypatch.delitem(sys.modules, k)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(U.RLMError, match=r"pip install 'rlm\[plot\]'"): ModelsTable().plot()

def test_a_picture_of_nothing(tmp_path): ModelsTable().plot(tmp_path/'m.png')
