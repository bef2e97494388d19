"The in-process shell, from the main thread and from others"
import asyncio, io, sys, threading, time
import pytest
from rlm.repl import open_repl, as_repl, CellResult

REGEX = "import re\nre.match(r'(a+)+$', 'a'*40 + 'b')"
SWALLOW = 'while True:\n    try: x = 1\n    except BaseException: pass'
NESTED = 'while True:\n    try:\n        while True:\n            try: x = 1\n            except: pass\n            finally: y = 2\n    except BaseException as e: pass'
SUPPRESS = 'from contextlib import suppress\nwhile True:\n    with suppress(BaseException): x = 1'
FUNCTION = 'def f():\n    while True:\n        try: g()\n        except: pass\ndef g(): return 1\nf()'
ENDLESS = dict(loop='while True: pass', sleep='import time; time.sleep(3)', swallow=SWALLOW, nested=NESTED, suppress=SUPPRESS, function=FUNCTION,
    awaiting='import asyncio\nawait asyncio.sleep(30)', awaiting_loop='import asyncio\nawait asyncio.sleep(0)\nwhile True: pass',
    repr='class A:\n    def __repr__(self):\n        while True: pass\nA()')


@pytest.fixture
def repl():
    with open_repl('ipython', 'some text', funcs=dict(llm_query=len), grace=0.3) as r: yield r


def in_thread(f, *args, **kw):
    box = []
    t = threading.Thread(target=lambda: box.append(f(*args, **kw)))
    t.start()
    t.join()
    return box[0]


def check_usable(repl, r, old):
    assert 'stopped after 0.2 s' in r.error and '\x1b' not in r.text()
    assert (sys.stdout, sys.stderr) == old
    assert repl.run('print(kept, context, llm_query("abc"))').text() == "1 some text 3"


@pytest.mark.parametrize('code', [*ENDLESS.values(), REGEX], ids=[*ENDLESS, 'regex'])
def test_stops_in_main_thread(repl, code):
    old, t0 = (sys.stdout, sys.stderr), time.time()
    repl.run('kept = 1')
    r = repl.run(code, timeout=0.2)
    assert time.time() - t0 < 1.5
    check_usable(repl, r, old)


@pytest.mark.parametrize('code', ENDLESS.values(), ids=ENDLESS)
def test_stops_in_other_thread(repl, code):
    old, t0 = (sys.stdout, sys.stderr), time.time()
    repl.run('kept = 1')
    r = in_thread(repl.run, code, timeout=0.2)
    assert time.time() - t0 < 2
    check_usable(repl, r, old)


def test_left_behind_thread_cannot_write_to_the_fresh_namespace(repl):
    r = in_thread(repl.run, 'import time\nx = "old"\ntime.sleep(1.6)\nx = "stray"', timeout=0.2)
    assert 'left behind' in r.text()
    time.sleep(1.7)
    assert repl.run('x').value == "'old'"
    assert as_repl(repl.sh) is repl and repl.sh.user_ns['x'] == 'old'


def test_no_copy_and_same_functions(repl):
    big, f = 'x' * 1000, lambda s: s
    with open_repl('ipython', big, funcs=dict(llm_query=f)) as r:
        assert r.sh.user_ns['context'] is big and r.sh.user_ns['llm_query'].__wrapped__ is f
        assert r.run('FINAL(context)').final.value is big


def test_timers_nest():
    inner = open_repl('ipython', 'inner')
    outer = open_repl('ipython', 'outer', funcs=dict(sub=lambda t: inner.run('while True: pass', timeout=t).error))
    assert 'stopped after 0.1 s' in outer.run('print("a")\nprint(sub(0.1))\nprint("b")', timeout=5).stdout
    t0 = time.time()
    assert 'stopped after 0.3 s' in outer.run('sub(0.5)\nwhile True: pass', timeout=0.3).error
    assert time.time() - t0 < 1
    assert outer.run('print("still")').text() == 'still'


def test_ctrl_c_reaches_the_user(repl):
    import signal
    old = sys.stdout
    with pytest.raises(KeyboardInterrupt): repl.run('import signal\nsignal.raise_signal(signal.SIGINT)')
    assert sys.stdout is old and repl.run('1').value == '1'


def test_output_of_threads_goes_to_their_cell(repl):
    code = 'import threading\nts = [threading.Thread(target=print, args=(f"{name}",)) for name in "ab"]\n[t.start() for t in ts]\n[t.join() for t in ts]\nNone'
    assert sorted(repl.run(code).stdout.split()) == ['a', 'b']


def test_two_shells_in_two_threads_do_not_mix():
    repls = [open_repl('ipython', str(i)) for i in range(2)]
    code = 'import time\nfor _ in range(20):\n    print(context)\n    time.sleep(0.002)'
    out = {}
    ts = [threading.Thread(target=lambda i=i: out.setdefault(i, repls[i].run(code))) for i in range(2)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert [set(out[i].stdout.split()) for i in range(2)] == [{'0'}, {'1'}] and all(len(o.stdout.split()) == 20 for o in out.values())


def test_under_a_running_loop(repl):
    async def main(): return repl.run('import asyncio\nawait asyncio.sleep(0, 5)').value, repl.run('print(7)').text()
    assert asyncio.run(main()) == ('5', '7')


def test_replaced_stdout_is_put_back(repl):
    old = sys.stdout
    repl.run('import sys, io\nsys.stdout = io.StringIO()')
    assert sys.stdout is old and repl.run('print(1)').text() == '1'


def test_flood_is_bounded(repl):
    r = repl.run('for i in range(300_000): print("line", i)')
    assert len(r.stdout) < 1_100_000 and r.text().startswith('line 0') and r.text().endswith('line 299999')
    assert 'characters cut here' in r.text() and len(r.text()) < 5200


def test_binary_and_ansi(repl):
    r = repl.run(r'import sys; sys.stdout.buffer.write(b"\xff\x00ok\n"); print("\x1b[1mbold\x1b[0m", chr(0xd800))')
    assert r.stdout == '\\xff\\x00ok\nbold \\ud800\n'


def test_a_cell_of_a_megabyte(repl):
    assert repl.run('x = [' + '1,'*500_000 + ']\nlen(x)').value == '500000'
    if sys.version_info >= (3, 11): assert 'Error' in repl.run('1' + '+1'*500_000).error  # the compiler of 3.10 crashes on it


def test_a_path_is_its_text(tmp_path):
    (tmp_path/'t.txt').write_text('Tromsø', encoding='utf-8')
    with open_repl('ipython', tmp_path/'t.txt') as r: assert r.get('context') == 'Tromsø'


def test_a_magic_and_the_shell_run(repl): assert repl.run('!echo hi').stdout.strip() == 'hi' and repl.run('x = 1\n%who_ls').error is None


def test_arun(repl):
    async def main(): return await repl.arun('context')
    assert asyncio.run(main()).value == "'some text'"
