"`process`, `jail` and `monty`: contexts, host functions, limits, restarts, and that nothing stays behind"
import asyncio, datetime, gc, math, os, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
import pytest
from rlm.repl import open_repl, open_path, MappedText, REPLError
from test_repl_conformance import KINDS

CHILDREN, CPYTHON = KINDS[1:], KINDS[1:3]


@pytest.fixture(params=CHILDREN)
def kind(request): return request.param


@pytest.fixture(params=CPYTHON)
def full(request): return request.param


ODD = [float('nan'), float('inf'), 2**200, -1, {1, 2}, frozenset({3}), datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30), datetime.timedelta(1, 2),
    'Tromsø 日本 \U0001f600', b'\x00\xff', (1, (2,)), {'k': {1: None}}, True, 1.5]


def test_contexts_arrive_as_they_left(kind):
    for v in (*ODD, ODD, {'a': ODD}, 'text', '', 'x'*100_000 + 'é' + '日'*50_000, [], {}):
        with open_repl(kind, v) as r:
            assert r.run('type(context).__name__').value == repr(type(v).__name__)
            assert r.run('print(repr(context)[:2000])').stdout == repr(v)[:2000] + '\n'
            assert repr(r.get('context')) == repr(v)


def test_surrogates(full):
    with open_repl(full, 'a\ud800b') as r:
        assert r.run('len(context), ord(context[1])').value == '(3, 55296)' and r.get('context') == 'a\ud800b'
    with pytest.raises(TypeError, match='surrogates'): open_repl('monty', 'a\ud800b')


def test_large_texts_in_parts(full):
    for text in ('0123456789' * 4_000_000, 'é' * 20_000_000 + 'z', 'a'*17_000_000 + '日' + 'b'*17_000_000):
        with open_repl(full, text) as r:
            import hashlib
            code = 'import hashlib\nhashlib.sha256(context.encode("utf-8")).hexdigest()'
            assert r.run(code).value == repr(hashlib.sha256(text.encode()).hexdigest())
    data = os.urandom(40_000_001)
    with open_repl(full, data) as r: assert r.run('hash_ = __import__("hashlib").sha256(context).hexdigest()\nhash_').value == repr(hashlib.sha256(data).hexdigest())


def test_what_cannot_travel_is_refused(kind):
    class Own: pass
    for v in (Own(), [lambda: 1], open(os.devnull)):
        with pytest.raises(TypeError, match='context'): open_repl(kind, v)


def test_dataframes(full):
    pd, pl = pytest.importorskip('pandas'), pytest.importorskip('polars')
    for df, code in (pd.DataFrame(dict(a=[1, 2], b=['x', None])), 'int(context.a.sum()), len(context)'), (pl.DataFrame(dict(a=[1, 2])), 'context["a"].sum(), len(context)'):
        with open_repl(full, df) as r:
            assert r.run(code).value == '(3, 2)'
            with pytest.raises(TypeError, match='stays in its REPL'): r.get('context')
        with pytest.raises(TypeError, match='DataFrame cannot enter monty'): open_repl('monty', df)


def test_paths(full, tmp_path):
    p = tmp_path/'big.txt'
    text = ''.join(f'line {i} Tromsø {"日本" if i % 7 else ""}\n' for i in range(60_000))
    p.write_text(text, encoding='utf-8')
    with open_repl(full, p) as r: assert r.run('type(context).__name__, len(context)').value == repr(('str', len(text)))
    with open_repl(full, MappedText(p)) as r:
        i = text.index('line 45678')
        assert r.run('len(context), context.find("line 45678"), context[-5:]').value == repr((len(text), i, text[-5:]))
        assert r.run(f'context[{i}:{i+30}]').value == repr(text[i:i+30])
        assert r.run('context.search(r"line (4567)9")[1].group(1), context.count("Tromsø"), sum(1 for _ in context.lines())').value == repr(('4567', 60_000, 60_000))
    with open_repl('monty', p) as r: assert r.run('len(context)').value == str(len(text))
    with pytest.raises(FileNotFoundError): open_repl(full, tmp_path/'none.txt')


def test_mapped_text_is_like_str(tmp_path):
    import random
    rng, p = random.Random(3), tmp_path/'t.txt'
    text = ''.join(rng.choice('ab é日\U0001f600\n') for _ in range(5000))
    p.write_bytes(text.encode())
    m = MappedText(p)
    m.BLOCK = 97
    for _ in range(500):
        i, j = sorted(rng.randrange(-5200, 5200) for _ in range(2))
        assert m[i:j] == text[i:j]
        if -len(text) <= i < len(text): assert m[i] == text[i]
        sub = text[(k := rng.randrange(len(text))):k+rng.randrange(1, 5)]
        assert (m.find(sub), m.rfind(sub), m.find(sub, k), m.count(sub), sub in m) == (text.find(sub), text.rfind(sub), text.find(sub, k), text.count(sub), sub in text)
    assert m[::-7] == text[::-7] and list(m) == list(text) and m.splitlines() == text.splitlines() and open_path(p) == text
    with pytest.raises(IndexError): m[len(text)]


def test_host_functions(kind):
    got = []
    def llm_query(prompt, model=None):
        got.append((prompt, model))
        return f'<{prompt}>'
    def fail(): raise ValueError('the reason')
    with open_repl(kind, 'c', funcs=dict(llm_query=llm_query, fail=fail, bad=lambda: object(), pid=os.getpid)) as r:
        assert r.run('llm_query("a", model="m")').value == "'<a>'" and got == [('a', 'm')]
        assert r.run('[llm_query(str(i)) for i in range(50)][-1]').value == "'<49>'"
        assert r.run('pid()').value == str(os.getpid())
        assert r.run('try: fail()\nexcept ValueError as e: print(e)').stdout == 'the reason\n'
        text = r.run('fail()').text()
        assert text.endswith('line 1: fail()\nValueError: the reason')
        assert 'TypeError' in r.run('bad()').error and 'TypeError' in r.run('llm_query(lambda: 1)' if r.kind != 'monty' else 'class A: pass\nllm_query(A())').error
        assert r.run('llm_query = 1').notes and r.run('llm_query("b")').value == "'<b>'"


def test_host_functions_from_threads(full):
    def slow(x):
        time.sleep(0.2)
        return x
    with open_repl(full, funcs=dict(slow=slow)) as r:
        res = r.run('from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as p: out = list(p.map(slow, range(16)))\nout')
        assert res.value == repr(list(range(16))) and res.seconds < 2


def test_context_variables_reach_host_functions(kind):
    import contextvars
    var = contextvars.ContextVar('var', default=0)
    var.set(7)
    with open_repl(kind, funcs=dict(f=var.get)) as r: assert r.run('f()').value == '7'


LOOPS = ['while True: pass', 'import time\ntime.sleep(9)', 'while True:\n    try: x = 1\n    except BaseException: pass']
STUBBORN = ['import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass', 'sum(range(10**12))', 'import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)']


@pytest.mark.parametrize('code', [*LOOPS, "import re\nre.match(r'(a+)+$', 'a'*40 + 'b')"])
def test_timeout_keeps_variables(full, code):
    with open_repl(full, 'c') as r:
        r.run('kept = 1')
        res = r.run('print("before")\n' + code, timeout=0.3)
        assert 'stopped after 0.3 s' in res.error and res.stdout == 'before\n' and res.lost == [] and res.seconds < 1
        assert r.run('kept, context').value == "(1, 'c')"


IN_JAIL_HARMLESS = 'os.kill(os.getpid()'
@pytest.mark.parametrize('code', STUBBORN)
def test_hard_stop_starts_afresh(full, code):
    if full == 'jail' and IN_JAIL_HARMLESS in code: pytest.skip('process 1 of a namespace gets no signal from within')
    with open_repl(full, 'c', funcs=dict(f=len), grace=0.2) as r:
        r.run('gone = 1')
        res = r.run('print("before")\n' + code, timeout=0.3)
        assert 'stopped after 0.3 s' in res.error and res.stdout == 'before\n' and res.lost == ['gone'] and 'Lost variables: gone' in res.text()
        assert r.run('context, f("ab")').value == "('c', 2)" and 'NameError' in r.run('gone').error


def test_timeout_in_monty():
    with open_repl('monty', 'c', funcs=dict(f=len)) as r:
        r.run('gone = 1')
        for code in LOOPS[:1] + LOOPS[2:]:
            res = r.run('print("before")\n' + code, timeout=0.3)
            assert 'stopped after 0.3 s' in res.error and res.seconds < 1.5 and 'restarted' in res.text()
        assert r.run('context, f("ab")').value == "('c', 2)" and 'NameError' in r.run('gone').error


@pytest.mark.parametrize('code', ['import ctypes\nctypes.string_at(0)', 'import os\nos._exit(3)', 'import os\nos.kill(os.getpid(), 9)', 'import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)', 'import os\nos.closerange(3, 4000)'])
def test_crash_starts_afresh(full, code):
    with open_repl(full, 'c') as r:
        r.run('gone = 1')
        res = r.run(code, timeout=3)
        if full == 'jail' and IN_JAIL_HARMLESS in code: return
        assert 'RuntimeError: the process of the REPL' in res.error and res.lost == ['gone']
        assert r.run('context').value == "'c'"


def test_memory(kind):
    with open_repl(kind, 'c', memory=300 << 20) as r:
        for code in ('x = "a" * 10**9', 'x = []\nwhile True: x.append("y" * 10**6 + str(len(x)))', 'x = list(range(10**9))'):
            assert 'MemoryError' in r.run(code, timeout=20).error
            assert r.run('context').value == "'c'"


def test_open_files_and_file_size(full):
    with open_repl(full, 'c', files=40, file_size=1 << 20) as r:
        assert 'Too many open files' in r.run('fs = [open("/dev/null") for _ in range(100)]').error
        r.run('fs = None')
        assert 'File too large' in r.run('import tempfile\nf = tempfile.TemporaryFile()\nfor _ in range(100): f.write(b"x" * 100_000)').error


def test_children(full):
    code = 'import subprocess\nsubprocess.run(["/bin/echo", "child"])\nNone'
    with open_repl(full, children=0) as r:
        assert 'Operation not permitted' in r.run(code).error and 'Operation not permitted' in r.run('import os\nos.fork()').error
        assert r.run('import threading\nt = threading.Thread(target=print, args=("thread",))\nt.start()\nt.join()').stdout == 'thread\n'
    with open_repl(full, children=None) as r:
        assert r.run(code).stdout == 'child\n'
        assert r.run('import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint("one")').stdout.count('one') >= 1
        assert r.run('1 + 1').value == '2'


def test_output_of_every_sort(full):
    with open_repl(full, children=None) as r:
        every = 'import os, sys\nprint("a")\nos.write(1, b"b\\n")\nsys.stderr.write("c\\n")\nos.system("echo d")\nsys.stdout.flush()\nos.write(2, b"e\\n")\nNone'
        assert r.run(every).text() == 'a\nb\nc\nd\ne'
        text = r.run('print("\\x1b[31mred\\x1b[0m", chr(0xd800))').text()
        assert text == 'red \\ud800'
        assert r.run('import sys\nsys.stdout.buffer.write(b"\\xff\\x00\\n")\nNone').text() == '\\xff\\x00'
        assert r.run('import os\nos.system("echo shell")\nNone').text() == 'shell'
        assert r.run('import os, sys\nos.close(1)\nsys.stdout = None').error is None and r.run('print("back")').text() == 'back'
        assert r.run('import atexit\natexit.register(print, "late")\nNone').text() == '(no output)'
        res = r.run('while True: print("flood" * 100)', timeout=0.5)
        assert 'stopped after' in res.error and len(res.stdout) < 1_100_000 and 'characters cut here' in res.text() and r.run('1').value == '1'


def test_a_thread_left_running(full):
    with open_repl(full) as r:
        r.run('import threading, time\ndef tick():\n    while True:\n        time.sleep(0.01)\n        print("tick")\nthreading.Thread(target=tick).start()')
        time.sleep(0.1)
        assert r.run('1 + 1').value == '2' and set(r.run('time.sleep(0.1)').stdout.split()) == {'tick'}


def test_many_at_once(kind):
    def work(i):
        with open_repl(kind, f'ctx{i}', funcs=dict(f=lambda x: f'{x}-{i}')) as r:
            return [r.run(f'print(context)\nf({j})').text() for j in range(5)] == [f"ctx{i}\n'{j}-{i}'" for j in range(5)]
    async def main(): return await asyncio.gather(*(asyncio.to_thread(work, i) for i in range(8)))
    assert all(asyncio.run(main()))


def test_many_open_at_the_same_moment(kind):
    def work(i):
        with open_repl(kind, i) as r: return r.run('context').value
    for _ in range(8):
        with ThreadPoolExecutor(6) as pool: assert list(pool.map(work, range(6))) == list('012345')


def test_a_repl_outlives_the_thread_that_opened_it(kind):
    box = []
    t = threading.Thread(target=lambda: box.append(open_repl(kind, 'c')))
    t.start()
    t.join()
    time.sleep(0.1)
    with box[0] as r: assert r.run('context').value == "'c'"


def left():
    "Children, open descriptors and files of ours"
    kids = [k for t in os.listdir('/proc/self/task') for k in open(f'/proc/self/task/{t}/children').read().split()]
    return kids, len(os.listdir('/proc/self/fd')), os.listdir(tempfile.gettempdir())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_nothing_stays_behind(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with open_repl(kind, 'x'): pass
    gc.collect()
    before = left()
    for i in range(100 if kind != 'jail' else 40):
        r = open_repl(kind, 'x'*1000)
        if i % 10 == 0: r.run('print(1)')
        if i % 3: r.close()
        del r
    gc.collect()
    assert left() == before


ORPHAN = '''
import os, sys
from rlm.repl import open_repl
r = open_repl(sys.argv[1], 'c', **({} if sys.argv[1] == 'monty' else dict(children=None)))
if sys.argv[1] != 'monty': r.run('import os, subprocess\\nsubprocess.Popen(["sleep", "987"], start_new_session=True)')
def tree(pid):
    kids = [k for t in os.listdir(f'/proc/{pid}/task') for k in open(f'/proc/{pid}/task/{t}/children').read().split()]
    return kids + [o for k in kids for o in tree(k)]
print(*tree(os.getpid()), flush=True)
r.run('while True: pass')
'''


def alive(pid):
    try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError: return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_no_orphans_after_kill_9(kind):
    host = subprocess.Popen([sys.executable, '-c', ORPHAN, kind], stdout=subprocess.PIPE, text=True)
    pids = host.stdout.readline().split()
    assert len(pids) >= (2 if kind == 'monty' else 3) and all(map(alive, pids))
    time.sleep(0.2)
    host.kill()
    host.wait()
    end = time.time() + 5
    while any(map(alive, pids)) and time.time() < end: time.sleep(0.05)
    assert not [p for p in pids if alive(p)]
    host.stdout.close()


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match='choose one of: ipython, monty, process, jail'): open_repl('docker')
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(REPLError, match='apt install bubblewrap'): open_repl('jail', 'c')


def test_what_is_too_large_to_leave(full):
    with open_repl(full, 'c', timeout=30) as r:
        res = r.run('kept = 1\nFINAL([0] * 6_000_000)')
        assert res.final is None and 'too large to send; end with less' in res.error and not res.lost
        assert r.run('kept').value == '1' and len(r.run('FINAL("y" * 10**7)').final.value) == 10**7
        r.run('big = [0] * 6_000_000')
        with pytest.raises(TypeError, match='too large'): r.get('big')


@pytest.mark.skipif(os.getuid() == 0, reason='the kernel does not limit the processes of root')
def test_number_of_children(full):
    with open_repl(full, 'c', children=8) as r:
        code = 'import os, time\nn = 0\ntry:\n    for _ in range(40):\n        if os.fork() == 0:\n            time.sleep(5)\n            os._exit(0)\n        n += 1\nexcept OSError: pass\nn'
        assert int(r.run(code, timeout=10).value) <= 8
