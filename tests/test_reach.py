"What a name means, and Ollama as this package meets it: against a server that speaks its protocol, scripted, and in front of the bundled model"
import datetime, json, re, subprocess, sys
import pytest
from hypothesis import given, settings, strategies as st
from rlm import usage as U
from rlm.models import chat, on_loop, _litellm
from rlm.reach import *
from rlm.rlm import RLM
from ollama_server import MODELS, Fault, OllamaServer, code, message, same_answer
from scripted_server import ScriptedServer, closed_port, error, message as openai_message

HI = [dict(role='user', content='hi')]
TOOL = [dict(type='function', function=dict(name='f', description='f', parameters=dict(type='object', properties={})))]
KEYS = [v for v, _ in CLOUDS.values()]

@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for k in [*KEYS, 'OLLAMA_HOST', 'OLLAMA_API_KEY', 'OLLAMA_API_BASE']: monkeypatch.delenv(k, raising=False)

def said(r): return r.choices[0].message
def ask(to, **kw): return chat(HI, **{k: v for k, v in to.items() if k not in ('protocol', 'window')}, **kw)
def down(): return f'127.0.0.1:{closed_port()}'

# Names ---------------------------------------------------------------------------------------------------------------
def test_importing_it_is_light():
    code = "import sys, rlm.reach; print([m for m in ('litellm', 'httpx', 'urllib.request', 'rlm.local') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

@pytest.mark.parametrize('name, kind, model, where', [
    (None, 'bundled', None, None), ('', 'bundled', None, None), ('bundled', 'bundled', None, None),
    ('qwen3:4b', 'ollama', 'qwen3:4b', 'http://localhost:11434'), ('glm-5:cloud', 'ollama', 'glm-5:cloud', 'http://localhost:11434'), ('llama3.2', 'ollama', 'llama3.2', 'http://localhost:11434'),
    ('ollama/someone/model:8b', 'ollama', 'someone/model:8b', 'http://localhost:11434'), ('ollama_chat/qwen3', 'ollama', 'qwen3', 'http://localhost:11434'),
    ('hf.co/someone/model-GGUF:Q4_K_M', 'ollama', 'hf.co/someone/model-GGUF:Q4_K_M', 'http://localhost:11434'),
    ('box:11434/qwen3:4b', 'ollama', 'qwen3:4b', 'http://box:11434'), ('https://box/someone/model', 'ollama', 'someone/model', 'https://box'),
    ('openai/gpt-4o-mini', 'litellm', 'openai/gpt-4o-mini', None), ('openrouter/mistralai/mistral-7b-instruct:free', 'litellm', 'openrouter/mistralai/mistral-7b-instruct:free', None)])
def test_a_name_means(name, kind, model, where): assert read_name(name) == (kind, model, where)

def test_a_gateway_and_a_host():
    assert read_name('small', base_url='http://gw/v1') == ('gateway', 'openai/small', 'http://gw/v1')
    assert read_name('openai/small', base_url='http://gw/v1') == ('litellm', 'openai/small', 'http://gw/v1')
    assert read_name('qwen3', host='box', base_url='http://gw/v1') == ('ollama', 'qwen3', 'http://box:11434')
    assert read_name('ollama_chat/qwen3', base_url='http://box:1') == ('ollama', 'qwen3', 'http://box:1')

def test_the_address_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv('OLLAMA_HOST', '0.0.0.0:8080')
    assert host_url() == 'http://127.0.0.1:8080' and read_name('qwen3')[2] == 'http://127.0.0.1:8080' and host_url('box') == 'http://box:11434'

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_typed_error(text):
    try: url = host_url(text)
    except U.GatewayUnreachable: return
    assert url.startswith('http') and host_url(url) == url

def test_an_address_without_a_model_is_refused():
    for kw in (dict(base_url='http://gw/v1'), dict(api_key='k')):
        with pytest.raises(U.ModelNotFound, match='--model'): resolve(**kw)

def test_what_is_not_of_ollama_passes_through():
    assert resolve(temperature=.5) == dict(model=None, temperature=.5)
    assert resolve('groq/x', api_key='k', think='low', num_ctx=9, temperature=0) == dict(model='groq/x', api_key='k', think='low', temperature=0)
    assert RLM(**resolve('groq/x', think=False)).kw['reasoning_effort'] == 'none'

@pytest.mark.parametrize('name', ['/', '//x', 'openai/', 'qwen3:4b/', 'http://box:1/', 'a\nb', 'a\x1b[2Jb', 'x'*301])
def test_no_name_of_a_model(name):
    with pytest.raises(U.ModelNotFound, match='no name of a model') as e: resolve(name)
    assert '\n' not in str(e.value) and '\x1b' not in str(e.value)

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.sampled_from([None, 'box:1']), st.sampled_from([None, 'http://gw/v1']))
def test_any_text_is_a_name_or_a_typed_error(name, host, base_url):
    try: kind, model, url = read_name(name, host, base_url)
    except U.ModelError: return
    assert kind in ('bundled', 'ollama', 'gateway', 'litellm') and (model is None) == (kind == 'bundled')

# What Ollama is asked, and what it is sent ---------------------------------------------------------------------------
def test_host_context_length_temperature_and_thinking_are_sent():
    with OllamaServer('hello', key='k-123456') as s: r = ask(resolve('thinker:4b', s.host, api_key='k-123456', think=True, num_ctx=1234, temperature=.6))
    assert said(r).content == 'hello' and (r.usage.prompt_tokens, r.usage.completion_tokens) == (12, 7)
    body = s.chats[0]
    assert body['model'] == 'thinker:4b' and body['think'] is True and body['options'] == dict(num_ctx=1234, temperature=.6) and body['stream'] is False
    assert s.of('/api/show')[0] == dict(model='thinker:4b')

def test_the_context_length_is_what_the_model_reads_unless_given():
    with OllamaServer() as s:
        get = lambda tag, **kw: [resolve(tag, s.host, **kw).get(k) for k in ('num_ctx', 'window')]
        assert get('thinker:4b') == [40960, 40960] and get('glm-5:cloud') == [NUM_CTX, NUM_CTX]
        assert get('thinker:4b', num_ctx=200_000) == [200_000, 40960] and get('thinker:4b', num_ctx=0) == [None, None]

@pytest.mark.parametrize('tag, think, sent', [('thinker:4b', None, None), ('thinker:4b', True, True), ('thinker:4b', False, False), ('thinker:4b', 'high', True),
    ('gpt-oss:20b', True, 'medium'), ('gpt-oss:20b', False, 'low'), ('gpt-oss:20b', 'high', 'high'), ('plain:135m', True, None), ('smol:135m', False, None), ('old:7b', False, False)])
def test_the_thinking_switch_as_each_model_takes_it(tag, think, sent):
    "Through a run, which passes it on in LiteLLM's words; a model that cannot think is not told to"
    with OllamaServer('FINAL(1)') as s: RLM(**resolve(tag, s.host, think=think), guards=False).completion('one?')
    assert s.chats[0].get('think') == sent

def test_thoughts_come_apart_from_the_answer():
    with OllamaServer(message('yes', thinking='let me see'), message('no', thinking='hidden')) as s:
        m = said(ask(resolve('thinker:4b', s.host, think=True)))
        assert (m.content, m.reasoning_content) == ('yes', 'let me see')
        assert getattr(said(ask(resolve('thinker:4b', s.host, think=False))), 'reasoning_content', None) is None

def test_an_answer_is_streamed():
    async def stream(url):
        parts = [c.choices[0].delta async for c in await _litellm().acompletion(model='ollama_chat/thinker:4b', messages=HI, api_base=url, stream=True)]
        return ''.join(p.content or '' for p in parts), ''.join(getattr(p, 'reasoning_content', None) or '' for p in parts)
    with OllamaServer(message('a rather long answer', thinking='hm')) as s: assert on_loop(stream(s.url), 60) == ('a rather long answer', 'hm')
    assert s.chats[0]['stream'] is True

# Runs ----------------------------------------------------------------------------------------------------------------
def test_a_model_with_tools_gets_the_tool():
    with OllamaServer(code('print(len(context))'), lambda body: f"FINAL({body['messages'][-1]['content'].strip()})") as s:
        r = RLM(**resolve('smol:135m', s.host)).completion('How long is it?', 'abcde')
    first, second = s.chats
    assert r.answer == '5' and first['tools'][0]['function']['name'] == 'run_repl'
    assert [m['role'] for m in second['messages'][-2:]] == ['assistant', 'tool']
    assert second['messages'][-2]['tool_calls'][0]['function']['arguments'] == dict(python_code='print(len(context))')

@pytest.mark.parametrize('tag', ['plain:135m', 'old:7b'])
def test_a_model_without_tools_gets_the_fenced_protocol(tag):
    "Known beforehand, or, of a server too old to tell, learned from its refusal"
    with OllamaServer('```repl\nprint(len(context))\n```', 'FINAL(5)') as s:
        r = RLM(**resolve(tag, s.host)).completion('How long is it?', 'abcde')
    assert r.answer == '5' and ['tools' in b for b in s.chats] == ([False]*2 if tag == 'plain:135m' else [True, False, False])
    assert '```repl' in s.chats[-1]['messages'][0]['content']

@pytest.mark.slow
def test_the_bundled_model_behind_ollama_finds_the_needle():
    from rlm.local import local_model
    from rlm.benchmarks import make_haystack
    task = make_haystack(2000, 3)
    with OllamaServer(backend=local_model()) as s: r = RLM(**resolve('smol:135m', s.host)).completion(task.question, task.context)
    assert r.answer == task.answers[0] and r.usage.total_tokens > 100 and len(s.chats) == r.usage.calls

# Faults --------------------------------------------------------------------------------------------------------------
def faulty(tag, s=None, **kw):
    "The error of a call that goes straight to the model, as it does when a server changes after `resolve`"
    with pytest.raises(U.ModelError) as e: chat(HI, f'ollama_chat/{tag}', s.url if s else f'http://{down()}', num_retries=0, **kw)
    return e.value

def test_a_missing_model_says_pull():
    with OllamaServer() as s:
        with pytest.raises(U.ModelNotFound, match="model 'nope:1b' not found.*`ollama pull nope:1b`") as e: resolve('nope:1b', s.host)
        late = faulty('nope:1b', s)
    assert e.value.status == 404 and type(late) is U.ModelNotFound and '`ollama pull nope:1b`' in str(late) and '{' not in str(late)

def test_a_server_that_does_not_run_offers_the_bundled_model():
    with pytest.raises(U.GatewayUnreachable) as e: resolve('qwen3:4b', down())
    late = faulty('qwen3:4b')
    for x in (e.value, late): assert type(x) is U.GatewayUnreachable and '`ollama serve`' in str(x) and 'bundled' in str(x) and '127.0.0.1' in str(x)

def test_a_cloud_model_without_an_account_says_signin():
    with OllamaServer(signed_in=False) as s:
        to = resolve('glm-5:cloud', s.host)
        e = faulty('glm-5:cloud', s)
        with pytest.raises(U.AuthError, match='`ollama signin`'): RLM(**to).completion('hi?')
    assert type(e) is U.AuthError and '`ollama signin`' in str(e) and 'connect?name' not in str(e)

def test_a_key_is_sent_and_a_wrong_one_is_not_shown(monkeypatch):
    with OllamaServer('hello', key='right-key-123') as s:
        with pytest.raises(U.AuthError, match='signin') as e: resolve('smol:135m', s.host, api_key='wrong-key-123')
        assert 'wrong-key' not in str(e.value)
        monkeypatch.setenv('OLLAMA_API_KEY', 'right-key-123')
        assert said(ask(resolve('smol:135m', s.host))).content == 'hello'

@pytest.mark.parametrize('fault, kw, cls, says', [
    (None, dict(think=True), U.BadRequest, 'does not support thinking.*--think'), (None, dict(tools=TOOL), U.BadRequest, 'does not support tools'),
    (Fault(500, 'model requires more system memory (5.6 GiB) than is available (2.1 GiB)'), {}, U.ProviderError, '--num-ctx'),
    (Fault(500, 'llama runner process has terminated: exit status 2'), {}, U.ProviderError, '--num-ctx'), (Fault(500, 'something else'), {}, U.ProviderError, 'Try again'),
    (Fault(503, 'server busy, please try again.  maximum pending requests exceeded'), {}, U.ProviderError, 'server busy')])
def test_other_faults(fault, kw, cls, says):
    with OllamaServer(fault) as s: e = faulty('plain:135m', s, **kw)
    assert type(e) is cls and re.search(says, str(e))

def test_a_fault_that_passes_is_retried():
    with OllamaServer(Fault(503, 'server busy'), 'hello') as s: assert said(chat(HI, 'ollama_chat/smol:135m', s.url, num_retries=1)).content == 'hello'

def test_another_server_at_the_address():
    with ScriptedServer() as s, pytest.raises(U.ProviderError): resolve('qwen3', s.url)
    with OllamaServer() as s, pytest.raises(U.ProviderError, match='is an Ollama server'): ask_ollama('nothing', s.host)

odd = ['[]', 'null', '5', '', '{"models": 5}', '{"models": [{}, null, {"name": 5}]}', '{"data": [{}]}', '{"details": [], "model_info": 5, "capabilities": "tools", "thinking": [], "remote_host": 1}',
    '{"model_info": {"a.context_length": "x", "b.context_length": -5}, "capabilities": 5, "thinking": {"values": 1}}', '['*100_000, '<html>', '{"error": null}']

@pytest.mark.parametrize('text', odd, ids=range(len(odd)))
@pytest.mark.parametrize('status', [200, 404, 500])
def test_answers_of_any_shape(text, status):
    "Each is understood, or a fault of the place that gave it, in a line"
    with same_answer(status, text) as (host, _):
        try: assert resolve('m:1b', host)['num_ctx'] == NUM_CTX
        except U.ModelError as e: assert '\n' not in str(e) and host in str(e) and len(str(e)) < 500
        rows = reachable(host, f'http://{host}/v1')
    assert [r['provider'] for r in rows[1:]] == ['ollama', 'gateway'] and all(r['error'] and '\n' not in r['error'] for r in rows[1:])

def test_faults_of_others_are_not_ollamas():
    with ScriptedServer(error(404, "model 'x' not found")) as s, pytest.raises(U.ModelNotFound) as e: chat(HI, 'openai/x', s.url, 'k')
    assert 'ollama' not in str(e.value)

# Clouds --------------------------------------------------------------------------------------------------------------
def test_clouds_are_found_by_their_key(monkeypatch):
    assert clouds() == []
    for k in ('GROQ_API_KEY', 'ANTHROPIC_API_KEY'): monkeypatch.setenv(k, 'x')
    assert clouds() == ['anthropic/claude-haiku-5-5', 'groq/openai/gpt-oss-20b']

def test_a_cloud_is_named_as_on_the_command_line():
    assert [cloud_name(o) for o in ('openai', 'fireworks', 'openai:gpt-5-mini', 'mistral:small', 'openai/x', 'openrouter:a/b:free')] == ['openai/gpt-4o-mini',
        'fireworks_ai/accounts/fireworks/models/llama-v3p1-8b-instruct', 'openai/gpt-5-mini', 'mistral/small', 'openai/x', 'openrouter/a/b:free']
    for bad in ('', 'nobody', 'nobody:'):
        with pytest.raises(U.ModelNotFound, match='PROVIDER:MODEL'): cloud_name(bad)

def test_default_models_are_in_litellms_list():
    "OpenRouter's are in no release's list; a retirement that the list knows has to be answered here"
    known = _litellm().model_cost
    for provider, (variable, model) in CLOUDS.items():
        if provider == 'openrouter': continue
        o = known.get(f'{provider}/{model}') or known.get(model)
        assert o and o['litellm_provider'] == provider, model
        assert o.get('deprecation_date', '9999') > datetime.date(2026, 11, 21).isoformat(), model

@pytest.mark.parametrize('provider', [k for k in CLOUDS if k != 'anthropic'])
def test_litellm_reads_the_key_from_that_variable(provider, monkeypatch):
    "The server refuses every other key"
    monkeypatch.setenv(CLOUDS[provider][0], 'key-of-the-cloud')
    with ScriptedServer(openai_message('hello') | dict(service_tier='x'), key='key-of-the-cloud') as s:
        assert said(chat(HI, f'{provider}/{CLOUDS[provider][1]}', s.url, num_retries=0)).content == 'hello'

def test_litellm_reads_the_key_of_anthropic_from_that_variable(monkeypatch):
    "Which speaks a protocol of its own"
    monkeypatch.setenv(CLOUDS['anthropic'][0], 'key-of-the-cloud')
    answer = dict(id='m', type='message', role='assistant', model='x', content=[dict(type='text', text='hello')], stop_reason='end_turn', usage=dict(input_tokens=5, output_tokens=2))
    with same_answer(200, json.dumps(answer)) as (host, heard): r = chat(HI, f"anthropic/{CLOUDS['anthropic'][1]}", f'http://{host}', num_retries=0)
    assert said(r).content == 'hello' and {k.lower(): v for k, v in heard[0].items()}['x-api-key'] == 'key-of-the-cloud'

# What is reachable ---------------------------------------------------------------------------------------------------
def test_everything_that_is_reachable(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret')
    with OllamaServer() as s, ScriptedServer() as g:
        rows = reachable(s.host, g.url, 'k')
    assert [r['name'] for r in rows if r['provider'] == 'ollama'] == list(MODELS)
    assert [r['name'] for r in rows if r['provider'] == 'openai'] == ['openai/gpt-4o-mini']
    assert rows[0]['provider'] == 'bundled' and next(r for r in rows if r['name'] == 'glm-5:cloud')['note'] == "in Ollama's cloud"
    assert 'secret' not in str(rows) and json.loads(json.dumps(rows.as_dict))['models'] == list(rows)
    assert rows._repr_markdown_().count('\n') == len(rows) + 1

def test_names_of_a_server_cannot_move_the_cursor():
    with same_answer(200, json.dumps(dict(models=[dict(name='a\x1b[2J\nb|c:1b')], data=[dict(id='x\x1b]0;t\x07\ny')]))) as (host, _): rows = reachable(host, f'http://{host}/v1')
    assert rows[1]['name'] == 'a\x1b[2J\nb|c:1b'
    for text in (str(rows), rows._repr_markdown_()): assert '\x1b' not in text and '\x07' not in text and len(text.splitlines()) in (3, 5)

def test_a_gateways_list():
    "The bundled model's own server is a gateway with a list and a key"
    from rlm.local import local_model
    to = local_model()
    last = lambda **kw: reachable(down(), **kw)[-1]
    assert last(base_url=to['base_url'], api_key=to['api_key'])['name'] == to['model']
    bad = last(base_url=to['base_url'], api_key='wrong-key-here')
    assert bad['name'] is None and '401' in bad['error'] and '--api-key' in bad['error'] and 'wrong-key' not in bad['error']
    assert '--base-url' in last(base_url=f"{to['base_url']}/nothing", api_key=to['api_key'])['error']
    assert 'does not answer' in last(base_url=f'http://{down()}/v1')['error']

def test_places_that_do_not_answer_do_not_hide_the_others():
    rows = reachable(down(), 'no address at all')
    assert rows[0]['provider'] == 'bundled' and '`ollama serve`' in rows[1]['error'] and rows[-1]['provider'] == 'gateway' and rows[-1]['error']
    with OllamaServer(models={}) as s: assert 'ollama pull' in reachable(s.host)[1]['error']
    assert 'no address' in reachable('a b:c')[1]['error']
