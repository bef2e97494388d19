"The quick start against a real LiteLLM gateway that routes to the bundled model, and what users get wrong there"
import json, os, re, secrets, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
import pytest
from rlm.core import advanced_toolloop
from rlm.local import MODEL, LocalServer
from rlm.models import ScriptedModel, chat, repl_call
from rlm.repl import as_repl
from rlm.rlm import RLM
from rlm.tools import prep_shell
from rlm.usage import AuthError, GatewayUnreachable, ModelError, ModelNotFound, Usage

pytest.importorskip('fastapi', reason="the gateway is not installed: pip install 'rlm[proxy]'")
CONFIG = Path(__file__).parent.parent/'examples'/'gateway'/'config.yaml'
LINES = [f'{i} rain over hill and river' for i in range(100_000)]
LINES[31_415] = 'The magic number is 1298418.'

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

class Gateway:
    "A LiteLLM proxy with the example's configuration"
    def __init__(self, model, log):
        self.port, self.key, self.log = free_port(), 'sk-' + secrets.token_urlsafe(24), log
        env = os.environ | dict(LITELLM_MASTER_KEY=self.key, RLM_LOCAL_URL=model.url, RLM_LOCAL_KEY=model.key, LITELLM_LOCAL_MODEL_COST_MAP='True')
        command = Path(sys.executable).parent/'litellm'
        with open(log, 'w') as f: self.proc = subprocess.Popen([command, '--config', CONFIG, '--host', '127.0.0.1', '--port', str(self.port)], stdout=f, stderr=f, env=env, start_new_session=True)
    @property
    def url(self): return f'http://127.0.0.1:{self.port}'
    def up(self):
        try: return urllib.request.urlopen(f'{self.url}/health/liveliness', timeout=5).status == 200
        except (urllib.error.URLError, OSError): return False
    def __enter__(self):
        end = time.time() + 180
        while not self.up():
            if self.proc.poll() is not None or time.time() > end:
                self.stop()
                pytest.fail(f'the gateway did not start:\n{self.log.read_text()[-3000:]}')
            time.sleep(.3)
        return self
    def stop(self):
        if self.proc.poll() is None: os.killpg(self.proc.pid, signal.SIGKILL)
        self.proc.wait()
    def __exit__(self, *args): self.stop()

@pytest.fixture(scope='module')
def model():
    with LocalServer() as s: yield s

@pytest.fixture(scope='module')
def gateway(model, tmp_path_factory):
    with Gateway(model, tmp_path_factory.mktemp('gateway')/'log') as g: yield g

@pytest.fixture(scope='module')
def sh():
    s = prep_shell('\n'.join(LINES))
    yield s
    as_repl(s).close()

QUICK_START = '''
from rlm.tools import prep_shell, make_run_repl
from rlm.core import advanced_toolloop
from rlm.prompts import REPL_SYSTEM_PROMPT

sh = prep_shell(context, model="openai/openai/gpt-oss-120b", base_url="https://your-litellm-gateway.com")
run_repl = make_run_repl(sh, max_output=5000, timeout=60)
responses = advanced_toolloop(query, sp=REPL_SYSTEM_PROMPT, tools=[run_repl], sh=sh, max_steps=50, final_prompt=None, verbose=True,
    model="openai/openai/gpt-oss-120b", base_url="https://your-litellm-gateway.com")
for item in responses:
    if isinstance(item, dict) and item.get("type") == "final": print(item["answer"])
'''

def test_the_quick_start(gateway, tmp_path):
    "As users know it, but for the model and the address; the key comes from the environment"
    code = QUICK_START.replace('openai/openai/gpt-oss-120b', f'openai/{MODEL}').replace('https://your-litellm-gateway.com', gateway.url)
    (tmp_path/'context.txt').write_text('\n'.join(LINES))
    (tmp_path/'quick.py').write_text("context, query = open('context.txt').read(), 'What is the magic number?'\n" + code)
    r = subprocess.run([sys.executable, 'quick.py'], cwd=tmp_path, env=os.environ | dict(OPENAI_API_KEY=gateway.key), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    *shown, answer = r.stdout.strip().split('\n')
    assert answer.rstrip('.') == '1298418'
    assert any(l.startswith('>>> ') for l in shown) and any(re.match(r'--- [\d,]+ tokens in', l) for l in shown)

def test_the_quick_start_is_the_readmes():
    index = (CONFIG.parent.parent.parent/'README.md').read_text(encoding='utf-8')
    assert QUICK_START.strip() in index

def run(gateway, sh, **kw):
    return advanced_toolloop('What is the magic number?', sh=sh, **dict(model=f'openai/{MODEL}', base_url=gateway.url, api_key=gateway.key, num_retries=0, max_steps=8) | kw)

def test_usage_comes_through_the_gateway(gateway, sh):
    *items, end = run(gateway, sh)
    assert end['stop_reason'] == 'final' and end['steps'] >= 2
    assert end['usage'].calls == sum(not isinstance(i, dict) for i in items)
    assert end['usage'].prompt_tokens > 100 and end['usage'].completion_tokens > 20 and end['usage'].cached_tokens > 50

def test_a_stream_through_the_gateway(gateway):
    import openai
    client = openai.OpenAI(base_url=gateway.url, api_key=gateway.key, max_retries=0)
    said = [c.choices[0].delta.content or '' for c in client.chat.completions.create(model=MODEL, messages=[dict(role='user', content='What is the capital of France?')], stream=True, temperature=0, max_tokens=20)]
    assert 'Paris' in ''.join(said) and len([s for s in said if s]) > 3

def test_a_wrong_key(gateway, sh):
    with pytest.raises(AuthError, match='api_key='): list(run(gateway, sh, api_key='sk-wrong-0123456789'))

def test_an_unknown_model(gateway, sh):
    with pytest.raises(ModelNotFound, match='model='): list(run(gateway, sh, model='openai/gpt-unheard-of'))

def test_a_gateway_that_stops_in_mid_run(model, sh, tmp_path):
    with Gateway(model, tmp_path/'log') as g:
        items = run(g, sh)
        first = next(items)
        assert first.choices[0].message.tool_calls
        g.stop()
        t0 = time.time()
        with pytest.raises(GatewayUnreachable, match=re.escape(g.url)): list(items)
        assert time.time() - t0 < 60

def test_a_gateway_whose_model_is_gone(sh, tmp_path):
    with LocalServer() as gone, Gateway(gone, tmp_path/'log') as g:
        gone.stop()
        with pytest.raises(ModelError, match='base_url=|Try again'): list(run(g, sh))


# RLM over the gateway -------------------------------------------------------------------------------------------------
def rlm(gateway, model=f'openai/{MODEL}', **kw): return RLM(model, **dict(base_url=gateway.url, api_key=gateway.key, num_retries=0, max_iterations=8) | kw)

@pytest.mark.slow
def test_rlm(gateway):
    seen = []
    for e in rlm(gateway).stream('What is the magic number?', '\n'.join(LINES)): seen.append(e)
    res = seen[-1]
    assert res.answer.rstrip('.') == '1298418' and res.stop_reason == 'final' and [e['type'] for e in seen[:2]] == ['run', 'request']
    assert res.usage.calls == len(res.trace.of('reply')) == res.iterations >= 2 and res.usage.prompt_tokens > 100 and res.usage.cached_tokens > 50
    assert list(res.usage.by_model) == [f'openai/{MODEL}'] and gateway.key not in json.dumps(res.trace.events)

def test_rlm_with_a_wrong_key(gateway):
    with pytest.raises(AuthError, match='api_key=') as e: rlm(gateway, api_key='sk-wrong-0123456789').completion('What is the magic number?', 'It is 7.')
    assert [o['type'] for o in e.value.trace] == ['run', 'request', 'failed', 'error'] and 'sk-wrong' not in json.dumps(e.value.trace.events)

def test_rlm_with_an_unknown_model(gateway):
    with pytest.raises(ModelNotFound, match='model=') as e: rlm(gateway, 'openai/gpt-unheard-of').completion('What is the magic number?', 'It is 7.')
    assert e.value.trace.of('failed')[0]['error'] == 'ModelNotFound'

@pytest.mark.slow
def test_a_batch_of_sub_calls_through_the_gateway(gateway):
    cell = """r = llm_query_batched([f'What is the capital of {o}?' for o in ('France', 'Japan', 'Spain')])\none = llm_query('What is the capital of Germany?')"""
    res = rlm(gateway, ScriptedModel(repl_call(cell), 'FINAL_VAR(r)'), recursive_model=f'openai/{MODEL}', max_concurrency=2, max_tokens=12, temperature=0).completion('Q')
    assert len(res.value) == 3 and 'Tokyo' in res.value[1]
    assert res.usage.by_depth[1].calls == 4 and res.usage.by_model[f'openai/{MODEL}'].completion_tokens > 5 and res.trace.of('batch')[-1]['done'] == 3

def test_a_streamed_call_through_the_gateway_is_a_whole_answer_with_its_tokens(gateway):
    ledger = Usage()
    r = chat([dict(role='user', content='What is the capital of France?')], f'openai/{MODEL}', gateway.url, gateway.key, usage=ledger, stream=True, max_tokens=12, temperature=0)
    assert 'Paris' in r.choices[0].message.content and r.choices[0].finish_reason == 'stop' and ledger.prompt_tokens > 10 and ledger.completion_tokens > 3
    with pytest.raises(AuthError): chat([dict(role='user', content='Q')], f'openai/{MODEL}', gateway.url, 'sk-wrong-0123456789', stream=True)

@pytest.mark.slow
def test_rlm_when_the_gateway_stops_in_mid_run_and_goes_on_at_another(gateway, model, tmp_path):
    "What the first gateway answered is not asked of the second"
    path, text, q = tmp_path/'run.jsonl', '\n'.join(LINES), 'What is the magic number?'
    with Gateway(model, tmp_path/'log') as g, rlm(g, checkpoint=path).session(text) as s:
        s.trace.listeners.append(lambda e: g.stop() if e['type'] == 'reply' else None)
        with pytest.raises(GatewayUnreachable, match=re.escape(g.url)) as e: s.completion(q)
    assert len(e.value.trace.of('reply')) == len(e.value.trace.of('cell')) == len(e.value.trace.of('failed')) == 1
    res = rlm(gateway, checkpoint=path).completion(q, text)
    assert res.answer.rstrip('.') == '1298418' and len(res.trace.of('reply')) == res.usage.calls == len({e['key'] for e in res.trace.of('reply')})
    again = rlm(g, checkpoint=path).completion(q, text)
    assert (again.answer, again.usage.calls) == (res.answer, res.usage.calls)
