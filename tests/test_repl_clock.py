"A cell's clock stands still while host functions work for it; `wall` counts all of it"
import threading, time
import pytest
from rlm.repl import open_repl

def nap(seconds):
    time.sleep(seconds)
    return seconds

@pytest.fixture(params=['ipython', 'ipython-thread', 'process', 'jail', 'monty'])
def run(request):
    "Runs cells in a REPL of each kind; in `ipython` also from a thread"
    kind, _, aside = request.param.partition('-')
    with open_repl(kind, 'c', funcs=dict(nap=nap)) as r:
        def go(*args, **kw):
            if not aside: return r.run(*args, **kw)
            box = []
            t = threading.Thread(target=lambda: box.append(r.run(*args, **kw)))
            t.start()
            t.join()
            return box[0]
        go.kind = kind
        yield go

def test_host_functions_do_not_count(run):
    res = run('a = nap(1.2)\nb = nap(1)\na + b', timeout=1)
    assert (res.error, res.value) == (None, '2.2') and 2.2 <= res.seconds < 10

def test_own_work_counts_before_and_after(run):
    t0 = time.monotonic()
    res = run('nap(1.5)\nwhile True: pass', timeout=.6)
    assert 'stopped after 0.6 s' in res.error and 2 <= time.monotonic() - t0 < 10
    assert run('1 + 1').value == '2'

def test_the_wall_counts_all(run):
    t0 = time.monotonic()
    res = run('for _ in range(100): nap(.1)', timeout=30, wall=1)
    assert 'stopped after 1 s' in res.error and time.monotonic() - t0 < 10
    assert run('1 + 1').value == '2'

@pytest.mark.parametrize('kind', ['ipython', 'process', 'jail'])
def test_host_functions_called_from_threads(kind):
    code = 'from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p: r = list(p.map(nap, [.8, 1, 1.2, .3, 1]))\nsum(r)'
    with open_repl(kind, 'c', funcs=dict(nap=nap)) as r: assert r.run(code, timeout=1.2).value == '4.3'

def test_a_call_left_in_a_thread_does_not_stop_the_clock_of_the_next_cell():
    with open_repl('process', 'c', funcs=dict(nap=nap)) as r:
        r.run('import threading\nthreading.Thread(target=nap, args=(4,), daemon=True).start()')
        t0 = time.monotonic()
        assert 'stopped after 0.3 s' in r.run('while True: pass', timeout=.3).error and time.monotonic() - t0 < 3
