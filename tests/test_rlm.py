"`RLM`: guards, protocols, depth, batches, budgets, types, sessions, streams, faults; with scripted models, and with real LiteLLM against a scripted HTTP server"
import asyncio, gc, json, os, signal, subprocess, sys, threading, time
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
import pytest
from pydantic import BaseModel
from rlm import usage as U
from rlm.core import tool_schema
from rlm.guards import GUARDS, told
from rlm.models import ScriptedModel, repl_call, reply, tool_call
from rlm.prompts import FINAL_PROMPT
from rlm.repl import open_repl
from rlm.rlm import RLM, RLMResult
from rlm.tools import make_run_repl
from rlm.usage import Budget
from scripted_server import ScriptedServer, message, usage, error, hang, code

TEXT = 'Oslo QX-7731\nBergen TR-0021\n' * 50
KEY = 'sk-secret-0123456789'
LOOK = repl_call('len(context)')

def below():
    "Processes that this one has started"
    res = subprocess.run(['ps', '-o', 'pid=,stat=,args=', '--ppid', str(os.getpid())], capture_output=True, text=True).stdout.splitlines()
    return [o for o in res if 'ps -o' not in o]

def settled(before, seconds=5):
    "No process beyond those of `before`, after a moment"
    ids = {o.split()[0] for o in before}
    for _ in range(int(seconds/.05)):
        if not (new := [o for o in below() if o.split()[0] not in ids]): return []
        time.sleep(.05)
    return new

@pytest.fixture(autouse=True, scope='module')
def warm():
    "What LiteLLM loads with its first call is loaded before anything is measured"
    with ScriptedServer('FINAL(x)') as s: RLM('openai/m', base_url=s.url, api_key=KEY).completion('Q')

@pytest.fixture(autouse=True)
def nothing_left():
    before = below()
    yield
    assert settled(before) == []

def ask(*script, context=TEXT, prompt='Q', default=None, **kw):
    "A run with a scripted model: the result, and the model"
    m = ScriptedModel(*script, default=default)
    return RLM(m, **kw).completion(prompt, context), m

def outputs(res): return [m['content'] for m in res.messages if m['role'] == 'tool']
def users(res): return [m['content'] for m in res.messages if m['role'] == 'user'][1:]
def guards_of(res): return [e['name'] for e in res.trace.of('guard')]

# -- a run

def test_a_run():
    res, m = ask(repl_call('x = context.split()[1]\nprint(x)'), 'FINAL_VAR(x)')
    assert (res.answer, res.value, res.stop_reason, res.iterations, str(res)) == ('QX-7731', 'QX-7731', 'final_var', 2, 'QX-7731')
    assert outputs(res) == ['QX-7731'] and res.usage.calls == 2 and res.cost == 0 and 0 < res.total_time < 60
    assert [e['type'] for e in res.trace] == ['run', 'request', 'reply', 'cell', 'request', 'reply', 'final']
    assert m.sent[0]['messages'][0]['content'].endswith('`context` is a str: 1,400 characters in 100 lines.') and m.sent[0]['messages'][1:] == [dict(role='user', content='Q')]
    assert 'QX-7731' in res._repr_markdown_() and '2 turns' in res._repr_markdown_()

@pytest.mark.parametrize('context,want', [(None, 'None'), (b'abc', "b'abc'"), (['a', 'b'], "['a', 'b']"), ({'k': [1]}, "{'k': [1]}"), ('', "''")])
def test_contexts(context, want):
    res, _ = ask(repl_call('context'), 'FINAL(x)', context=context)
    assert outputs(res) == ([want] if context is not None else ['(no output)'])

@pytest.mark.parametrize('repl', ['monty', 'process', 'ipython'])
def test_a_path_as_context(repl, tmp_path):
    p = tmp_path/'a.txt'
    p.write_text('two\nlines\n')
    res, m = ask(repl_call('len(context)'), 'FINAL(x)', context=p, repl=repl)
    assert outputs(res) == ['10'] and 'a str: 10 characters in 2 lines' in m.sent[0]['messages'][0]['content']

def test_wrong_types_and_empty_prompts():
    rlm = RLM(ScriptedModel())
    for p in ('', '  \n', None, 3, ['q']):
        with pytest.raises(ValueError, match='prompt='): rlm.completion(p)
    with pytest.raises(ValueError, match='choose one of'): RLM(ScriptedModel(), repl='docker').completion('Q')
    with pytest.raises(ValueError, match='early_final'): RLM(ScriptedModel(), guards=['nix'])
    with pytest.raises(ValueError, match='fenced'): RLM(ScriptedModel(), protocol='xml')
    with pytest.raises(TypeError, match='output_type='): RLM(ScriptedModel(), output_type='nonsense').completion('Q')
    with pytest.raises(TypeError, match='Budget'): RLM(ScriptedModel(), budget=dict(tokens=1))
    with pytest.raises(TypeError, match='cannot enter monty'): rlm.completion('Q', object())
    with pytest.raises(ValueError, match='one of them'): RLM('m', root_client=lambda m, t: 'x')
    with pytest.raises(U.ToolError, match='has that name'): RLM('m', tools=[_tool_named('budget')])

def _tool_named(name):
    def f(): return 1
    f.__name__ = name
    return f

def test_names_in_the_repl():
    res, _ = ask(repl_call('a = 1', ), repl_call('print(SHOW_VARS(), budget())'), repl_call('len(context), callable(llm_query)'), 'FINAL(x)', max_iterations=9)
    assert outputs(res)[1] == "['a'] {'iterations': 7}"

# -- guards: every row of the table, in both protocols

def cell(code, fenced): return f'```repl\n{code}\n```' if fenced else repl_call(code)

FAULTS = { # name: what the model says, with fences or without
    'empty': lambda f: [''],
    'prose_code': lambda f: ['I run this:\n```\nprint(1)\n```'],
    'open_thought': lambda f: ['<think>Let me see, FINAL(3)\n'],
    'cut_off': lambda f: [reply('Well, in the beginning', finish='length')],
    'no_end': lambda f: ['I think it is 4.'],
    'early_final': lambda f: ['FINAL(guess)'],
    'truncated': lambda f: [reply('```repl\nprint(1', finish='length') if f else reply(None, tool_call('run_repl', '{"python_code": "print(1'), finish='length')],
    'several_calls': lambda f: [repl_call('print(1)', 'print(2)')],
    'repeated': lambda f: [cell('1', f)]*3}

@pytest.mark.parametrize('fenced', [False, True], ids=['tools', 'fenced'])
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_gets_one_reply_and_the_run_goes_on(name, fenced):
    if fenced and name == 'several_calls': return
    res, m = ask(*FAULTS[name](fenced), cell('len(context)', fenced), 'FINAL(done)', protocol='fenced' if fenced else 'tools')
    assert (res.answer, guards_of(res)) == ('done', [name])
    said = json.dumps(m.sent[len(FAULTS[name](fenced))]['messages'])
    assert said.count(json.dumps(told(name, fenced))[1:-1]) == 1

@pytest.mark.parametrize('fenced', [False, True], ids=['tools', 'fenced'])
@pytest.mark.parametrize('name', FAULTS)
def test_a_guard_can_be_switched_off(name, fenced):
    if fenced and name == 'several_calls': return
    off = ask(*FAULTS[name](fenced), cell('len(context)', fenced), 'FINAL(done)', guards={name: False}, protocol='fenced' if fenced else 'tools')[0]
    assert name not in guards_of(off) and off.answer == ('guess' if name == 'early_final' else 'done')
    none = ask(*FAULTS[name](fenced), cell('len(context)', fenced), 'FINAL(done)', guards=False, protocol='fenced' if fenced else 'tools')[0]
    assert guards_of(none) == [] and none.answer == off.answer
    if name in ('empty', 'prose_code', 'no_end'): assert users(none)[0] == told('no_end', fenced)

def test_the_second_call_of_a_message_does_not_run():
    res, _ = ask(repl_call('print(1)', 'print(2)'), 'FINAL(x)', context=None)
    assert outputs(res) == ['1', GUARDS['several_calls'].reply]
    assert outputs(ask(repl_call('print(1)', 'print(2)'), 'FINAL(x)', context=None, guards=False)[0]) == ['1', '2']

def test_a_truncated_call_does_not_run():
    res, _ = ask(reply(None, tool_call('run_repl', dict(python_code='x = 1')), tool_call('run_repl', '{"python_code": "x = 2'), finish='length'), repl_call('"x" in SHOW_VARS()'), 'FINAL(x)', context=None)
    assert outputs(res)[-1] == 'False'
    res, _ = ask(reply('```repl\nx = 1\nx = 2', finish='length'), '```repl\n"x" in SHOW_VARS()\n```', 'FINAL(x)', context=None, protocol='fenced')
    assert 'Output:\nFalse' in users(res)[-1]

@pytest.mark.parametrize('guards', [True, False])
def test_unknown_tool_and_arguments_that_are_not_json(guards):
    res, _ = ask(reply(None, tool_call('search', dict(q=1))), reply(None, tool_call('run_repl', 'print(1)')), reply(None, tool_call('run_repl', '["1"]')), LOOK, 'FINAL(x)', guards=guards)
    assert res.answer == 'x' and "no tool 'search'. The tools are: run_repl" in outputs(res)[0]
    assert 'not JSON' in outputs(res)[1] and 'JSON object' in outputs(res)[2] and outputs(res)[3] == '1400'

def test_early_final_is_asked_once_and_then_believed():
    res, m = ask('FINAL(a)', 'FINAL(b)')
    assert (res.answer, guards_of(res), res.iterations) == ('b', ['early_final'], 2)
    assert ask('FINAL(a)', context=None)[0].answer == 'a'
    res = ask(repl_call('FINAL("a")'), repl_call('print(context[:3])\nFINAL("b")'))[0]
    assert (res.answer, guards_of(res)) == ('b', ['early_final'])

def test_the_same_cell_with_other_words_is_a_repetition():
    res, _ = ask(repl_call('1', say='a'), repl_call('1', say='b'), repl_call('1', say='c'), 'FINAL(x)', context=None)
    assert guards_of(res) == ['repeated']
    res, _ = ask('Hm.', 'Hm.', 'Hm.', 'FINAL(x)', context=None)
    assert guards_of(res) == ['no_end', 'no_end', 'repeated']

def test_guards_over_http():
    def two(c): return message(None, [('run_repl', dict(python_code=c)), ('run_repl', dict(python_code=c))])
    replies = ['', message(None), 'prose', message(None, [('run_repl', '{"python_code": "pr')], finish='length'), two('len(context)'), 'FINAL(x)']
    with ScriptedServer(*replies) as s:
        res = RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=0).completion('Q', TEXT)
    assert res.answer == 'x' and guards_of(res) == ['empty', 'empty', 'no_end', 'truncated', 'several_calls']

# -- the fenced protocol

def test_only_the_first_block_runs_and_what_was_invented_is_cut():
    say = 'I look.\n```repl\nprint(len(context))\n```\nOutput:\n17\n```repl\nprint(2)\n```\nFINAL(17)'
    res, m = ask(say, 'FINAL(1400)', protocol='fenced')
    assert res.answer == '1400' and users(res) == ['Output:\n1400'] and [e['code'] for e in res.trace.of('cell')] == ['print(len(context))']
    assert res.messages[2]['content'] == 'I look.\n```repl\nprint(len(context))\n```' and 'tools' not in m.sent[0]
    assert '```repl' in m.sent[0]['messages'][0]['content'] and 'run_repl' not in m.sent[0]['messages'][0]['content']

def test_endings_in_the_fenced_protocol():
    assert ask('```python\nx = len(context)\n```', 'FINAL_VAR(x)', protocol='fenced')[0].value == 1400
    assert ask('```python\nFINAL(len(context))\n```', protocol='fenced')[0].value == 1400
    res = ask('```python\nlen(context)\n```', 'FINAL(a)\n```python\n1/0\n```', protocol='fenced')[0]
    assert res.answer == 'a' and len(res.trace.of('cell')) == 1

REFUSALS = [error(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'), error(404, 'No endpoints found that support tool use.'), error(400, 'm does not support tools')]

@pytest.mark.parametrize('refusal', REFUSALS, ids=['vllm', 'router', 'ollama'])
def test_a_server_that_refuses_tools(refusal):
    def answer(body):
        if 'tools' in body: return refusal
        if len(body['messages']) > 2: return message('FINAL(ok)')
        return message('```repl\nlen(context)\n```')
    with ScriptedServer(answer) as s:
        rlm = RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=0)
        first, again = rlm.completion('Q', TEXT), rlm.completion('Q', TEXT)
    assert (first.answer, again.answer) == ('ok', 'ok') and users(first) == ['Output:\n1400']
    assert ['tools' in r for r in s.requests] == [True, False, False, False, False]
    assert [e['protocol'] for e in first.trace.of('protocol')] == ['fenced']

def test_other_refusals_are_raised_and_so_are_those_with_a_protocol_chosen():
    for refusal, kw in ((error(400, 'too hot'), {}), (REFUSALS[0], dict(protocol='tools'))):
        with ScriptedServer(refusal) as s, pytest.raises(U.BadRequest) as e: RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=0, **kw).completion('Q', TEXT)
        assert [o['type'] for o in e.value.trace] == ['run', 'request', 'failed', 'error']

# -- sub-calls

def test_batches_keep_their_order_and_failed_items_say_so():
    def sub(messages):
        q = messages[-1]['content']
        if q == 'bad': return U.BadRequest('no good')
        time.sleep(.1 if q == 'a' else 0)
        return q.upper()
    root = ScriptedModel(repl_call('r = llm_query_batched(["a", "bad", "c"])\nr'), 'FINAL_VAR(r)')
    class Sub(ScriptedModel):
        def __call__(self, messages, **kw):
            if isinstance(o := sub(messages), Exception): raise o
            self.script.append(o)
            return super().__call__(messages, **kw)
    res = RLM(root, recursive_model=Sub(name='sub')).completion('Q')
    assert res.value[0::2] == ['A', 'C'] and res.value[1] == 'ERROR: BadRequest: no good'
    assert res.usage.failed == 1 and {d: u.calls for d, u in res.usage.by_depth.items()} == {0: 2, 1: 2} and set(res.usage.by_model) == {'scripted', 'sub'}
    assert res.trace.of('batch')[-1]['done'] == 3

def test_batches_over_http_with_faults():
    "One limiter, order kept, a fault that passes is retried, one that stays is one item's"
    seen = {}
    def answer(body):
        if 'tools' in body: return code('r = llm_query_batched([str(i) for i in range(12)])') if len(body['messages']) == 2 else message('FINAL_VAR(r)')
        q = body['messages'][-1]['content']
        seen[q] = seen.get(q, 0) + 1
        if q == '3' and seen[q] == 1: return error(500, 'boom')
        if q == '5': return error(400, 'refused')
        return message(f'said {q}', use=usage(20, 2))
    with ScriptedServer(answer) as s: res = RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=1, max_concurrency=4).completion('Q')
    assert [o for i, o in enumerate(res.value) if i != 5] == [f'said {i}' for i in range(12) if i != 5] and res.value[5].startswith('ERROR: BadRequest') and seen['3'] == 2
    assert res.usage.by_depth[1].total_tokens == 11*22 and KEY not in json.dumps(res.trace.events)

def test_concurrency_is_bounded_for_the_tree():
    now, most, lock = 0, 0, threading.Lock()
    def sub(messages, **kw):
        nonlocal now, most
        with lock: now, most = now+1, max(most, now+1)
        time.sleep(.05)
        with lock: now -= 1
        return ScriptedModel('x')(messages)
    res = RLM(ScriptedModel(repl_call('r = llm_query_batched(["a"]*12)'), 'FINAL(x)'), recursive_model=sub, max_concurrency=3).completion('Q')
    assert most == 3 and res.usage.calls == 14

def test_a_fault_of_all_items_is_raised_in_the_cell():
    def answer(body): return error(401, 'no') if 'tools' not in body else code('r = llm_query_batched(["a", "b"])') if len(body['messages']) == 2 else message('FINAL(gave up)')
    with ScriptedServer(answer) as s: res = RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=0).completion('Q')
    assert 'AuthError' in outputs(res)[0] and 'api_key=' in outputs(res)[0] and res.answer == 'gave up'

@pytest.mark.parametrize('cell,want', [('llm_query(3)', 'a prompt is a str, not int'), ('llm_query_batched("abc")', 'prompts is a list, not str'), ('llm_query_batched(["a", None])', 'not NoneType'), ('llm_query("x", "gpt-99")', 'no model by name'),
    ('rlm_query_batched(["a"], ["b", "c"])', '1 prompts and 2 contexts'), ('rlm_query(None)', 'not NoneType'), ('rlm_query_batched("ab")', 'not str')])
@pytest.mark.parametrize('depth', [1, 2])
def test_wrong_calls_in_a_cell_cost_nothing(cell, want, depth):
    res, m = ask(repl_call(cell), 'FINAL(x)', context=None, depth=depth)
    assert want in outputs(res)[0] and len(m.sent) == 2

def test_empty_batches():
    res, m = ask(repl_call('print(llm_query_batched([]), rlm_query_batched([]), llm_query([]))'), 'FINAL(x)', context=None, depth=2)
    assert outputs(res) == ['[] [] []']

def test_other_models_by_name():
    with ScriptedServer(lambda b: message(b['model']) if 'tools' not in b else code('r = [llm_query("q"), llm_query("q", "openai/b"), llm_query(["q"], "openai/c")]\nFINAL_VAR("r")')) as s:
        res = RLM('openai/a', recursive_model='openai/b', models=('openai/c',), base_url=s.url, api_key=KEY).completion('Q')
    assert res.value == ['b', 'b', ['c']] and set(res.usage.by_model) == {'openai/a', 'openai/b', 'openai/c'}

# -- depth

def tree_model(width, log=None):
    "A model that splits a list context until one item is left, and counts"
    def ask(messages, tools=None, **kw):
        if log is not None: log.append((messages[-1]['content'], bool(tools)))
        if not tools: return ScriptedModel(f"leaf {messages[-1]['content']}")(messages)
        m = ScriptedModel(repl_call(f'context\nparts = rlm_query_batched([f"part {{i}}" for i in range({width})], [[i] for i in range({width})])\nFINAL_VAR("parts")'))
        return m(messages)
    ask.name = 'tree'
    return ask

@pytest.mark.parametrize('depth', [1, 2, 3])
def test_depth(depth):
    res = RLM(tree_model(2), depth=depth).completion('Q', [1])
    assert {d: u.calls for d, u in res.usage.by_depth.items()} == {d: 2**d for d in range(depth+1)}
    roots = res.trace.runs()
    assert len(roots) == 1 and len([n for _, n in roots[0].walk()]) == sum(2**d for d in range(depth)) and max(d for d, _ in roots[0].walk()) == depth-1
    leaf = res.value
    for _ in range(depth-1): leaf = literal_eval(leaf[0])
    assert leaf == ['leaf part 0\n\n[0]', 'leaf part 1\n\n[1]']

@pytest.mark.parametrize('repl', ['monty', 'process', 'ipython'])
def test_a_child_has_its_own_repl_and_context(repl):
    root = ScriptedModel(repl_call('x = 1\nr = rlm_query("child?", ["c"])'), repl_call('print(r, x, context)'), 'FINAL_VAR(r)')
    child = ScriptedModel(repl_call('seen = "x" in SHOW_VARS()\nprint(context, seen)'), repl_call('x = 2\nFINAL(str(context) + str(x))'))
    res = RLM(root, recursive_model=child, depth=2, repl=repl).completion('Q', 'root text')
    assert outputs(res)[1] == "['c']2 1 root text" and [e['output'] for e in res.trace.of('cell') if e['depth']][0] == "['c'] False"
    assert {d: u.calls for d, u in res.usage.by_depth.items()} == {0: 3, 1: 2} and res.usage.by_model['scripted'].calls == 5
    kinds = [e['repl'] for e in res.trace.of('run')]
    assert kinds == [repl, 'process' if repl == 'ipython' else repl]

def test_children_work_side_by_side():
    now, most, lock = 0, 0, threading.Lock()
    def child(messages, tools=None, **kw):
        nonlocal now, most
        with lock: now, most = now+1, max(most, now+1)
        time.sleep(.3)
        with lock: now -= 1
        return ScriptedModel(f"FINAL({messages[1]['content']})")(messages)
    root = ScriptedModel(repl_call('r = rlm_query_batched(["a", "b", "c"])'), 'FINAL_VAR(r)')
    res = RLM(root, recursive_model=child, depth=2).completion('Q')
    assert res.value == ['a', 'b', 'c'] and most > 1

def test_more_children_than_there_is_room_for():
    res = RLM(tree_model(3), depth=3, max_concurrency=1).completion('Q', [1])
    assert res.usage.by_depth[2].calls == 9

def test_a_failed_child_is_an_error_text_in_a_batch_and_raised_alone():
    def child(messages, tools=None, **kw):
        if 'bad' in messages[1]['content']: raise U.BadRequest('no good')
        return ScriptedModel('FINAL(fine)')(messages)
    root = ScriptedModel(repl_call('r = rlm_query_batched(["bad", "good"])'), repl_call('rlm_query("bad")'), 'FINAL_VAR(r)')
    res = RLM(root, recursive_model=child, depth=2).completion('Q')
    assert res.value == ['ERROR: BadRequest: no good', 'fine'] and 'BadRequest: no good' in outputs(res)[1]
    assert [e['error'] for e in res.trace.of('error')] == ['BadRequest']*2

@pytest.mark.parametrize('repl', ['monty', 'process'])
def test_the_depth_cannot_be_raised_from_inside(repl):
    tricks = ['rlm_query.__self__.rlm.depth = 9', 'rlm_query("q", None, depth=9)', 'depth = 9\nself = 3', 'import rlm\nrlm.depth = 9']
    res, m = ask(*map(repl_call, tricks), repl_call('r = rlm_query("q", "data")'), 'plain', 'FINAL_VAR(r)', context=None, repl=repl)
    assert res.value == 'plain' and len(res.trace.of('run')) == 1 and m.sent[5]['messages'][-1]['content'] == 'q\n\ndata'

def test_a_child_that_takes_all_its_turns_closes_itself():
    child = ScriptedModel(LOOK, LOOK, 'so far: 3')
    res = RLM(ScriptedModel(repl_call('r = rlm_query("q", "data")'), 'FINAL_VAR(r)'), recursive_model=child, depth=2, max_iterations=2).completion('Q')
    assert res.value == 'so far: 3' and [e['stop_reason'] for e in res.trace.of('final')] == ['iterations', 'final_var']

# -- budgets

def spend(limit, **kw):
    "A model that would go on for ever"
    m = ScriptedModel(default=lambda messages: repl_call(f'print({len(messages)}, budget())'))
    def ask(messages, tools=None, **kw):
        if messages[-1]['content'].endswith(FINAL_PROMPT): return ScriptedModel('what I have')(messages)
        return m(messages, tools=tools)
    ask.name = 'm'
    return RLM(ask, budget=Budget(**limit), **kw).completion('Q', TEXT)

@pytest.mark.parametrize('limit', [dict(tokens=30_000), dict(calls=6), dict(iterations=4), dict(seconds=5)], ids=lambda o: next(iter(o)))
def test_each_limit_ends_the_run_with_one_closing_turn(limit):
    name, most = next(iter(limit.items()))
    t0 = time.monotonic()
    res = spend(limit, max_iterations=10_000)
    assert (res.answer, res.stop_reason) == ('what I have', name) and len([e for e in res.trace.of('reply') if e['kind'] == 'closing']) == 1
    assert res.iterations == len([e for e in res.trace.of('reply') if e['kind'] == 'root'])
    if name == 'tokens': assert most/3 < res.usage.total_tokens <= most
    if name == 'calls': assert res.usage.sent == most
    if name == 'iterations': assert res.iterations == most
    if name == 'seconds': assert time.monotonic()-t0 < most + 3
    assert f"'{name}'" in outputs(res)[0]

def test_cost():
    def answer(body): return message('what I have', use=usage(1000, 100), model='gpt-4o-mini') if 'tools' not in body else message(None, [('run_repl', dict(python_code=f'{len(body["messages"])}'))], use=usage(1000, 100), model='gpt-4o-mini')
    with ScriptedServer(answer) as s: res = RLM('openai/gpt-4o-mini', base_url=s.url, api_key=KEY, budget=Budget(cost=.005), max_iterations=100).completion('Q', TEXT)
    assert (res.answer, res.stop_reason) == ('what I have', 'cost') and .002 < res.cost <= .005 and res.usage.unpriced == 0

def test_an_unmeasurable_budget_still_ends_with_a_result():
    for b in (Budget(tokens=1), Budget(calls=0), Budget(tokens=0)):
        res = ask(LOOK, default='x', budget=b)[0]
        assert (res.answer, res.value, res.iterations) == ('', None, 0) and res.stop_reason in ('tokens', 'calls')
    assert ask('all I know', budget=Budget(iterations=0))[0].answer == 'all I know'
    assert ask('all I know', budget=Budget(calls=1))[0].answer == 'all I know'

def test_budget_ends_in_a_cell_that_runs_children():
    def child(messages, tools=None, **kw): return ScriptedModel(repl_call(f'{len(messages)}'))(messages)
    seen = []
    def root(messages, tools=None, **kw):
        seen.append(messages[-1]['content'])
        return ScriptedModel('partial' if not tools else repl_call('r = rlm_query_batched(["a", "b"], ["x", "y"])'))(messages)
    res = RLM(root, recursive_model=child, depth=2, budget=Budget(calls=8)).completion('Q', TEXT)
    assert (res.answer, res.stop_reason, res.usage.sent, res.iterations) == ('partial', 'calls', 8, 1)
    assert 'BudgetExceeded' in outputs(res)[0] and seen[-1] == FINAL_PROMPT
    assert {e['error'] for e in res.trace.of('error')} == {'BudgetExceeded'}

def test_budget_ends_in_a_batch():
    res = RLM(ScriptedModel(repl_call('r = llm_query_batched(["a"]*10)'), 'FINAL_VAR(r)'), recursive_model=ScriptedModel(default='s'), budget=Budget(calls=6)).completion('Q')
    assert (res.stop_reason, res.usage.sent) == ('calls', 6)
    assert len([e for e in res.trace.of('reply') if e['kind'] == 'sub']) == 4 and res.answer.count("'s'") == 4 and res.answer.count('ERROR: BudgetExceeded') == 6

def test_seconds_break_off_a_call_that_hangs():
    def answer(body): return hang(20) if len(body['messages']) > 2 and 'tools' in body else message('so far') if 'tools' not in body else code('1')
    with ScriptedServer(answer) as s:
        t0 = time.monotonic()
        res = RLM('openai/m', base_url=s.url, api_key=KEY, budget=Budget(seconds=6)).completion('Q')
    assert (res.answer, res.stop_reason) == ('so far', 'seconds') and time.monotonic()-t0 < 15

@pytest.mark.parametrize('repl', ['ipython', 'monty'])
def test_seconds_break_off_a_cell_that_does_not_end(repl):
    "A worker of monty starts anew after that, for which a busy machine may need what was kept for the closing turn"
    t0 = time.monotonic()
    res, _ = ask(repl_call('while True: pass'), 'so far', budget=Budget(seconds=5), context=None, repl=repl)
    assert res.stop_reason == 'seconds' and 'TimeoutError' in outputs(res)[0] and time.monotonic()-t0 < 20
    assert res.answer == 'so far' or repl == 'monty'

def test_the_closing_turn_is_asked_twice_if_nothing_came():
    assert ask(LOOK, '', 'Oslo', max_iterations=1)[0].answer == 'Oslo'
    assert ask(LOOK, '', '', max_iterations=1)[0].answer == ''
    res, m = ask(LOOK, 'three', '3', max_iterations=1, output_type=int)
    assert res.value == 3 and 'must be int' in m.sent[-1]['messages'][-1]['content']
    res, m = ask(LOOK, 'three', 'four', max_iterations=1, output_type=int)
    assert (res.answer, res.value) == ('four', None)

def test_a_session_after_a_closing_turn_has_its_tools_again():
    m = ScriptedModel(LOOK, LOOK, 'limit', LOOK, 'FINAL(x)')
    with RLM(m, budget=Budget(tokens=10**6), max_iterations=2).session(TEXT) as s:
        assert s.completion('Q').stop_reason == 'iterations' and s.completion('R').answer == 'x'
    assert 'tools' not in m.sent[2] and 'tools' in m.sent[3] and 'max_tokens' not in m.sent[3]

# -- typed answers

class Town(BaseModel):
    name: str
    people: int

@pytest.mark.parametrize('t,wrong,right,want', [(int, 'FINAL(about three)', 'FINAL(3)', 3), (list[str], 'FINAL(a, b)', "FINAL(['a', 'b'])", ['a', 'b']), (list[str], repl_call('FINAL(3)'), repl_call('FINAL(["a"])'), ['a']),
    (Town, 'FINAL({"name": "Oslo"})', 'FINAL({"name": "Oslo", "people": 7})', Town(name='Oslo', people=7)), (Town, repl_call('FINAL({"name": "Oslo", "people": "many"})'), repl_call('FINAL({"name": "Oslo", "people": 7})'), Town(name='Oslo', people=7)),
    (bool, 'FINAL(perhaps)', 'FINAL(true)', True)])
@pytest.mark.parametrize('protocol', ['tools', 'fenced'])
def test_typed_answers(t, wrong, right, want, protocol):
    if protocol == 'fenced': wrong, right = (f"```repl\n{json.loads(o['tool_calls'][0]['function']['arguments'])['python_code']}\n```" if isinstance(o, dict) else o for o in (wrong, right))
    res, m = ask(wrong, right, context=None, output_type=t, protocol=protocol)
    assert res.value == want and type(res.value) == type(want) and res.iterations == 2
    assert 'The answer must be' in users(res)[-1] and ('people: int' in m.sent[0]['messages'][0]['content']) == (t is Town)

def test_output_type_of_one_question():
    assert RLM(ScriptedModel('FINAL(3)')).completion('Q', output_type=int).value == 3
    assert RLM(ScriptedModel('FINAL(3)'), output_type=int).completion('Q', output_type=str).value == '3'

# -- short contexts

def test_direct_below():
    res, m = ask('Oslo.', context='short', direct_below=100)
    assert (res.answer, res.stop_reason, res.iterations) == ('Oslo.', 'direct', 1) and m.sent[0]['messages'] == [dict(role='user', content='Q\n\nshort')] and 'tools' not in m.sent[0]
    assert [e['type'] for e in res.trace] == ['run', 'request', 'reply', 'final']
    assert ask(LOOK, 'FINAL(x)', context='x'*500, direct_below=100)[0].stop_reason == 'final'
    assert ask(LOOK, 'FINAL(x)', context='short')[0].stop_reason == 'final'
    assert ask(LOOK, 'FINAL(x)', context=['short'], direct_below=100)[0].stop_reason == 'final'

def test_direct_answers_have_types_budgets_and_sessions():
    res, m = ask('three', '```json\n3\n```', context='short', direct_below=100, output_type=int)
    assert (res.value, res.iterations) == (3, 2)
    res, _ = ask('x', context='short', direct_below=100, budget=Budget(calls=0))
    assert (res.answer, res.stop_reason, res.iterations) == ('', 'calls', 0)
    m = ScriptedModel('one', 'two')
    with RLM(m, direct_below=100).session('short') as s: assert [s.completion('Q').answer, s.completion('R').answer] == ['one', 'two']
    assert [o['content'] for o in m.sent[1]['messages']] == ['Q\n\nshort', 'one', 'R']

def test_a_direct_question_that_does_not_fit_is_searched():
    def answer(body): return error(400, 'maximum context length is 10 tokens') if len(body['messages']) == 1 else code('FINAL(len(context))')
    with ScriptedServer(answer) as s: res = RLM('openai/m', base_url=s.url, api_key=KEY, direct_below=100).completion('Q', 'short')
    assert (res.value, res.stop_reason) == (5, 'final')

# -- sessions

def test_a_session_keeps_variables_and_counts_each_question():
    m = ScriptedModel(repl_call('x = context[:4]'), 'FINAL_VAR(x)', repl_call('y = x*2'), 'FINAL_VAR(y)', 'FINAL(z)')
    with RLM(m, budget=Budget(calls=3)).session(TEXT) as s: a, b, c = s.completion('first?'), s.completion('second?'), s.completion('third?')
    assert [o.answer for o in (a, b, c)] == ['Oslo', 'OsloOslo', 'z'] and [o.usage.calls for o in (a, b, c)] == [2, 2, 1] and [o.iterations for o in (a, b, c)] == [2, 2, 1]
    assert [e['run'] for e in s.trace.of('run')] == ['root', 'root.1', 'root.2'] and len(a.messages) < len(b.messages) < len(c.messages)
    for p, q in zip(m.sent, m.sent[1:]): assert q['messages'][:len(p['messages'])] == p['messages']

def test_a_session_goes_on_after_a_fault():
    m = ScriptedModel(repl_call('x = 5'), U.BadRequest('no good'), 'FINAL_VAR(x)')
    with RLM(m).session() as s:
        with pytest.raises(U.BadRequest): s.completion('first?')
        assert s.completion('second?').value == 5

# -- what is sent

def prefixes(raw):
    bodies = [r[:r.rindex(b'],"model"')] for r in raw]
    for a, b in zip(bodies, bodies[1:]): assert b.startswith(a) and len(b) > len(a)
    return len(bodies)

@pytest.mark.parametrize('protocol', ['tools', 'fenced'])
def test_each_request_is_the_last_one_plus_new_messages_byte_for_byte(protocol):
    faults = [code('1', '2', content='Zürich “quoted” \\n'), message(None, [('run_repl', '{"python_code":  "x = 1"}'), ('nix', '{}')]), '', 'thinking', message('', [('run_repl', dict(python_code='print("é\\ud83d")'), 'call_0')]), 'FINAL(early)', 'FINAL_VAR(nope)']
    if protocol == 'fenced': faults = ['Zürich\n```repl\nprint("é")\n```\ninvented', '', 'thinking', '```\nx\n```', 'FINAL(early)', 'FINAL_VAR(nope)', '<think>']
    turns = [code(f'print(context[{i}:{i}+200])') if protocol == 'tools' else f'```repl\nprint(context[{i}:{i}+200])\n```' for i in range(13)]
    with ScriptedServer(*faults, *turns, 'not the end', 'FINAL(x)') as s: res = RLM('openai/m', base_url=s.url, api_key=KEY, max_iterations=21, protocol=protocol).completion('Q', TEXT)
    assert res.stop_reason == 'iterations' and res.iterations == 21 and prefixes(s.raw) == 22

def claude(*blocks): return dict(id='m', type='message', role='assistant', model='claude-haiku-4-5', content=list(blocks), stop_reason='end_turn', usage=dict(input_tokens=6, output_tokens=3))

def test_cache_marks_for_anthropic():
    use = dict(type='tool_use', id='t1', name='run_repl', input=dict(python_code='len(context)'))
    with ScriptedServer(claude(use), claude(dict(type='text', text='FINAL(x)'))) as s: res = RLM('anthropic/claude-haiku-4-5', base_url=s.url[:-3], api_key=KEY, num_retries=0).completion('Q', TEXT)
    assert res.answer == 'x'
    for r in s.requests:
        assert 'cache_control' in json.dumps(r['system']) and 'cache_control' in json.dumps(r['messages'][-1])
        assert 'cache_control_injection_points' not in r

def test_no_marks_and_no_metadata_for_others():
    with ScriptedServer(code('len(context)'), 'FINAL(x)') as s: RLM('openai/m', base_url=s.url, api_key=KEY, temperature=.5).completion('Q', TEXT)
    assert b'cache_control' not in s.raw[1] and not {'metadata'} & set(s.requests[0]) and s.requests[0]['temperature'] == .5

# -- compaction

@pytest.mark.parametrize('protocol', ['tools', 'fenced'])
def test_older_outputs_move_into_the_repl_once(protocol):
    fenced = protocol == 'fenced'
    cells = [cell(f'print("{c}"*1500)', fenced) for c in 'abcdef'] + [cell('print([h[-3:] for h in history], len(history))', fenced), cell('print(history[0] == history[0].strip())', fenced)]
    res, m = ask(*cells, 'FINAL(x)', context=None, window=4000, protocol=protocol)
    events, seen = res.trace.of('compact'), res.trace.of('cell')[6]['output']
    assert len(events) == 1 and events[0]['why'] == 'window' and seen == f"{['aaa', 'bbb', 'ccc'][:events[0]['moved']]} {events[0]['moved']}"
    sent = [json.dumps(o['messages']) for o in m.sent]
    breaks = [i for i, (a, b) in enumerate(zip(sent, sent[1:])) if not b.startswith(a[:-1])]
    assert len(breaks) == 1 and 'moved to history[0]' in sent[breaks[0]+1] and 'a'*1500 not in sent[-1] and res.answer == 'x'

def test_a_window_that_overflows_is_compacted_and_asked_again():
    def answer(body):
        n = len(body['messages'])
        if sum(len(str(m.get('content'))) for m in body['messages']) > 30_000: return error(400, 'maximum context length is 8000 tokens')
        return code(f'print("{n % 10}"*4900)') if n < 16 else message('FINAL_VAR(history)')
    with ScriptedServer(answer) as s: res = RLM('openai/m', base_url=s.url, api_key=KEY).completion('Q')
    assert len(res.value) >= 3 and all(len(set(o.strip())) == 1 for o in res.value) and {e['why'] for e in res.trace.of('compact')} == {'refused'}

def test_a_single_message_that_does_not_fit_raises():
    with ScriptedServer(error(400, 'maximum context length is 10 tokens')) as s, pytest.raises(U.ContextWindowExceeded, match='Send less') as e: RLM('openai/m', base_url=s.url, api_key=KEY).completion('Q')
    assert len(s.requests) == 1 and e.value.trace.of('error')

# -- stream, async, Ctrl-C

def test_stream_tells_events_as_they_happen():
    gate = threading.Event()
    def second(messages):
        assert gate.wait(20)
        return 'FINAL(x)'
    got = []
    for e in RLM(ScriptedModel(LOOK, second)).stream('Q', TEXT):
        got.append(e)
        if not isinstance(e, RLMResult) and e['type'] == 'cell': gate.set()
    assert isinstance(got[-1], RLMResult) and [e['type'] for e in got[:-1]] == ['run', 'request', 'reply', 'cell', 'request', 'reply', 'final']

def test_leaving_a_stream_stops_the_run():
    with ScriptedServer(lambda b: code('llm_query("sub")') if 'tools' in b else hang(20)) as s:
        t0 = time.monotonic()
        for e in RLM('openai/m', base_url=s.url, api_key=KEY).stream('Q', TEXT):
            if e['type'] == 'request' and e['kind'] == 'sub': break
        assert time.monotonic()-t0 < 15
        n = len(s.requests)
        time.sleep(.3)
        assert len(s.requests) == n <= 2

def test_an_error_comes_out_of_the_stream():
    with pytest.raises(U.AuthError): list(RLM(ScriptedModel(U.AuthError('no key'))).stream('Q'))

def test_many_at_once():
    async def all_of_them():
        def answer(i): return ScriptedModel(repl_call(f'x = context[0] + {i}'), lambda m: time.sleep(.1) or 'FINAL_VAR(x)')
        return await asyncio.gather(*[RLM(answer(i)).acompletion('Q', [100*i]) for i in range(6)])
    assert [o.value for o in asyncio.run(all_of_them())] == [101*i for i in range(6)]

@pytest.mark.parametrize('where', ['model', 'cell', 'child'])
def test_a_cancelled_task_closes_the_repl_and_sends_nothing_more(where):
    reached = threading.Event()
    def answer(body):
        sub = 'tools' not in body
        child = any('child?' in str(m.get('content')) for m in body['messages'][1:2])
        if where == 'model' or child or sub: return reached.set() or hang(20)
        return code('llm_query("sub")' if where == 'cell' else 'rlm_query_batched(["child?", "child? 2"], ["a", "b"])')
    async def go(url):
        task = asyncio.create_task(RLM('openai/m', base_url=url, api_key=KEY, depth=2).acompletion('Q', TEXT))
        while not reached.is_set(): await asyncio.sleep(.02)
        t0 = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        return time.monotonic()-t0
    before = below()
    with ScriptedServer(answer) as s:
        assert asyncio.run(go(s.url)) < 5 and settled(before) == []
        n = len(s.requests)
        time.sleep(.5)
        assert len(s.requests) == n

@pytest.mark.parametrize('repl', ['monty', 'process'])
def test_a_cancelled_task_ends_a_busy_cell(repl):
    m = ScriptedModel(repl_call('while True: pass'))
    async def go():
        task = asyncio.create_task(RLM(m, repl=repl).acompletion('Q'))
        while not m.sent: await asyncio.sleep(.02)
        await asyncio.sleep(.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    t0 = time.monotonic()
    asyncio.run(go())
    assert time.monotonic()-t0 < 15 and len(m.sent) == 1

INTERRUPTED = '''
import sys
from rlm.rlm import RLM
from rlm.trace import read_trace
print('ready', flush=True)
try: RLM('openai/m', base_url=sys.argv[1], api_key='k', repl=sys.argv[2], depth=2, checkpoint=sys.argv[3]).completion('Q', 'text')
except KeyboardInterrupt as e: print('interrupted', [o['type'] for o in e.trace][-1], flush=True)
'''
CELLS = dict(sub='llm_query("sub")', busy='print("go")\nllm_query("now")\nwhile True: pass', children='rlm_query_batched(["c1", "c2"], ["a", "b"])')

@pytest.mark.parametrize('what', CELLS)
@pytest.mark.parametrize('repl', ['monty', 'process'])
def test_ctrl_c(repl, what, tmp_path):
    reached = threading.Event()
    def answer(body):
        if 'tools' not in body and body['messages'][-1]['content'] == 'now': return reached.set() or message('ok')
        if 'tools' not in body or body['messages'][1]['content'] in ('c1', 'c2'): return reached.set() or hang(30)
        return code(CELLS[what])
    with ScriptedServer(answer) as s:
        p = subprocess.Popen([sys.executable, '-c', INTERRUPTED, s.url, repl, str(tmp_path/'t.jsonl')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert reached.wait(300)
            time.sleep(.5)
            kids = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(p.pid)], capture_output=True, text=True).stdout.split()
            assert kids
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=60)
        finally: p.kill()
        n = len(s.requests)
        time.sleep(.3)
        assert len(s.requests) == n
    assert out.split() == ['ready', 'interrupted', 'error'] and p.returncode == 0, (out, err)
    for _ in range(60):
        if not any(os.path.exists(f'/proc/{k}') for k in kids): break
        time.sleep(.05)
    else: raise AssertionError(f'left: {kids}')
    last = [json.loads(l) for l in (tmp_path/'t.jsonl').read_text().splitlines()]
    assert 'KeyboardInterrupt' in [o.get('error') for o in last]

# -- tools and clients of the user

def lookup(
    town:str, # its name
)->str:
    "The key of a town"
    if town == 'Rome': raise LookupError('no key for Rome')
    return {'Oslo': 'QX'}[town]

async def slow(n:int)->int:
    "Twice as much"
    await asyncio.sleep(.01)
    return 2*n

@pytest.mark.parametrize('repl', ['monty', 'process', 'ipython'])
def test_tools_of_the_user(repl):
    res, m = ask(repl_call('lookup("Oslo") + str(slow(4))'), repl_call('lookup("Rome")'), repl_call('try: lookup("Rome")\nexcept LookupError as e: print("caught", e)'), 'FINAL(x)', tools=[lookup, slow], repl=repl)
    assert outputs(res)[0] == "'QX8'" and 'LookupError: no key for Rome' in outputs(res)[1] and outputs(res)[2] == 'caught no key for Rome' and res.answer == 'x'
    assert '- `lookup(town: str) -> str`: The key of a town' in m.sent[0]['messages'][0]['content'] and guards_of(res) == []

@pytest.mark.parametrize('repl', ['monty', 'process', 'ipython'])
def test_a_tool_that_raises_what_is_no_exception(repl):
    def leave():
        "Leave"
        sys.exit(3)
    res, _ = ask(repl_call('leave()'), 'FINAL(x)', tools=[leave], repl=repl, context=None)
    assert res.answer == 'x' and 'RuntimeError: leave raised SystemExit: 3' in outputs(res)[0]

class Obj:
    def __init__(self, content=None, tool_calls=None): self.content, self.tool_calls = content, tool_calls

@pytest.mark.parametrize('kind', ['str', 'dict', 'object', 'async'])
def test_root_client(kind):
    calls = []
    def client(messages, tools):
        calls.append((len(messages), bool(tools)))
        if len(calls) == 1: return dict(content=None, tool_calls=[dict(id='c', type='function', function=dict(name='run_repl', arguments='{"python_code": "len(context)"}'))])
        text = f"FINAL({messages[-1]['content']})"
        return dict(str=text, dict=dict(content=text), object=Obj(text)).get(kind, text)
    async def aclient(messages, tools): return client(messages, tools)
    res = RLM(root_client=aclient if kind == 'async' else client).completion('Q', TEXT)
    assert (res.answer, calls) == ('1400', [(2, True), (4, True)])

def test_root_client_that_fails():
    def broken(messages, tools): raise OSError('the line is dead')
    with pytest.raises(OSError, match='line is dead') as e: RLM(root_client=broken).completion('Q')
    assert [o['type'] for o in e.value.trace] == ['run', 'request', 'failed', 'error']
    with pytest.raises(TypeError, match='no message'): RLM(root_client=lambda m, t: None).completion('Q')
    with pytest.raises(TypeError, match='callable'): RLM(root_client='gpt')

# -- faults

@pytest.mark.parametrize('exc,fault,kw', [(U.AuthError, error(401, 'Incorrect API key'), {}), (U.ModelNotFound, error(404, 'no such model'), {}), (U.ProviderError, error(500, 'boom'), {}), (U.ModelTimeout, hang(), dict(timeout=.5))], ids=lambda o: getattr(o, '__name__', ''))
def test_a_fault_that_stays_raises_one_typed_error_with_the_trace(exc, fault, kw):
    with ScriptedServer(code('mark = len(context)'), fault) as s, pytest.raises(exc) as e: RLM('openai/m', base_url=s.url, api_key=KEY, num_retries=0, **kw).completion('Q', TEXT)
    types = [o['type'] for o in e.value.trace]
    assert types == ['run', 'request', 'reply', 'cell', 'request', 'failed', 'error'] and KEY not in str(e.value) and KEY not in json.dumps(e.value.trace.events)

def test_faults_that_pass_are_not_seen():
    with ScriptedServer(error(429, 'slow down', headers={'Retry-After': '0'}), code('len(context)'), error(503, 'busy'), 'FINAL(x)') as s: res = RLM('openai/m', base_url=s.url, api_key=KEY).completion('Q', TEXT)
    assert res.answer == 'x' and res.iterations == 2 and res.usage.failed == 2 and s.raw[2] == s.raw[3]

def test_a_repl_that_crashes_gets_its_history_again():
    cells = [repl_call(f'print("{c}"*1500)') for c in 'abcdef'] + [repl_call('import os\nos.kill(os.getpid(), 9)'), repl_call('len(history[0])'), 'FINAL(x)']
    res, _ = ask(*cells, context=None, window=4000, repl='process')
    assert outputs(res)[-1] == '1500' and 'history' in outputs(res)[-2]

@pytest.mark.parametrize('repl', ['monty', 'process'])
def test_sub_calls_and_children_do_not_count_as_time_of_a_cell(repl):
    slow = lambda m: time.sleep(1.5) or 'late'
    m = ScriptedModel(repl_call('a = llm_query("q")\nb = rlm_query("r")\nprint(a, b)'), slow, slow, repl_call('while True: pass'), 'FINAL(x)')
    t0 = time.monotonic()
    res = RLM(m, repl=repl, cell_timeout=1).completion('Q')
    first, second = res.trace.of('cell')
    assert first['output'] == 'late late' and first['seconds'] >= 3 and 'stopped after 1 s' in second['output'] and time.monotonic()-t0 < 30

def test_the_seconds_of_a_budget_end_a_cell_with_all_it_waits_for():
    def wait(): time.sleep(.2)
    m = ScriptedModel(repl_call('while True: wait()'), default='so far')
    t0 = time.monotonic()
    res = RLM(m, tools=[wait], budget=Budget(seconds=3)).completion('Q')
    assert (res.answer, res.stop_reason) == ('so far', 'seconds') and time.monotonic()-t0 < 6

def test_threads_that_parse_code_at_the_same_moment():
    "Python 3.11 counts the depth of a syntax tree for all threads together, and raises SystemError when two of them mix"
    cell = '\n'.join(f'def f{i}(a, b=[1, 2, {{3: 4}}]):\n    return [x for x in a if x > b[{i}]]' for i in range(40))
    def work(i):
        with open_repl('monty', 'abc') as r:
            for _ in range(15):
                assert r.run(cell).error is None and tool_schema(make_run_repl(r))['function']['name'] == 'run_repl'
    other = lambda *a: sum(range(300)) # what lets another thread run in mid-parse, as profilers and test tools do
    before = sys.getswitchinterval()
    gc.callbacks.append(other)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool: list(pool.map(work, range(8)))
    finally:
        gc.callbacks.remove(other)
        sys.setswitchinterval(before)
