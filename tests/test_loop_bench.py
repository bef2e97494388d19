"`rlm bench loop`: the figures are what they say, and the server behind them ends with whoever started it"
import json, os, signal, socket, subprocess, sys, time, urllib.error, urllib.request
import pytest
from rlm.loop_bench import LoopTable, bare_batch, bench_alone, bench_batch, bench_loop, bench_peer, bench_turns, gaps, requests_of, reuse, scripted_server

@pytest.fixture(scope='module')
def url():
    with scripted_server() as url: yield url

def post(url, model, *texts, tools=None):
    body = dict(model=model, messages=[dict(role='user', content=o) for o in texts]) | (dict(tools=tools) if tools else {})
    with urllib.request.urlopen(urllib.request.Request(f'{url}/chat/completions', json.dumps(body).encode())) as r: return json.load(r)['choices'][0]['message']

# The server ----------------------------------------------------------------------------------------------------------
def test_dialects(url):
    assert 'print(len(context) + 0)' in post(url, 'turns-2.a', 'x')['content']
    assert 'ready' in post(url, 'turns-2.a', 'x')['content']
    assert post(url, 'turns-2.b', 'x', tools=['t'])['tool_calls'][0]['function']['name'] == 'run_repl'
    assert post(url, 'turns-2.b', 'x', tools=['t'])['content'] == 'FINAL(done)'

def test_a_gap_is_the_time_of_the_client(url):
    post(url, 'gap', 'x')
    time.sleep(0.2)
    post(url, 'gap', 'x')
    assert 0.2 <= gaps(requests_of(url, 'gap'))[0] < 2

def test_a_slow_answer_is_no_gap(url):
    t0 = time.perf_counter()
    for _ in range(2): post(url, 'sub-300', 'x')
    took = time.perf_counter() - t0
    assert took > 0.6 and gaps(requests_of(url, 'sub-300'))[0] < took - 0.59

def test_reuse_sees_what_changed(url):
    for texts in (['long '*50], ['long '*50, 'more']): post(url, 'same', *texts)
    for texts in (['turn 1', 'x'], ['turn 2', 'x', 'y']): post(url, 'other', *texts)
    assert reuse(requests_of(url, 'same')) == 1
    assert reuse(requests_of(url, 'other')) < 0.8

def test_a_request_in_pieces(url):
    host, port = url.split('/')[2].split(':')
    body = b'{"model": "pieces", "messages": [{"role": "user", "content": "\xc3\xa9"}]}'
    data = b'POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body)
    with socket.create_connection((host, int(port))) as s:
        for i in range(len(data)):
            s.sendall(data[i:i+1])
            time.sleep(0.001)
        assert s.recv(4000).startswith(b'HTTP/1.1 200')
    assert json.loads(requests_of(url, 'pieces')[0][2])['messages'][0]['content'] == 'é'

def test_other_addresses(url):
    with pytest.raises(urllib.error.HTTPError, match='404'): urllib.request.urlopen(f'{url}/model/info')

def test_the_server_ends_with_its_parent():
    p = subprocess.Popen([sys.executable, '-c', 'import time\nfrom rlm.loop_bench import scripted_server\nwith scripted_server() as url:\n    print(url, flush=True)\n    time.sleep(60)'], stdout=subprocess.PIPE, text=True)
    host, port = p.stdout.readline().strip().split('/')[2].split(':')
    p.send_signal(signal.SIGKILL)
    p.communicate()
    for _ in range(100):
        try: socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError: return
        time.sleep(0.1)
    pytest.fail('the server is still there')

# The figures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('repl', ['ipython', 'monty'])
def test_every_request_repeats_the_last(url, repl):
    d = bench_turns(url, repl, 20, 1)
    assert (d['n'], d['repeated']) == (19, 1)
    assert 0 < d['cell'] < d['turn'] and 0 < d['bare']

def test_the_loop_alone_asks_no_server_and_leaves_litellm_as_it_was():
    from rlm.models import _litellm
    real = _litellm().acompletion
    assert 0 < bench_alone('ipython', 10, 2) < 100
    assert _litellm().acompletion is real

def test_batches(url):
    bare, run = bare_batch(url, 60, limit=20), bench_batch(url, 'ipython', 60, '.test', limit=20)
    assert bare > 0.3 and run > 0.3

def test_one_after_the_other_takes_longer(url): assert bench_batch(url, 'ipython', 8, '.slow', limit=1) > 0.8

# The table and the command -------------------------------------------------------------------------------------------
def test_peer_that_is_not_there(url, tmp_path):
    assert bench_peer(url, str(tmp_path/'python'), 3, 5, 1) is None
    assert bench_peer(url, sys.executable, 3, 5, 1) is None

def test_too_few_turns():
    with pytest.raises(ValueError, match='at least 2'): bench_loop(turns=1)

def test_command(tmp_path):
    out = tmp_path/'loop.json'
    cmd = [sys.executable, '-c', 'from rlm.cli import main; raise SystemExit(main())', 'bench', 'loop']
    r = subprocess.run([*cmd, '--turns', '4', '--calls', '30', '--json', out], capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    found = json.loads(out.read_text())
    assert [o['loop'] for o in found['rows']] == ['bare litellm', 'rlm, ipython', 'rlm, monty', 'rlms: not installed', 'to reach']
    assert [o['repeated: %'] for o in found['rows'][1:3]] == [100, 100]
    for part in ('litellm', 'Python', 'cores', '10 runs of 4 turns'): assert part in found['about'] and part in r.stdout
    assert str(LoopTable(found['rows'], found['about'])) == r.stdout.rstrip('\n')
    r = subprocess.run([*cmd, '--turns', '1'], capture_output=True, text=True, timeout=60)
    assert (r.returncode, r.stderr) == (2, 'rlm: --turns must be at least 2\n')
