"A trace loses no event that was noted, whenever the process dies, and never writes a secret"
import json, os, random, re, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from rlm.models import ScriptedModel, repl_call
from rlm.rlm import RLM
from rlm.trace import Replay, Trace, read_trace
from rlm.usage import Budget, RLMError
from scripted_server import ScriptedServer, error

class Odd:
    def __init__(self, text): self.text = text
    def __repr__(self): return f'Odd({self.text})'

texts = st.text(st.characters(), max_size=30) # lone surrogates, line separators and NUL among them
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=9) | st.builds(Odd, texts)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts|st.integers(), v, max_size=4) | st.tuples(v, v), max_leaves=12)
names = st.sampled_from(['key', 'text', 'message', 'run', 'parent', 'step', 'usage', 'query', 'seconds'])
types = st.sampled_from(['run', 'reply', 'cell', 'final', 'failed', 'not known yet'])
events = st.lists(st.tuples(types, st.dictionaries(names, values, max_size=4)), min_size=1, max_size=8)

@settings(max_examples=150, deadline=None)
@given(events)
def test_the_file_is_the_list(tmp_path_factory, told):
    path = tmp_path_factory.mktemp('t')/'run.jsonl'
    with Trace(path) as trace:
        for type, fields in told: assert trace.add(type, **fields)['type'] == type
    assert list(read_trace(path)) == trace.events and [e['n'] for e in trace] == list(range(len(told)))
    assert list(read_trace(trace.save(path.with_name('copy')))) == Trace(path).events == trace.events
    for line in path.read_bytes().splitlines(): json.loads(line, parse_constant=lambda o: pytest.fail(f'{o} is not JSON'))

@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec='utf-8'), min_size=6, max_size=20), events, texts, texts)
def test_no_secret_is_written(secret, told, before, after):
    trace = Trace(secrets=[secret])
    for type, fields in told: trace.add(type, **fields, deep=[{before + secret + after: (secret, Odd(before + secret))}])
    def strings(o):
        if isinstance(o, str): yield o
        elif isinstance(o, dict):
            for k,v in o.items(): yield from [k, *strings(v)]
        elif isinstance(o, list):
            for v in o: yield from strings(v)
    rest = secret in '[hidden]' or any(secret in f'{a}[hidden]{b}' for a in (before, 'Odd('+before, '') for b in (after, ')', ''))
    assert rest or not any(secret in s for e in trace for s in strings(e.get('deep')))

# Torn files ------------------------------------------------------------------------------------------------------------
def story(n=4):
    "What a run tells; two of its events are equal, and some cannot be written as plain UTF-8"
    yield 'run', dict(run='r', parent=None, depth=0, query='whale? \N{WHALE}')
    for i in range(n):
        yield 'request', dict(run='r', step=i, key=f'k{i}', messages=[dict(role='user', content='\ud83d'*(i%2))])
        yield 'reply', dict(run='r', step=i, key=f'k{i}', message=dict(role='assistant', content='é\n\u2028'), usage=dict(calls=1), seconds=random.random())
        yield 'cell', dict(run='r', step=0, index=0, code='llm_query(1)', output='same', seconds=random.random())
    yield 'final', dict(run='r', answer='3', stop_reason='final')

def tell(trace, events, calls=None):
    "Tell a run's events as a door does: a request only when the reply is not in `calls`, a `Replay`"
    for type, fields in events:
        if type=='request' and calls is not None and fields['key'] in calls: trace.add(type, **fields, replayed=True)
        elif type=='reply' and calls is not None and (old := calls.get(fields['key'])):
            trace.add(type, **{k:v for k,v in old.items() if k not in ('v', 'n', 't', 'type')}, replayed=True)
        else: trace.add(type, **fields)

def bare(events): return [{k:v for k,v in e.items() if k not in ('n', 't', 'seconds', 'replayed')} for e in events]

@pytest.fixture
def whole(tmp_path):
    with Trace(tmp_path/'whole.jsonl') as t: tell(t, story())
    return t

def test_torn_at_every_byte(tmp_path, whole):
    data, path = whole.path.read_bytes(), tmp_path/'torn.jsonl'
    ends = [i for i,b in enumerate(data) if b==10]
    for i in range(len(data)+1):
        path.write_bytes(data[:i])
        kept = whole.events[:sum(e<=i for e in ends)] # a line that lacks only its end is whole
        assert list(read_trace(path)) == kept
        with Trace(path) as t: t.add('guard', name='x')
        assert list(read_trace(path)) == t.events and t.events[:-1] == kept
        assert path.read_bytes().count(b'\n') == len(kept)+1

def test_a_run_told_again_is_written_once(tmp_path, whole):
    "Cut anywhere and taken up again, twice: the file holds what an unbroken run would have written, but for requests under way"
    data, path, rng = whole.path.read_bytes(), tmp_path/'torn.jsonl', random.Random(3)
    for _ in range(40):
        cut = data[:rng.randrange(len(data))]
        for life in 1, 2:
            path.write_bytes(cut)
            calls = {e['key']:e for e in read_trace(path) if e['type']=='reply'}
            asked = sum(e['type']=='request' for e in read_trace(path))
            with Trace(path) as t: tell(t, story(), calls)
            rest = [e for e in read_trace(path) if e['type']!='request']
            assert bare(rest) == bare(e for e in whole if e['type']!='request')
            assert len(t.of('request')) - len(whole.of('request')) == asked - len(calls) <= life
            cut = path.read_bytes()[:rng.randrange(len(cut), path.stat().st_size+1)]

@pytest.mark.parametrize('seed', range(5))
def test_damaged_files_are_read_or_refused(tmp_path, whole, seed):
    rng, path, data = random.Random(seed), tmp_path/'bad.jsonl', whole.path.read_bytes()
    for _ in range(20):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 5)): bad[rng.randrange(len(bad))] = rng.choice(b'\n\0{}[]",9\xff')
        path.write_bytes(bad)
        try: got = list(read_trace(path))
        except RLMError as e:
            assert 'not a trace' in str(e) or 'version' in str(e)
            continue
        assert len(got) >= len(whole)-8 and Replay(path).root is None or isinstance(Replay(path).root, dict)
        assert isinstance(Trace(path)._repr_markdown_(), str)

def test_a_large_file_is_streamed(tmp_path, whole):
    path = tmp_path/'large.jsonl'
    with open(path, 'wb') as f:
        for _ in range(200): f.write(whole.path.read_bytes() + json.dumps(dict(v=1, type='cell', output='x'*100_000)).encode() + b'\n')
    r = subprocess.run([sys.executable, '-c', f'''
import tracemalloc, rlm.trace
tracemalloc.start()
print(sum(1 for _ in rlm.trace.read_trace({str(path)!r})), tracemalloc.get_traced_memory()[1])'''], capture_output=True, text=True, check=True)
    n, most = map(int, r.stdout.split())
    assert path.stat().st_size > 20_000_000 and n == 200*(len(whole)+1) and most < 2_000_000

# Processes that die -----------------------------------------------------------------------------------------------------
writer = '''
import sys, threading
from rlm.trace import Trace
trace, lock = Trace(sys.argv[1]), threading.Lock()
def work(i):
    for j in range(10**6):
        e = trace.add('reply', run='r', key=f'{i}.{j}', message=dict(content='x'*3000))
        with lock: print(e['n'], flush=True)
for i in range(3): threading.Thread(target=work, args=(i,)).start()
'''

@pytest.mark.parametrize('seed', range(3))
def test_killed_writer_loses_nothing_it_had_noted(tmp_path, seed):
    path, wait = tmp_path/'run.jsonl', random.Random(seed).uniform(.05, .4)
    for life in range(2):
        p = subprocess.Popen([sys.executable, '-c', writer, path], stdout=subprocess.PIPE)
        noted = [int(p.stdout.readline())]
        killer = threading.Timer(wait, p.kill)
        killer.start()
        noted += [int(line) for line in p.stdout if line.endswith(b'\n')]
        killer.join()
        assert p.wait() != 0
        got = [e['n'] for e in read_trace(path)]
        assert got == list(range(len(got))) and set(noted) <= set(got), f'life {life}'

@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='limits of file size are POSIX')
def test_no_room_for_the_file(tmp_path):
    r = subprocess.run([sys.executable, '-c', '''
import resource, signal, sys
from rlm.trace import Trace, read_trace
from rlm.usage import Budget, RLMError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
t = Trace(sys.argv[1])
for i in range(5): t.add('cell', step=i, output='x'*1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try: t.add('cell', step=9, output='x'*3000)
except RLMError as e: print(e)
assert list(read_trace(sys.argv[1])) == t.events and len(t) == 5
assert open(sys.argv[1], 'rb').read().endswith(b'\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
t.add('cell', step=6)
assert list(read_trace(sys.argv[1])) == t.events and len(t) == 6''', tmp_path/'run.jsonl'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert 'cannot be written to' in r.stdout and 'Make room there' in r.stdout

def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(RLMError, match='cannot be written to'): Trace(tmp_path).add('run')

# Threads ---------------------------------------------------------------------------------------------------------------
def test_many_threads_one_file(tmp_path):
    heard, trace = [], Trace(tmp_path/'run.jsonl')
    trace.listeners.append(heard.append)
    def work(i):
        trace.secrets.add(f'secret-{i%20}')
        return trace.add('batch', run=f'r{i%7}', done=i, text='x'*2000)
    with ThreadPoolExecutor(16) as pool: list(pool.map(work, range(1500)))
    trace.close()
    got = list(read_trace(trace.path))
    assert [e['n'] for e in got] == list(range(1500)) and got == trace.events
    assert sorted(e['n'] for e in heard) == list(range(1500)) and {e['done'] for e in got} == {*range(1500)}

def test_each_recorded_reply_is_given_once():
    replay = Replay([dict(v=1, type='reply', key=f'k{i%5}', i=i) for i in range(1000)])
    assert [replay.take('k1')['i'] for _ in range(3)] == [1, 6, 11]
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: replay.take(f'k{i%5}'), range(2000)))
    assert sorted(e['i'] for e in got if e) == sorted({*range(1000)} - {1, 6, 11}) and len(replay) == 0

def test_import_is_light():
    r = subprocess.run([sys.executable, '-c', '''
import sys, time
import fastcore.basics, json, dataclasses, pathlib
t = time.process_time()
import rlm.trace
print(time.process_time() - t)
assert not {'litellm', 'IPython', 'openai', 'httpx'} & set(sys.modules)'''], capture_output=True, text=True, check=True)
    assert float(r.stdout) < .05


# what the chapter says of each event

def documented():
    "Fields by type, from the table in the chapter"
    nb = json.loads((Path(__file__).parent.parent/'nbs'/'02_trace.ipynb').read_text(encoding='utf-8'))
    text = next(t for c in nb['cells'] if '| type | when | fields |' in (t := ''.join(c['source'])))
    rows = [o.split('|') for o in text.splitlines() if o.startswith('| `')]
    return {r[1].strip(' `'): set(re.findall(r'`(\w+)`', r[3])) for r in rows}

def test_the_table_of_events_is_complete():
    table, common = documented(), {'v', 'n', 't', 'type', 'run', 'depth', 'step', 'replayed'}
    ask = repl_call('print(llm_query_batched(["a", "b"]), rlm_query("deeper?", "text"))')
    root = ScriptedModel(repl_call('print(context)'), 'I go on.', ask, 'FINAL(a line of text)', name='root')
    sub = ScriptedModel('one', ValueError('no'), default='FINAL(text)', name='sub')
    told = RLM(root, sub, depth=2, budget=Budget(calls=40)).completion('Q?', 'a line of text\nanother').trace.events
    with pytest.raises(RLMError) as e: RLM(ScriptedModel(repl_call('1'))).completion('Q?', 'text')
    told += e.value.trace.events
    assert {o['type'] for o in told} >= {'run', 'request', 'reply', 'failed', 'budget', 'cell', 'batch', 'guard', 'final', 'error'} and {o['type'] for o in told} <= set(table)
    for o in told: assert set(o) - common <= table[o['type']], o
    assert set(table) - {'compact', 'protocol'} <= {o['type'] for o in told}
    left = [o['left'] for o in told if o['type'] == 'budget']
    assert len(left) >= 4 and left[0]['calls'] > left[-1]['calls'] and set(left[0]) == {'calls', 'iterations'}


# keys that servers send back in their errors

ODD = 'odd-looking-value-4711'
WAYS = dict(argument=dict(api_key=ODD), environment={}, header=dict(api_key='other', extra_headers={'x-tenant': ODD}), authorization=dict(api_key='other', headers={'Authorization': f'Basic {ODD}'}))

@pytest.mark.parametrize('at', [0, 560, 570])
@pytest.mark.parametrize('way', WAYS)
def test_no_key_comes_back_in_an_error(way, at, tmp_path, monkeypatch):
    if way == 'environment': monkeypatch.setenv('OPENAI_API_KEY', ODD)
    path = tmp_path/'run.jsonl'
    with ScriptedServer(lambda body: error(400, 'x'*at + f' Authorization: Bearer {ODD}, x-api-key: {ODD}, key={ODD}')) as s:
        with pytest.raises(RLMError) as e: RLM('openai/m', base_url=s.url, checkpoint=path, num_retries=0, **WAYS[way]).completion('Q?', 'text')
    for told in path.read_text(), e.value.trace.save_html(tmp_path/'run.html').read_text(), str(e.value): assert 'odd-l' not in told
