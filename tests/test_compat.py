"The names that people know, against a real server: RLM_REPL, Sub_RLM, CloudClient"
import json
import pytest
from rlm import RLM, Budget, RLMError
from rlm.cloud_client import CLOUDS, CloudClient
from rlm.models import ScriptedModel, repl_call
from rlm.rlm_repl import RLM_REPL, Sub_RLM
from rlm.usage import AuthError, RateLimited
from scripted_server import Reply, ScriptedServer, code, error, message, usage

to = lambda server: dict(base_url=server.url, api_key='some-key')
batch = "FINAL(' '.join(llm_query_batched(['a', 'b', 'c'])) + context[:0])"

# RLM_REPL ------------------------------------------------------------------------------------------------------------
def by_model(body): return code(batch) if body['model'] == 'big' else message(body['messages'][-1]['content'].upper(), use=usage(7, 1), model='small')

def test_root_and_sub_model():
    with ScriptedServer(by_model) as server:
        rlm = RLM_REPL('openai/big', 'openai/small', **to(server))
        assert rlm.completion(query='Shout.', context='text') == 'A B C'
        assert rlm.completion('text', 'Shout.') == 'A B C'
    costs = rlm.cost_summary()
    assert [r['model'] for r in server.requests].count('small') == 6
    assert (costs['calls'], costs['root']['calls'], costs['sub']['calls']) == (8, 2, 6)
    assert (costs['sub']['prompt_tokens'], costs['total_tokens']) == (42, 2*15 + 6*8)
    rlm.reset()
    assert (rlm.cost_summary()['total_tokens'], rlm.cost_summary()['sub']['calls']) == (0, 0)

def test_same_model_for_both():
    with ScriptedServer(lambda body: code(batch) if 'tools' in body else 'x') as server: assert RLM_REPL('openai/one', **to(server)).completion('t', 'q') == 'x x x'
    assert {r['model'] for r in server.requests} == {'one'}

def test_question_in_the_context():
    model = ScriptedModel(repl_call('FINAL(context)'))
    assert RLM_REPL(model).completion(['How', 'are', 'you?']) == "['How', 'are', 'you?']"
    assert '`context`' in model.sent[0]['messages'][1]['content']

def test_keywords_reach_both():
    with ScriptedServer(by_model) as server: RLM_REPL('openai/big', 'openai/small', temperature=0.5, repl='process', **to(server)).completion('t', 'q')
    assert [r['temperature'] for r in server.requests] == [0.5]*4
    assert not any('repl' in r for r in server.requests)

def test_max_iterations():
    model = ScriptedModel(*[repl_call(f'print(context, {i})') for i in range(3)], 'FINAL(tired)')
    rlm = RLM_REPL(model, max_iterations=3)
    assert (rlm.completion('t', 'q'), rlm.result.stop_reason) == ('tired', 'iterations')

def test_logging(capsys):
    RLM_REPL(ScriptedModel(repl_call('print(len(context))'), 'FINAL(4)'), enable_logging=True).completion('text', 'How long?')
    said = capsys.readouterr().out
    for part in 'How long?', '> print(len(context))', '< 4', 'FINAL(4)': assert part in said
    RLM_REPL(ScriptedModel('FINAL(4)')).completion(query='How long?')
    assert capsys.readouterr().out == ''

def test_failed_calls_are_tried_again_by_the_run_alone():
    with ScriptedServer(*[error(503, 'busy')]*2, 'ok') as server:
        assert RLM_REPL(ScriptedModel(repl_call("FINAL(llm_query('x') + context[:0])")), sub=Sub_RLM('openai/small', **to(server))).completion('t', 'q') == 'ok'
    assert len(server.requests) == 3
    with ScriptedServer(lambda body: error(503, 'busy')) as server:
        rlm = RLM_REPL(ScriptedModel(repl_call("print(llm_query_batched(['x'])[0], context)"), 'FINAL(done)'), sub=Sub_RLM('openai/small', **to(server)))
        assert rlm.completion('t', 'q') == 'done'
    assert len(server.requests) == 3
    assert 'ERROR: ProviderError' in [m['content'] for m in rlm.result.messages if m['role'] == 'tool'][0]

def test_cost_of_a_run_that_failed():
    with ScriptedServer(code('print(context)'), error(401, 'Incorrect API key')) as server:
        rlm = RLM_REPL('openai/big', **to(server))
        with pytest.raises(AuthError) as e: rlm.completion('t', 'q')
    assert rlm.cost_summary()['calls'] == 1 and len(e.value.trace.of('reply')) == 1

def test_budget_counts_sub_calls():
    with ScriptedServer(lambda body: message('x', use=usage(400, 100))) as server:
        model = ScriptedModel(repl_call("for i in range(50): llm_query(str(i))\nprint(context)"), default='FINAL(closed)')
        rlm = RLM_REPL(model, 'openai/small', budget=Budget(tokens=8000), **to(server))
        assert rlm.completion('t', 'q') == 'closed'
    assert rlm.cost_summary()['total_tokens'] <= 8000 and 2 <= len(server.requests) < 16

def test_deeper():
    below = ScriptedModel(default=repl_call("n = 6*7\nFINAL(str(n) + llm_query('!'))"))
    rlm = RLM_REPL(ScriptedModel(repl_call("FINAL(', '.join(llm_query_batched(['one', 'two'])))")), sub=RLM_REPL(below, ScriptedModel(default='!')))
    assert rlm.completion(query='Twice.') == '42!, 42!'
    costs = rlm.cost_summary()
    assert (costs['calls'], costs['root']['calls'], costs['sub']['root']['calls'], costs['sub']['sub']['calls']) == (5, 1, 2, 2)
    assert rlm.result.usage.total_tokens == costs['total_tokens']

def test_depth_is_refused():
    with pytest.raises(ValueError, match='sub=RLM_REPL'): RLM_REPL('openai/big', depth=2)

# CloudClient ---------------------------------------------------------------------------------------------------------
CLAUDE = dict(id='m', type='message', role='assistant', model='claude', stop_reason='end_turn', content=[dict(type='text', text='hello')], usage=dict(input_tokens=10, output_tokens=5))
def hello(provider): return Reply(CLAUDE) if provider == 'anthropic' else message('hello') | dict(service_tier='on_demand')

@pytest.mark.parametrize('provider', CLOUDS)
def test_each_provider(provider, monkeypatch):
    monkeypatch.setenv(CLOUDS[provider][1], 'key-of-the-environment')
    with ScriptedServer(lambda body: hello(provider)) as server:
        client = CloudClient(provider, base_url=server.url)
        assert client.completion('hi') == client.completion([dict(role='user', content='hi')]) == 'hello'
    assert (client.cost_summary()['calls'], client.cost_summary()['total_tokens']) == (2, 30)
    assert 'hi' in json.dumps(server.messages[0]) and CLOUDS[provider][2].split('/')[-1] in server.requests[0]['model']
    assert 'key-of' not in repr(client)
    client.reset()
    assert client.cost_summary()['calls'] == 0

@pytest.mark.parametrize('provider', CLOUDS)
def test_no_key(provider, monkeypatch):
    monkeypatch.delenv(CLOUDS[provider][1], raising=False)
    with pytest.raises(AuthError, match=CLOUDS[provider][1]) as e: CloudClient(provider)
    assert isinstance(e.value, RLMError)

def test_the_key_is_sent():
    with ScriptedServer('hi', 'hi', key='right') as server:
        assert CloudClient(api_key='right', base_url=server.url).completion('x') == 'hi'
        with pytest.raises(AuthError) as e: CloudClient(api_key='wrong-key-123', base_url=server.url).completion('x')
    assert 'wrong-key-123' not in str(e.value)

def test_unknown_provider():
    with pytest.raises(ValueError, match='openai, anthropic'): CloudClient('nobody', api_key='x')

def test_as_root_client():
    with ScriptedServer(code('print(len(context))'), 'FINAL(4)') as server:
        client = CloudClient(api_key='k', base_url=server.url)
        res = RLM(root_client=client).completion('How long?', 'text')
    assert (res.answer, res.usage.calls, res.usage.total_tokens) == ('4', 2, 30)
    assert res.cost == pytest.approx(client.cost_summary()['cost']) and res.cost > 0
    assert server.requests[0]['tools'][0]['function']['name'] == 'run_repl'
    assert server.messages[1][:2] == server.messages[0]

def test_as_root_client_within_a_budget():
    with ScriptedServer(lambda body: code(f"print(context, {len(body['messages'])})") if 'tools' in body else 'FINAL(closed)') as server:
        res = RLM(root_client=CloudClient(api_key='k', base_url=server.url), budget=Budget(calls=5)).completion('q', 't')
    assert (res.answer, res.stop_reason, len(server.requests)) == ('closed', 'calls', 5)

def test_as_root_client_retries_once_over():
    with ScriptedServer(lambda body: error(429, 'slow down')) as server:
        with pytest.raises(RateLimited): RLM(root_client=CloudClient(api_key='k', base_url=server.url), num_retries=1).completion('q', 't')
    assert len(server.requests) == 2

def test_as_sub_model():
    with ScriptedServer(lambda body: message('x', use=usage(3, 1))) as server:
        rlm = RLM_REPL(ScriptedModel(repl_call(batch)), sub=CloudClient(api_key='k', base_url=server.url))
        assert rlm.completion('t', 'q') == 'x x x'
    assert rlm.cost_summary()['sub']['total_tokens'] == 12
    assert rlm.cost_summary()['cost'] == pytest.approx(rlm.result.cost) and rlm.result.cost > 0
