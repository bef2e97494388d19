"A run that is killed goes on where it stopped: nothing that was answered is asked again"
import json, os, signal, subprocess, sys, threading, time
from collections import Counter
import pytest
from rlm.models import ScriptedModel, repl_call
from rlm.rlm import RLM
from rlm.trace import read_trace
from rlm.usage import AuthError, Budget, RLMError
from scripted_server import ScriptedServer, message, code, error, hang

TEXT = 'the quick brown fox jumps over the lazy dog ' * 20
LIFE = '''
from rlm.rlm import RLM
def live(url, path, repl, depth):
    res = RLM('openai/m', base_url=url, api_key='k', checkpoint=path, repl=repl, depth=int(depth), max_concurrency=4).completion('Q', {text!r})
    return f'{{res.answer}} {{res.iterations}} {{res.usage.calls}}'
'''.format(text=TEXT)
CHILD = LIFE + '''
import sys
print(live(*sys.argv[1:]), flush=True)
'''
PARENT = LIFE + '''
import json, os, sys
from rlm.models import _litellm
_litellm()
import openai, pydantic_monty, litellm.responses.mcp.litellm_proxy_mcp_handler, litellm.llms.openai.chat.gpt_audio_transformation
for line in sys.stdin:
    *args, out = json.loads(line)
    open(out, 'w').close()
    if not (pid := os.fork()):
        open(out, 'w').write(live(*args))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

def turn(body):
    "The cell of each turn, by how many results the model has seen; ten turns with batches and a child run"
    n = sum(m['role'] == 'tool' for m in body['messages'])
    if body['messages'][1]['content'].startswith('child'): return code('w = llm_query("in " + str(len(context)))\nFINAL_VAR("w")')
    if n == 9: return message('FINAL_VAR(notes)')
    if n % 3 == 0: return code(f'notes = (notes if "notes" in SHOW_VARS() else []) + llm_query_batched([f"{n} {{i}}" for i in range(3)])\nprint(notes)')
    if n == 4: return code('notes.append(rlm_query("child", context[:50]))\nprint(notes)')
    return code(f'x{n} = context[{n}:{n}+9]\nnotes.append(x{n})\nprint(len(notes))')

def answer(body):
    "What the server says: a function of the request alone"
    return turn(body) if 'tools' in body else message('<' + body['messages'][-1]['content'] + '>')

class Killing:
    "Answers, and kills the client at the k-th request: before the answer, or right after it was sent"
    def __init__(self, k=None, after=False): self.k, self.after, self.n, self.pid, self.lock, self.born = k, after, 0, None, threading.Lock(), threading.Event()
    def __call__(self, body):
        with self.lock:
            self.n += 1
            hit = self.n == self.k
        if hit and self.after: threading.Timer(.01, self.kill).start()
        elif hit:
            self.kill()
            return hang(5)
        return answer(body)
    def kill(self):
        self.born.wait()
        try: os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError: pass

class Lives:
    "Starts the program again and again: forked from a process that has imported everything and started nothing"
    def __init__(self): self.p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def __call__(self, s, path, killer, repl='monty', depth=1):
        "One life: its exit status and what it printed"
        self.p.stdin.write(json.dumps([s.url, str(path), repl, depth, str(path) + '.out']) + '\n')
        self.p.stdin.flush()
        killer.pid = int(self.p.stdout.readline())
        killer.born.set()
        return int(self.p.stdout.readline()), open(str(path) + '.out').read().strip()
    def end(self):
        self.p.stdin.close()
        self.p.wait(10)

def fresh(s, path, killer, repl='monty', depth=1):
    "The same in a process of its own"
    p = subprocess.Popen([sys.executable, '-c', CHILD, s.url, str(path), repl, str(depth)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killer.pid = p.pid
    killer.born.set()
    out, err = p.communicate(timeout=120)
    assert p.returncode in (0, -signal.SIGKILL), err
    return p.returncode, out.strip()

@pytest.fixture(scope='module')
def lives():
    o = Lives()
    yield o
    o.end()

def asked(s): return Counter(json.dumps(b['messages']) for b in s.requests)

def here(s, path, depth=1, **kw):
    "The same run in this process"
    return RLM('openai/m', base_url=s.url, api_key='k', checkpoint=path, depth=depth, max_concurrency=4, **kw).completion('Q', TEXT)

@pytest.fixture(scope='module', params=[1, 2])
def whole(request, tmp_path_factory):
    "An unbroken run: depth, answer, requests, trace"
    path = tmp_path_factory.mktemp('whole')/'run.jsonl'
    with ScriptedServer(answer) as s: res = here(s, path, request.param)
    return request.param, res, asked(s), path

def test_the_unbroken_run(whole):
    depth, res, requests, _ = whole
    assert res.iterations == 10 and res.usage.calls == sum(requests.values()) == 10+9+depth and all(n == 1 for n in requests.values())

def check(path, whole):
    "Go on from `path` here: the same answer, and no answered request is made again"
    depth, res, requests, _ = whole
    replied = {e['key'] for e in read_trace(path) if e['type'] == 'reply'}
    with ScriptedServer(answer) as s: again = here(s, path, depth)
    assert (again.value, again.iterations, again.usage.calls, again.usage.total_tokens) == (res.value, res.iterations, res.usage.calls, res.usage.total_tokens)
    assert sum(asked(s).values()) == sum(requests.values()) - len(replied) and not asked(s) - requests
    assert again.messages == res.messages
    keys = Counter(e['key'] for e in read_trace(path) if e['type'] == 'reply')
    assert len(keys) == sum(requests.values()) and set(keys.values()) == {1}
    for t in ('run', 'cell', 'final'): assert Counter(e['run'] for e in read_trace(path) if e['type'] == t) == Counter(e['run'] for e in res.trace.of(t))

def test_every_line_of_a_trace_is_a_place_to_go_on_from(whole, tmp_path):
    "A kill can end the file after any line; some of them with a torn line behind it"
    lines = whole[3].read_bytes().splitlines(keepends=True)
    for i in range(0, len(lines), 3):
        path = tmp_path/f'{i}.jsonl'
        path.write_bytes(b''.join(lines[:i]) + (lines[i][:len(lines[i])//2] if i % 5 == 0 else b''))
        check(path, whole)

def killed(whole, path, k, after, run, repl='monty'):
    "Kill at the k-th request and start again: the server's count is that of an unbroken run, but for calls in flight"
    depth, res, requests, _ = whole
    killer = Killing(k, after)
    with ScriptedServer(killer) as s:
        first = run(s, path, killer, depth=depth, repl=repl)
        replied = sum(e['type'] == 'reply' for e in read_trace(path)) if path.exists() else 0
        in_flight, killer.k = len(s.requests) - replied, None
        status, out = run(s, path, killer, depth=depth, repl=repl)
    assert status == 0 and out == f'{res.answer} {res.iterations} {res.usage.calls}'
    assert 0 <= in_flight <= 4 and sum(asked(s).values()) == sum(requests.values()) + in_flight and set(asked(s)) == set(requests)
    return first[0] == -signal.SIGKILL

def test_killed_and_started_again(whole, tmp_path):
    assert killed(whole, tmp_path/'r.jsonl', 5 + 3*whole[0], whole[0] == 1, fresh)

@pytest.mark.parametrize('every', [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_request(whole, lives, tmp_path, every):
    "Before it is answered, or, in the run with a child, just after"
    calls, after = sum(whole[2].values()), whole[0] == 2
    dead = [killed(whole, tmp_path/f'{k}.jsonl', k, after, lives) for k in range(2 if every > 1 else 1, calls+1, every)]
    assert sum(dead) >= len(dead) - after

def test_killed_in_a_cell(tmp_path):
    "By the code itself, in the process that runs it"
    path = tmp_path/'run.jsonl'
    script = "import os, signal, sys\nfrom rlm.rlm import RLM\nfrom rlm.models import ScriptedModel, repl_call\ndef die(): 'Die'; os.kill(os.getpid(), signal.SIGKILL)\n" \
        "RLM(ScriptedModel(repl_call('a = 1'), repl_call('b = llm_query(\"q\")\\ndie()'), 'sub'), checkpoint=sys.argv[1], tools=[die]).completion('Q')"
    p = subprocess.run([sys.executable, '-c', script, str(path)], capture_output=True, text=True, timeout=120)
    assert p.returncode == -signal.SIGKILL, p.stderr
    def die(): 'Live'
    m = ScriptedModel('FINAL_VAR(b)')
    res = RLM(m, checkpoint=path, tools=[die]).completion('Q')
    assert res.value == 'sub' and res.usage.calls == 4 and len(m.sent) == 1

def test_a_finished_checkpoint_answers_without_a_request(whole, monkeypatch):
    before = whole[3].read_bytes()
    monkeypatch.setattr(time, 'monotonic', lambda clock=time.monotonic: clock()*1000) # a machine so slow that each step takes its time
    with ScriptedServer() as s: res = here(s, whole[3], whole[0])
    assert res.value == whole[1].value and s.requests == [] and whole[3].read_bytes() == before

@pytest.mark.parametrize('limit', [dict(calls=4), dict(tokens=9000), dict(seconds=2), dict(iterations=2)], ids=lambda o: next(iter(o)))
def test_a_checkpoint_that_a_limit_ended(limit, tmp_path):
    def go(m, **kw): return RLM(m, checkpoint=tmp_path/'r.jsonl', budget=Budget(**kw)).completion('Q')
    slow = dict(seconds=lambda m: time.sleep(.3) or repl_call(str(len(m))))
    def model(messages, tools=None, **kw): return ScriptedModel((slow.get(next(iter(limit))) or repl_call(str(len(messages)))) if tools else 'so far')(messages)
    first = go(model, **limit)
    assert first.answer == 'so far' and first.stop_reason == next(iter(limit))
    silent = ScriptedModel(name='model')
    again = go(silent, **limit)
    assert (again.answer, again.stop_reason, again.iterations, silent.sent) == (first.answer, first.stop_reason, first.iterations, [])
    more = go(ScriptedModel('FINAL(more)', name='model'), **{k: v*50 for k, v in limit.items()})
    assert (more.answer, more.iterations) == ('more', first.iterations+1)

def test_a_checkpoint_of_another_question_is_refused(whole, tmp_path):
    path = tmp_path/'run.jsonl'
    path.write_bytes(whole[3].read_bytes())
    def m(name='m'): return dict(model=f'openai/{name}', base_url='http://127.0.0.1:9', api_key='k', checkpoint=path)
    for make, what in ((lambda: RLM(**m()).completion('Other', TEXT), "its query is 'Q'"), (lambda: RLM(**m()).completion('Q', TEXT + '!'), 'its context is'), (lambda: RLM(**m('n')).completion('Q', TEXT), "its model is 'openai/m'")):
        with pytest.raises(RLMError, match=f'belongs to another question: {what}.*Give another file'): make()

@pytest.mark.parametrize('text', ['no trace\n', '{"a": 1}\n'])
def test_a_file_that_is_no_trace(text, tmp_path):
    path = tmp_path/'a.jsonl'
    path.write_text(text)
    with pytest.raises(RLMError, match='not a trace'): RLM(ScriptedModel('FINAL(x)'), checkpoint=path).completion('Q')
    assert path.read_text() == text

def test_a_checkpoint_of_the_fenced_protocol_found_out(tmp_path):
    "The model refused tools in the first life; its recorded replies are read as what they are"
    def refuse(body): return error(400, 'no tools here') if 'tools' in body else message('```repl\nx = len(context)\nprint(x)\n```' if len(body['messages']) == 2 else 'FINAL_VAR(x)')
    path = tmp_path/'r.jsonl'
    with ScriptedServer(refuse) as s: first = RLM('openai/m', base_url=s.url, api_key='k', checkpoint=path).completion('Q', TEXT)
    lines = path.read_bytes().splitlines(keepends=True)
    cut = next(i for i, l in enumerate(lines) if b'"type": "cell"' in l) + 1
    path.write_bytes(b''.join(lines[:cut]))
    with ScriptedServer(refuse) as s: again = RLM('openai/m', base_url=s.url, api_key='k', checkpoint=path).completion('Q', TEXT)
    assert again.value == first.value == len(TEXT) and len(s.requests) == 1

def test_a_checkpoint_after_a_window_that_overflowed(tmp_path):
    def small(body):
        n = len(body['messages'])
        if sum(len(str(m.get('content'))) for m in body['messages']) > 30_000: return error(400, 'maximum context length is 8000 tokens')
        return code(f'print("{n % 10}"*4900)') if n < 16 else code('FINAL_VAR("history")')
    path = tmp_path/'r.jsonl'
    with ScriptedServer(small) as s: first = RLM('openai/m', base_url=s.url, api_key='k', checkpoint=path).completion('Q')
    path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:-4]))
    with ScriptedServer(small) as s: again = RLM('openai/m', base_url=s.url, api_key='k', checkpoint=path).completion('Q')
    assert again.value == first.value and len(again.value) >= 3 and len(s.requests) == 1 and again.messages == first.messages

def test_a_session_goes_on(tmp_path):
    path = tmp_path/'s.jsonl'
    with RLM(ScriptedModel(repl_call('x = context[:3]'), 'FINAL_VAR(x)', repl_call('y = x + "!"'), 'FINAL_VAR(y)')).session(TEXT, checkpoint=path) as s: first = [s.completion('one?').answer, s.completion('two?').answer]
    m = ScriptedModel('FINAL_VAR(y)')
    with RLM(m).session(TEXT, checkpoint=path) as s: again = [s.completion('one?').answer, s.completion('two?').answer, s.completion('three?').answer]
    assert again == first + ['the!'] and len(m.sent) == 1

def test_failed_calls_and_seconds_of_earlier_lives_count(tmp_path):
    def nap(): time.sleep(1)
    def m(*script): return ScriptedModel(*script, name='m')
    def live(m): return RLM(m, checkpoint=tmp_path/'r.jsonl', budget=Budget(calls=20, seconds=100), tools=[nap]).session()
    slow = lambda _: time.sleep(1) or repl_call('nap()\na = llm_query("q")')
    for script in ([slow, 'sub', AuthError('no')], [AuthError('no')]):
        with live(m(*script)) as s, pytest.raises(AuthError): s.completion('Q')
    with live(last := m(repl_call('b = budget()'), 'FINAL_VAR(b)')) as s: res = s.completion('Q')
    assert len(last.sent) == 2 and (res.usage.calls, res.usage.failed) == (4, 2) and res.total_time < 5
    assert res.value['calls'] == 20 - 3 - 2 - 1 and 70 < res.value['seconds'] < 78.1 and s.tree.ledger.seconds > 2

HOLD = 'import sys, time\nfrom rlm.rlm import RLM\nfrom rlm.models import ScriptedModel, repl_call\n' \
    'RLM(ScriptedModel(repl_call("x = 1"), lambda m: print("ready", flush=True) or time.sleep(60)), checkpoint=sys.argv[1]).completion("Q")'

def test_two_processes_cannot_write_one_checkpoint(tmp_path):
    path, m = tmp_path/'deep'/'r.jsonl', ScriptedModel('FINAL(x)')
    with subprocess.Popen([sys.executable, '-c', HOLD, str(path)], stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == 'ready\n'
            before = path.read_bytes()
            with pytest.raises(RLMError, match=r'r\.jsonl is in use.*another file'): RLM(m, checkpoint=path).completion('Q')
            assert path.read_bytes() == before
        finally: p.kill()
    m.name = 'scripted'
    assert RLM(m, checkpoint=path).completion('Q').usage.calls == 2

def test_a_checkpoint_that_cannot_be_written(tmp_path):
    with pytest.raises(RLMError, match='cannot be written to.*another file'): RLM(ScriptedModel('FINAL(x)'), checkpoint=tmp_path).completion('Q')
