"The monitoring that people have: LiteLLM's callbacks hear of every root and sub-call, each with its place in the tree"
import threading, time
import pytest
from rlm.models import ScriptedModel, _litellm
from rlm.rlm import RLM
from scripted_server import ScriptedServer, code, error, message

KEY = 'sk-test-hidden-0123456789'

@pytest.fixture
def heard():
    "What a `CustomLogger` of LiteLLM heard: an outcome and the keywords of each call"
    litellm = _litellm()
    from litellm.integrations.custom_logger import CustomLogger
    events = []
    class Logger(CustomLogger):
        async def async_log_success_event(self, kwargs, response_obj, start_time, end_time): events.append(('success', kwargs))
        async def async_log_failure_event(self, kwargs, response_obj, start_time, end_time): events.append(('failure', kwargs))
    before, logger = list(litellm.callbacks), Logger()
    litellm.callbacks = [*before, logger]
    yield events
    litellm.callbacks = before
    for hooks in (litellm.success_callback, litellm.failure_callback, litellm._async_success_callback, litellm._async_failure_callback):
        while logger in hooks: hooks.remove(logger)

def answer(body):
    "A root that asks two sub-calls and opens a child run, which asks one more"
    if 'tools' not in body: return error(400, 'no such colour') if 'Is plaid' in body['messages'][-1]['content'] else message('yes')
    n, first = sum(m['role'] == 'tool' for m in body['messages']), body['messages'][1]['content']
    if first.startswith('Child'): return code('print(llm_query("Is it so?"), context)') if n == 0 else message('FINAL(so)')
    if n == 0: return code('print(llm_query_batched([f"Is {w} a colour?" for w in context.split()]))')
    return code('print(rlm_query("Child: is it so?", context))') if n == 1 else message('FINAL(both)')

def waited(events, n):
    end = time.monotonic() + 30
    while len(events) < n and time.monotonic() < end: time.sleep(.02)
    return events

def place(kw): return tuple(kw['litellm_params']['metadata'][k] for k in ('run', 'depth', 'step', 'kind'))

def test_every_call_of_the_tree_is_heard_with_its_place(heard):
    with ScriptedServer(answer, key=KEY) as s:
        res = RLM('openai/m', base_url=s.url, api_key=KEY, depth=2, metadata=dict(session='s-1', tags=['mine'])).completion('How many colours?', 'red blue')
        waited(heard, 8)
    child = res.trace.of('run')[1]['run']
    expected = [('root', 0, 1, 'root'), ('root', 1, 1, 'sub'), ('root', 1, 1, 'sub'), ('root', 0, 2, 'root'), (child, 1, 1, 'root'), (child, 2, 1, 'sub'), (child, 1, 2, 'root'), ('root', 0, 3, 'root')]
    assert res.answer == 'both' and sorted(place(kw) for _,kw in heard) == sorted(expected)
    assert {o for o,_ in heard} == {'success'} and res.usage.calls == len(heard) == 8
    told = [(e['run'], e['depth'], e['step'], e['kind']) for e in res.trace.of('reply')]
    assert sorted(told) == sorted(expected), 'the trace tells the same places'

def test_tags_for_monitors_that_read_only_these(heard):
    "What LiteLLM hands on as tags, to MLflow, Langfuse and others; the id of the trace keeps a run together"
    with ScriptedServer(answer) as s:
        res = RLM('openai/m', base_url=s.url, api_key=KEY, metadata=dict(session='s-1', tags=['mine'])).completion('Q?', 'red blue')
        waited(heard, n := res.usage.calls)
        m = RLM('openai/m', base_url=s.url, api_key=KEY, metadata=dict(trace_id='ours')).completion('Q?', 'red').usage.calls
        waited(heard, n + m)
    payloads = [kw['standard_logging_object'] for _,kw in heard]
    tags = [o['request_tags'] for o in payloads]
    assert next(o for o in tags if 'kind:sub' in o)[:6] == [f'trace_id:{res.trace.id}', 'run:root', 'depth:1', 'step:1', 'kind:sub', 'mine']
    assert sum('mine' in o for o in tags) == n and sum('trace_id:ours' in o for o in tags) == m
    assert [o['trace_id'] for o in payloads] == [res.trace.id]*n + ['ours']*m
    assert {kw['litellm_params']['metadata'].get('session') for _,kw in heard} == {'s-1', None}

def test_a_call_that_fails_is_heard_too(heard):
    with ScriptedServer(answer) as s:
        res = RLM('openai/m', base_url=s.url, api_key=KEY).completion('Q?', 'red plaid')
        waited(heard, 6)
    assert [place(kw) for o,kw in heard if o == 'failure'] == [('root', 1, 1, 'sub')] and res.usage.failed == 1

def test_what_is_heard_of_places_is_not_sent(heard):
    with ScriptedServer(answer) as s:
        RLM('openai/m', base_url=s.url, api_key=KEY, metadata=dict(session='s-1')).completion('Q?', 'red blue')
        assert not any('metadata' in o or 'tags' in o or 'litellm' in ''.join(o) for o in s.requests) and not any(b's-1' in o or b'trace_id' in o for o in s.raw)
