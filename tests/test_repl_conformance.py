"Every backend runs what models write as CPython does; the pass rates stand in the chapter on REPLs"
import ast, asyncio, contextlib, io, os, shutil, subprocess
import pytest
from rlm.repl import open_repl
from repl_cells import CELLS, CONTEXT, STEPS

MONTY_LACKS = {'csv_stringio', 'generator', 'class_inherit', 'delete', 'numbers', 'heapq_', 'statistics_', 'textwrap_', 'is_instance', 'bytes_'}


def no_jail():
    "Why there can be no jail here, if so"
    if not shutil.which('bwrap'): return 'bwrap is not installed'
    if subprocess.run(['bwrap', '--unshare-all', '--ro-bind', '/', '/', 'true'], capture_output=True).returncode: return 'user namespaces are not allowed here'


KINDS = ['ipython', 'process', pytest.param('jail', marks=pytest.mark.skipif(bool(no_jail()), reason=no_jail() or '')), 'monty']


def cpython(code, ns):
    "Output and repr of the last expression, by nothing but `exec`"
    tree, out = ast.parse(code), io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    def run(t, mode):
        res = eval(compile(t, '<reference>', mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), ns)
        return asyncio.run(res) if asyncio.iscoroutine(res) else res
    with contextlib.redirect_stdout(out):
        run(tree, 'exec')
        v = run(ast.Expression(last.value), 'eval') if last else None
    return out.getvalue(), None if v is None else repr(v)


@pytest.fixture(scope='module', params=KINDS)
def repl(request):
    with open_repl(request.param, CONTEXT) as r: yield r


def test_enough_cells(): assert len(CELLS) >= 80 and len(MONTY_LACKS) <= len(CELLS)//10


@pytest.mark.parametrize('name', CELLS)
def test_as_cpython(repl, name):
    r = repl.run(CELLS[name])
    want = cpython(CELLS[name], dict(context=CONTEXT, __name__='__main__'))
    same = (r.stdout, r.value, r.error) == (*want, None)
    if repl.kind == 'monty' and name in MONTY_LACKS: assert not same, 'Monty has learnt this: take it off the list'
    else: assert same, f'{r.text()}\n--- CPython:\n{want}'


def test_cells_follow_each_other(repl):
    ns = dict(context=CONTEXT, __name__='__main__')
    for code in STEPS:
        r = repl.run(code)
        assert (r.stdout, r.value, r.error) == (*cpython(code, ns), None)


@pytest.mark.parametrize('code,says', [
    ('x = 1\nprint(contxt)', "  line 2: print(contxt)\nNameError: name 'contxt' is not defined (names you have: context"),
    ('def f(a):\n    return a[9]\n\nf("abc")', '  line 4: f("abc")\n  line 2, in f: return a[9]\nIndexError: string index out of range'),
    ('x = = 2', '  line 1: x = = 2\nSyntaxError: '), ('{}["k"]', "KeyError: 'k'"), ('input("?")', 'nobody to answer'),
    ('exit()', 'SystemExit: the cell ended here'), ('raise SystemExit', 'SystemExit: the cell ended here'), ('import sys\nsys.exit(1)', 'FINAL(answer)'),
    ('raise ValueError("é \\x1b[31m")', 'ValueError: é '), ('def f(n): return f(n+1)\nf(0)', 'RecursionError'), ('import nothing_here', "No module named 'nothing_here'"),
    ('FINAL_VAR("nope")', "none named 'nope'")])
def test_errors_help(repl, code, says):
    text = repl.run(code).text()
    assert says in text and 'site-packages' not in text and '/rlm/' not in text and '\x1b' not in text and len(text) < 1500


@pytest.mark.parametrize('code', ['', '   \n', '# only a comment', 'None', 'pass', 'x = 1'])
def test_no_output(repl, code): assert repl.run(code).text() == '(no output)'


def test_given_names_come_back(repl):
    r = repl.run('context = 5\nFINAL = None\ncontext')
    assert r.value == '5' and '`context`' in r.text() and '`FINAL`' in r.text()
    assert repl.run('context[:8]').value == "'# Report'" and repl.run('FINAL(1)').final.value == 1


def test_final(repl):
    assert repl.run('FINAL({"a": (1, 2.5, None)}); FINAL(2)').final.value == {'a': (1, 2.5, None)}
    r = repl.run('answer = "Oslo"\nFINAL_VAR("answer")\nprint("on")')
    assert (r.final.value, r.final.name, r.stdout) == ('Oslo', 'answer', 'on\n')
    assert repl.run('1').final is None and repl.run('FINAL_VAR("nope")').final is None


def test_get_put_names(repl):
    repl.run('a_list = [1, (2, 3), {"k": {4}}, b"5", None, 2**80, 1.5]')
    assert repl.get('a_list') == [1, (2, 3), {'k': {4}}, b'5', None, 2**80, 1.5] and 'a_list' in repl.names()
    repl.put('given_later', {'x': [1, 2]})
    assert repl.run('given_later["x"]').value == '[1, 2]' and 'given_later' in repl.names() and 'context' not in repl.names()
    with pytest.raises(KeyError): repl.get('no_such_name')


def test_long_output_keeps_both_ends(repl):
    r = repl.run('for i in range(5000): print("line", i)')
    text = r.text(1000)
    assert text.startswith('line 0\n') and text.endswith('line 4999') and 'characters cut here' in text and len(text) < 1150
    assert f'{len(r.stdout.rstrip()) - 1000:,} of' in text
    r = repl.run('"x" * 3_000_000')
    assert len(r.value) < 1_100_000 and len(r.text()) < 5200


def test_a_large_cell(repl):
    assert repl.run('x = "' + 'y'*1_000_000 + '"\nlen(x)').value == '1000000'


def test_shadowed_builtins_harm_only_the_cells(repl):
    repl.run('list = str = len = repr = print = type = 5')
    r = repl.run('context[:8]')
    assert r.value == "'# Report'" and r.error is None
    assert 'TypeError' in repl.run('len("a")').error and repl.run('FINAL(3)').final.value == 3
