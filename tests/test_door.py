"The door against a real HTTP server: faults, limits, deadlines, what is written down, what is paid once"
import asyncio, json, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
import pytest
from rlm import usage as U
from rlm.models import Door, ScriptedModel, achat, chat, loop_thread, on_loop, protocol_for, repl_call
from rlm.trace import Replay, Trace, read_trace
from rlm.usage import Budget, BudgetExceeded, Ledger, Usage
from scripted_server import Reply, ScriptedServer, SteadyServer, closed_port, error, hang, message, torn, usage

KEY = 'sk-secret-0123456789'
HI = [dict(role='user', content='hi')]

def to(s, model='openai/small', **kw): return dict(model=model, base_url=s.url, api_key=KEY) | kw
def said(r): return r.choices[0].message.content
def user(text): return [dict(role='user', content=str(text))]
def batch(door, target, n, **kw): return on_loop(door.many([dict(messages=user(i), to=target, kind='sub', **kw) for i in range(n)]))

class Busiest:
    "A script that answers after a while, and knows how many it answered at a time"
    def __init__(self, delay): self.delay, self.now, self.most, self.lock = delay, 0, 0, threading.Lock()
    def __call__(self, body):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.delay)
        with self.lock: self.now -= 1
        return message(body['messages'][-1]['content'])


# achat is chat

def test_achat_from_a_loop_of_ones_own():
    led = Usage()
    async def ask(s): return await asyncio.gather(*[achat(user(i), 'openai/small', s.url, KEY, usage=led) for i in range(5)])
    with ScriptedServer(lambda body: body['messages'][0]['content']) as s:
        for _ in range(2): assert [said(r) for r in asyncio.run(ask(s))] == list('01234')
    assert led.calls == 10

def test_achat_fails_as_chat_does():
    with ScriptedServer(error(401, 'Incorrect API key')) as s, pytest.raises(U.AuthError, match='api_key='): asyncio.run(achat(HI, 'openai/small', s.url, KEY))

def test_a_cancelled_task_ends_its_request():
    async def ask(s):
        with pytest.raises(asyncio.TimeoutError): await asyncio.wait_for(door.acall(HI, to(s)), .5)
    door = Door(trace=Trace())
    with ScriptedServer(hang(20)) as s:
        t0 = time.perf_counter()
        asyncio.run(ask(s))
        for _ in range(100):
            if door.ledger.failed: break
            time.sleep(.02)
    assert time.perf_counter()-t0 < 5 and door.ledger.failed == 1 and door.trace.of('failed')[0]['error'] == 'CancelledError'

def test_a_forked_child_has_a_loop_of_its_own():
    code = f"""if 1:
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from scripted_server import ScriptedServer
        from rlm.models import chat, loop_thread
        with ScriptedServer(lambda body: 'hello') as s:
            ask = lambda: chat([dict(role='user', content='hi')], 'openai/small', s.url, 'sk-0123456789').choices[0].message.content
            said, mine = ask(), loop_thread()
            if not (pid := os.fork()): os._exit(0 if ask() == said and loop_thread() is not mine else 1)
            print(os.waitpid(pid, 0)[1], ask(), len(s.raw))"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert r.stdout.split() == ['0', 'hello', '3'], r.stderr # there LiteLLM tells that its own logging found a new loop

def test_ctrl_c_ends_a_call():
    code = f"""if 1:
        import os, sys, signal, threading, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from scripted_server import ScriptedServer, hang
        from rlm.models import Door
        from rlm.trace import Trace
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ScriptedServer('warm', hang(60)) as s:
            door, to = Door(trace=Trace()), dict(model='openai/small', base_url=s.url, api_key='sk-0123456789')
            door.call([dict(role='user', content='hi')], to)
            threading.Timer(.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            t0 = time.perf_counter()
            try: door.call([dict(role='user', content='hi')], to)
            except KeyboardInterrupt: print(time.perf_counter()-t0 < 10, door.ledger.failed, door.ledger._open['calls'], door.trace[-1]['type'])"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (r.stdout.split(), r.stderr) == (['True', '1', '0', 'failed'], '')


# what is sent, and what is written down

@pytest.mark.parametrize('model', ['openai/small', 'anthropic/claude-haiku-4-5', 'litellm_proxy/small'])
def test_the_place_in_the_tree_is_not_sent(model):
    ok = dict(id='m', type='message', role='assistant', model='claude', content=[dict(type='text', text='hello')], stop_reason='end_turn', usage=dict(input_tokens=6, output_tokens=3))
    with ScriptedServer(ok if 'claude' in model else 'hello') as s:
        assert said(Door().call(HI, to(s, model, base_url=s.url[:-3] if 'claude' in model else s.url), run='run-17', kind='sub', temperature=0)) == 'hello'
    assert 'metadata' not in s.requests[0] and b'run-17' not in s.raw[0] and s.requests[0]['temperature'] == 0

def test_callbacks_find_the_place_in_the_tree():
    chat(HI, model='openai/x', mock_response='LiteLLM is loaded')
    import litellm
    heard, done = [], threading.Event()
    async def hear(kw, *a):
        heard.append(kw['litellm_params']['metadata'])
        if heard[-1].get('team'): done.set() # not the call above, which may be told late
    litellm.success_callback.append(hear)
    try:
        with ScriptedServer('hello') as s: Door().call(HI, to(s), run='run-17', depth=2, step=3, kind='sub', metadata=dict(team='a'))
        assert done.wait(60)
    finally:
        for hooks in (litellm.success_callback, litellm._async_success_callback):
            if hear in hooks: hooks.remove(hear)
    assert {k: heard[-1][k] for k in ('run', 'depth', 'step', 'kind', 'team')} == dict(run='run-17', depth=2, step=3, kind='sub', team='a')

def test_what_is_written_down(tmp_path):
    trace = Trace(tmp_path/'run.jsonl')
    door = Door(trace=trace)
    with ScriptedServer(error(503, 'busy'), message('hello', use=usage(100, 20, cached=64)), f'your key is {KEY}') as s:
        door.call(HI, to(s), run='r', step=1)
        door.call(HI + user('more'), to(s), run='r', step=2, new=user('more'))
    events = list(read_trace(tmp_path/'run.jsonl'))
    assert [e['type'] for e in events] == ['request', 'failed', 'reply', 'request', 'reply']
    assert events[3]['messages'] == user('more') and events[1]['error'] == 'ProviderError' and events[2]['attempts'] == 2
    assert {k: events[2][k] for k in ('run', 'step', 'depth', 'kind', 'model', 'finish_reason')} == dict(run='r', step=1, depth=0, kind='root', model='openai/small', finish_reason='stop')
    assert events[2]['message']['content'] == 'hello' and events[2]['usage']['cached_tokens'] == 64 and events[2]['key'] == events[0]['key'] != events[3]['key']
    assert KEY not in (tmp_path/'run.jsonl').read_text()

def test_half_a_surrogate_pair_goes_through(tmp_path):
    with ScriptedServer('a') as s: assert said(Door(trace=Trace(tmp_path/'t.jsonl')).call(user('x\ud83dy'), to(s), run='r')) == 'a'
    assert s.messages[0][0]['content'] == 'x?y'

def test_a_kept_reply_is_not_paid_twice(tmp_path):
    path = tmp_path/'run.jsonl'
    tools = [dict(type='function', function=dict(name='run_repl', parameters={}))]
    with ScriptedServer(message('hm', [('run_repl', dict(python_code='1+1'))], reasoning_content='I think'), 'b', 'c') as s:
        door = Door(trace=Trace(path))
        first = door.call(HI, to(s), tools, run='r')
        door.call(HI + user(2), to(s), tools, run='r', step=1)
        later = Door(trace=Trace(path), replay=Replay(path))
        heard = []
        later.trace.listeners.append(heard.append)
        again = later.call(HI, to(s), tools, run='r')
        assert said(later.call(HI + user(2), to(s), tools, run='r', step=1)) == 'b' and len(s.raw) == 2
        assert said(later.call(HI + user(3), to(s), tools, run='r', step=2)) == 'c' and len(s.raw) == 3
    assert again.choices[0].message.model_dump(exclude_none=True) == first.choices[0].message.model_dump(exclude_none=True)
    assert again.choices[0].message.tool_calls[0].function.arguments == '{"python_code": "1+1"}' and again.choices[0].message.reasoning_content == 'I think'
    assert later.ledger.usage.calls == 3 and later.ledger.usage.total_tokens == 45
    assert [e['type'] for e in read_trace(path)] == ['request', 'reply']*3 and len(heard) == 6


# retries, in the time there is

@pytest.mark.parametrize('fault', [error(429, 'slow down'), error(500, 'boom'), torn(), Reply(b'', 502)], ids=['429', '500', 'torn', '502'])
def test_every_attempt_counts(fault):
    door = Door(num_retries=1)
    with ScriptedServer(fault, 'hello') as s: assert said(door.call(HI, to(s))) == 'hello'
    assert len(s.raw) == 2 and (door.ledger.usage.calls, door.ledger.failed, door.ledger.usage.sent) == (1, 1, 2)

@pytest.mark.parametrize('status,exc', [(401, U.AuthError), (404, U.ModelNotFound), (400, U.BadRequest)])
def test_what_cannot_succeed_is_not_tried_again(status, exc):
    door = Door()
    with ScriptedServer(*[error(status, 'no')]*3) as s, pytest.raises(exc): door.call(HI, to(s))
    assert len(s.raw) == 1 and door.ledger.failed == 1

def test_retries_need_calls_in_the_budget():
    door = Door(Ledger(Budget(calls=2)), num_retries=5)
    with ScriptedServer(*[error(500, 'boom')]*9) as s, pytest.raises(BudgetExceeded) as e: door.call(HI, to(s))
    assert len(s.raw) == 2 and e.value.limit == 'calls'

@pytest.mark.parametrize('said_as', ['seconds', 'date'])
def test_retry_after(said_as):
    wait = '1' if said_as == 'seconds' else formatdate(time.time()+2, usegmt=True)
    with ScriptedServer(error(429, 'slow down', headers={'Retry-After': wait}), 'hello') as s:
        t0 = time.perf_counter()
        assert said(Door().call(HI, to(s))) == 'hello'
    assert 1 <= time.perf_counter()-t0 < 8

def test_a_wait_beyond_the_time_of_the_run_is_not_begun():
    door = Door(Ledger(Budget(seconds=20)))
    with ScriptedServer(error(429, 'slow down', headers={'Retry-After': '60'})) as s:
        t0 = time.perf_counter()
        with pytest.raises(BudgetExceeded) as e: door.call(HI, to(s))
    assert e.value.limit == 'seconds' and time.perf_counter()-t0 < 10

def test_a_wait_beyond_the_timeout_is_not_begun():
    with ScriptedServer(error(429, 'slow down', headers={'Retry-After': '60'})) as s, pytest.raises(U.RateLimited): Door(timeout=20).call(HI, to(s))
    assert len(s.raw) == 1

def test_one_429_speaks_to_the_whole_batch():
    seen = []
    def answer(body):
        seen.append(time.perf_counter())
        if len(seen) == 1: return error(429, 'slow down', headers={'Retry-After': '2'})
        if len(seen) == 2: time.sleep(1) # until the first has been heard
        return message('hello')
    chat(HI, model='openai/x', mock_response='LiteLLM is loaded')
    with ScriptedServer(answer) as s: res = batch(Door(limit=2), to(s), 12)
    assert [said(r) for r in res] == ['hello']*12
    assert len([t for t in seen if t-seen[0] < 1.9]) <= 2 and len(s.raw) == 13

def test_a_hang_ends_with_the_time_of_the_run():
    door = Door(Ledger(Budget(seconds=2)))
    chat(HI, model='openai/x', mock_response='LiteLLM is loaded')
    door.ledger._start = door.ledger.clock()
    with ScriptedServer(hang(30)) as s:
        t0 = time.perf_counter()
        with pytest.raises(BudgetExceeded) as e: door.call(HI, to(s))
    assert e.value.limit == 'seconds' and time.perf_counter()-t0 < 8 and door.ledger.failed == 1

def test_a_hang_of_one_attempt_is_tried_again():
    with ScriptedServer(hang(30), 'hello') as s: assert said(Door(timeout=1, num_retries=1).call(HI, to(s))) == 'hello'

def test_a_callable_that_hangs():
    with pytest.raises(U.ModelTimeout): Door(timeout=.2, num_retries=0).call(HI, dict(model=lambda messages, **kw: time.sleep(3)))

def test_unreachable(): pytest.raises(U.GatewayUnreachable, Door(num_retries=0).call, HI, dict(model='openai/x', base_url=f'http://127.0.0.1:{closed_port()}/v1', api_key=KEY))


# many

def test_no_more_than_the_limit_at_a_time():
    script = Busiest(.05)
    with ScriptedServer(script) as s: res = batch(Door(limit=7), to(s), 40)
    assert [said(r) for r in res] == [str(i) for i in range(40)] and script.most == 7

def test_one_limit_for_runs_and_threads():
    script, door = Busiest(.05), Door(limit=5)
    with ScriptedServer(script) as s, ThreadPoolExecutor(4) as pool: list(pool.map(lambda i: batch(door, to(s), 10, run=f'r{i}'), range(4)))
    assert script.most == 5 and door.ledger.usage.calls == 40

def test_failures_stay_in_their_places():
    def answer(body): return error(400, 'not this one') if int(body['messages'][0]['content'])%3 == 0 else message('hello')
    with ScriptedServer(answer) as s: res = batch(Door(num_retries=0), to(s), 9)
    assert [type(r) is U.BadRequest for r in res] == [i%3 == 0 for i in range(9)]

@pytest.mark.parametrize('limit', ['tokens', 'calls'])
def test_a_batch_keeps_within_the_budget(limit):
    door = Door(Ledger(Budget(**{limit: dict(tokens=300, calls=10)[limit]})), limit=4)
    with ScriptedServer(lambda body: message('hello', use=usage(10, 10))) as s: res = batch(door, to(s), 60, max_tokens=10)
    u = door.ledger.usage
    refused = [r for r in res if isinstance(r, BudgetExceeded)]
    assert refused and {e.limit for e in refused} == {limit} and len(s.raw) == u.calls == 60-len(refused)
    assert dict(tokens=u.total_tokens <= 300 and u.calls >= 10, calls=u.calls == 10)[limit]

def test_the_closing_turn_may_use_what_is_held_and_does_not_queue():
    door = Door(Ledger(Budget(calls=2)), limit=1)
    door.ledger.hold(600)
    with ScriptedServer('hello', 'and goodbye') as s:
        door.call(HI, to(s))
        with pytest.raises(BudgetExceeded): door.call(HI, to(s))
        assert said(door.call(HI, to(s), closing=True, kind='closing')) == 'and goodbye'

def test_nothing_passes_once_the_ledger_is_cancelled():
    door = Door()
    door.ledger.cancel()
    with ScriptedServer('hello') as s, pytest.raises(BudgetExceeded, match='cancelled'): door.call(HI, to(s), closing=True)
    assert s.raw == []

def test_costs_are_reserved_by_the_price_list():
    door = Door(Ledger(Budget(cost=.001)))
    with ScriptedServer(message('x', use=usage(10, 10))) as s, pytest.raises(BudgetExceeded) as e: door.call(HI, to(s, 'openai/gpt-4o-mini'), max_tokens=10_000)
    assert e.value.limit == 'cost' and s.raw == []

def test_what_answers_came_to_is_what_the_next_may_use():
    door = Door(Ledger(Budget(tokens=1000)))
    with ScriptedServer(lambda body: message('x', use=usage(10, 4))) as s:
        for _ in range(20): door.call(HI, to(s))
    assert door.ledger.usage.total_tokens == 280

def test_nothing_is_printed(capfd):
    with ScriptedServer(error(500, 'boom'), error(400, 'no'), 'hello') as s: batch(Door(num_retries=1, limit=1), to(s), 2)
    assert capfd.readouterr() == ('', '')


# models and protocols

class Gateway(ScriptedServer):
    "A gateway that tells of its models"
    def __enter__(self):
        super().__enter__()
        def do_GET(h):
            out = json.dumps(dict(data=[dict(model_name='old', model_info=dict(supports_function_calling=False)), dict(model_name='new', model_info=dict(supports_function_calling=True)), dict(model_name='odd', model_info=None)])).encode()
            h.send_response(200)
            for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(out))}.items(): h.send_header(k, v)
            h.end_headers()
            h.wfile.write(out)
        self.httpd.RequestHandlerClass.do_GET = do_GET
        return self

def test_protocols():
    with Gateway() as s: assert [protocol_for(f'openai/{m}', s.url) for m in ('old', 'new', 'odd', 'unknown')] == ['fenced', 'tools', 'tools', 'tools']
    with ScriptedServer() as s: assert protocol_for('openai/unknown', s.url) == 'tools'

async def _own_client(messages, **kw): return ScriptedModel('from a coroutine')(messages)

def test_an_async_callable(): assert said(Door().call(HI, dict(model=_own_client))) == 'from a coroutine'

def test_a_callable_does_not_hold_up_the_others():
    slow = lambda messages, **kw: (time.sleep(.5), ScriptedModel('slow')(messages))[1]
    t0 = time.perf_counter()
    assert [said(r) for r in batch(Door(limit=40), dict(model=slow), 40)] == ['slow']*40
    assert time.perf_counter()-t0 < 10


# how fast

async def bare(s, n, limit):
    import litellm
    free = asyncio.Semaphore(limit)
    async def one(i):
        async with free: return await litellm.acompletion(model='openai/small', messages=user(i), api_base=s.url, api_key=KEY)
    return await asyncio.gather(*[one(i) for i in range(n)])

@pytest.mark.slow
def test_a_batch_is_about_as_fast_as_litellm_alone(tmp_path):
    budget, n = Budget(tokens=10**9, cost=1e6, calls=10**6, seconds=10**5), 300
    def door(s): return batch(Door(Ledger(budget), Trace(tmp_path/'t.jsonl'), limit=100), to(s), n, run='r')
    def seconds(f):
        t0 = time.perf_counter()
        assert len([r for r in f() if said(r) == 'steady']) == n
        return time.perf_counter() - t0
    chat(HI, model='openai/x', mock_response='LiteLLM is loaded')
    with SteadyServer(.1) as s:
        on_loop(bare(s, 20, 20))
        ratios = []
        for _ in range(4):
            a, b = seconds(lambda: on_loop(bare(s, n, 100))), seconds(lambda: door(s))
            ratios.append(b/a)
            if b/a <= 1.3: return
    pytest.fail(f'through the door it took {min(ratios):.2f} times as long, at best')
