"The door to LiteLLM against a real HTTP server: retries, limits, typed errors, secrets, the ledger"
import subprocess, sys, time, traceback
from concurrent.futures import ThreadPoolExecutor
import pytest
from rlm.models import chat, ScriptedModel, repl_call
from rlm import usage as U
from rlm.usage import Usage
from scripted_server import ScriptedServer, Reply, message, usage, error, hang, torn, closed_port

KEY = 'sk-secret-0123456789'
HI = [dict(role='user', content='hi')]

def ask(s, model='openai/small', **kw): return chat(HI, model, s.url, kw.pop('api_key', KEY), **kw)
def said(r): return r.choices[0].message.content

def fails(exc, *replies, match=None, key=None, **kw):
    "The error, and how many requests it took"
    with ScriptedServer(*replies, key=key) as s, pytest.raises(exc, match=match) as e: ask(s, **kw)
    assert type(e.value) is exc
    return e.value, len(s.raw)

def test_importing_the_package_does_not_import_litellm():
    code = "import sys, rlm.core, rlm.tools, rlm.models; print([m for m in ('litellm', 'openai', 'IPython', 'httpx') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

def test_what_is_sent():
    with ScriptedServer('hello') as s: r = ask(s, temperature=0, top_p=0.5, extra_body=dict(min_p=0.1), tools=[dict(type='function', function=dict(name='f', parameters={}))])
    assert said(r) == 'hello' and s.paths == ['/v1/chat/completions']
    body = s.requests[0]
    assert body['messages'] == HI and body['model'] == 'small' and (body['temperature'], body['top_p'], body['min_p']) == (0, 0.5, 0.1)
    assert body['tools'][0]['function']['name'] == 'f'
    assert not {'num_retries', 'timeout', 'metadata', 'usage'} & set(body)

def test_names_with_slashes_reach_the_gateway():
    with ScriptedServer('hello') as s: ask(s, 'openai/openai/gpt-oss-120b')
    assert s.requests[0]['model'] == 'openai/gpt-oss-120b'

def test_the_key_is_used():
    with ScriptedServer('hello', key=KEY) as s: assert said(ask(s)) == 'hello'

@pytest.mark.parametrize('fault', [error(429, 'slow down'), error(500, 'boom'), error(503, 'busy'), torn(), Reply(b'', 502)], ids=['429', '500', '503', 'torn', '502'])
def test_a_fault_that_passes_is_retried(fault):
    led = Usage()
    with ScriptedServer(fault, 'hello') as s: assert said(ask(s, num_retries=1, usage=led)) == 'hello'
    assert len(s.raw) == 2 and s.raw[0] == s.raw[1] and led.calls == 1

def test_retry_after_is_honoured():
    with ScriptedServer(error(429, 'slow down', headers={'Retry-After': '1'}), 'hello') as s:
        t0 = time.perf_counter()
        assert said(ask(s, num_retries=1)) == 'hello'
    assert time.perf_counter() - t0 >= 1

def test_retries_end():
    led = Usage()
    e, n = fails(U.ProviderError, *[error(500, 'boom')]*9, match='boom', num_retries=1, usage=led)
    assert n == 2 and e.status == 500 and led == Usage()
    assert fails(U.RateLimited, *[error(429, 'slow down')]*9, num_retries=0)[1] == 1

def test_other_providers_are_retried_too():
    ok = dict(id='m', type='message', role='assistant', model='claude-haiku-4-5', content=[dict(type='text', text='hello')],
        stop_reason='end_turn', usage=dict(input_tokens=6, output_tokens=3, cache_read_input_tokens=4, cache_creation_input_tokens=0))
    led = Usage()
    with ScriptedServer(error(429, 'slow down'), ok) as s:
        r = chat(HI, 'anthropic/claude-haiku-4-5', s.url[:-3], KEY, num_retries=1, usage=led)
    assert said(r) == 'hello' and len(s.raw) == 2
    assert (led.prompt_tokens, led.cached_tokens, led.unpriced) == (10, 4, 0) and led.cost > 0

def test_a_hang_ends():
    t0 = time.perf_counter()
    fails(U.ModelTimeout, hang(20), match='timeout=', timeout=0.5, num_retries=0)
    assert time.perf_counter() - t0 < 5

def test_a_hang_is_retried():
    with ScriptedServer(hang(20), 'hello') as s: assert said(ask(s, timeout=0.5, num_retries=1)) == 'hello'

@pytest.mark.parametrize('base_url', [f'http://127.0.0.1:{closed_port()}/v1', 'http://no-such-host.invalid/v1'])
def test_unreachable_gateway(base_url):
    with pytest.raises(U.GatewayUnreachable, match='base_url=') as e: chat(HI, 'openai/small', base_url, KEY, num_retries=0)
    assert base_url in str(e.value)

@pytest.mark.parametrize('exc,reply,match', [
    (U.AuthError, error(401, 'Incorrect API key'), 'api_key='),
    (U.AuthError, error(400, 'No connected db.', 'no_db_connection'), 'api_key='),
    (U.ModelNotFound, error(404, 'The model `small` does not exist', 'model_not_found'), 'model='),
    (U.ModelNotFound, error(400, '/chat/completions: Invalid model name passed in model=small. Call `/v1/models` to view available models'), 'model='),
    (U.ModelNotFound, Reply(b'<html>Not Found</html>', 404), 'base_url='),
    (U.ContextWindowExceeded, error(400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", 'context_length_exceeded'), 'max_output'),
    (U.ContextWindowExceeded, error(400, 'the request exceeds the available context size (8192 tokens), try increasing it'), 'window'),
    (U.BadRequest, error(400, 'temperature must be at most 2'), 'temperature must be'),
    (U.BadRequest, error(422, 'no such field'), 'no such field')])
def test_what_cannot_succeed_is_not_retried(exc, reply, match):
    assert fails(exc, reply, reply, match=match, num_retries=2)[1] == 1

@pytest.mark.parametrize('exc,reply', [(U.AuthError, error(403, 'not for you')), (U.ProviderError, Reply(b'<html>hello</html>')),
    (U.ProviderError, Reply(dict(object='chat.completion'))), (U.ProviderError, Reply(message('x') | dict(choices=[])))], ids=['403', 'html', 'no choices', 'empty choices'])
def test_other_failures(exc, reply): fails(exc, reply, num_retries=0)

def test_a_name_without_a_provider():
    with pytest.raises(U.ModelNotFound, match='openai/'): chat(HI, 'small', 'http://127.0.0.1:1/v1', KEY)

def test_no_key(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(U.AuthError, match='api_key='): chat(HI, 'openai/small', num_retries=0)

def test_the_key_is_never_shown(capfd):
    secret, header = 'kk-very-secret-42', 'header-secret-1'
    with ScriptedServer(key='another') as s:
        try: ask(s, api_key=secret, extra_headers={'X-Token': header}, num_retries=0)
        except U.AuthError as e: text = str(e) + repr(e) + ''.join(traceback.format_exception(type(e), e, e.__traceback__)) + repr(e.__cause__) + repr(e.__context__)
    assert 'Incorrect API key provided' in text
    for o in (secret, header): assert o not in text
    out, err = capfd.readouterr()
    assert out == err == ''

def test_nothing_is_printed(capfd):
    with ScriptedServer(error(500, 'boom'), message(None, [('f', None)]), message('x', use={}), 'hello') as s:
        for _ in range(3): ask(s, num_retries=1)
    fails(U.ProviderError, error(500, 'boom'), num_retries=0)
    assert capfd.readouterr() == ('', '')

def test_usage_is_read():
    led = Usage()
    with ScriptedServer(message('a', use=usage(100, 20, cached=64, reasoning=8)), message('b', use=usage(10, 2))) as s:
        for _ in range(2): ask(s, usage=led)
    assert led == Usage(calls=2, prompt_tokens=110, completion_tokens=22, cached_tokens=64, reasoning_tokens=8, cost=0., unpriced=2)

def test_cost_of_a_known_model_and_of_a_gateway_that_tells():
    led, told = Usage(), Usage()
    with ScriptedServer(message('a', use=usage(1000, 100)), Reply(message('b'), headers={'x-litellm-response-cost': '0.25'})) as s:
        ask(s, 'openai/gpt-4o-mini', usage=led)
        ask(s, usage=told)
    assert led.unpriced == 0 and led.cost == pytest.approx(1000*0.15e-6 + 100*0.6e-6)
    assert (told.cost, told.unpriced) == (0.25, 0)

def test_many_threads_one_ledger():
    led = Usage()
    with ScriptedServer(lambda body: Reply(message('a'), delay=0.05)) as s, ThreadPoolExecutor(10) as pool: list(pool.map(lambda _: ask(s, usage=led), range(40)))
    assert (led.calls, led.prompt_tokens) == (40, 400)

def test_many_gateways_leave_no_hooks(capfd):
    import litellm
    with ScriptedServer(lambda body: message('a')) as s:
        for i in range(120): ask(s, f'openai/model-{i}', num_retries=0)
    hooks = litellm.success_callback + litellm.failure_callback + litellm._async_success_callback
    assert not [o for o in hooks if 'Router' in type(getattr(o, '__self__', None)).__name__] and capfd.readouterr() == ('', '')

def test_half_a_surrogate_pair_is_replaced():
    with ScriptedServer('a') as s: chat([dict(role='user', content='x\ud83dy')], 'openai/small', s.url, KEY)
    assert s.messages[0][0]['content'] == 'x?y'

def test_base_url_without_model():
    with pytest.raises(U.ModelNotFound, match='no model='): chat(HI, base_url='http://localhost:4000')

def test_scripted_model_from_threads():
    m, led = ScriptedModel(default=lambda msgs: msgs[-1]['content'].upper()), Usage()
    with ThreadPoolExecutor(8) as pool: res = list(pool.map(lambda i: said(chat([dict(role='user', content=f'q{i}')], m, usage=led)), range(50)))
    assert res == [f'Q{i}' for i in range(50)] and led.calls == len(m.sent) == 50
