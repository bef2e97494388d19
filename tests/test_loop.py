"The loop over real LiteLLM and a real HTTP server with scripted replies"
import json, os, shutil, subprocess, sys
import pytest
from rlm import usage as U
from rlm.core import advanced_toolloop
from rlm.models import ScriptedModel
from rlm.prompts import FINAL_PROMPT, EMPTY_PROMPT, NO_END_PROMPT
from rlm.repl import as_repl
from rlm.tools import prep_shell, make_run_repl
from rlm.usage import Usage
from scripted_server import ScriptedServer, Reply, message, usage, error, hang, torn, code, closed_port

KEY, TEXT = 'sk-secret-0123456789', 'Oslo QX-7731\nBergen TR-0021\n' * 50

@pytest.fixture(scope='module')
def sh():
    s = prep_shell(TEXT, ScriptedModel(default='a sub answer'))
    yield s
    as_repl(s).close()

def run(sh, s, query='Which key has Oslo?', model='openai/small', **kw):
    "All items of a run, and its final dict"
    kw = dict(api_key=KEY, num_retries=0) | kw
    *items, end = advanced_toolloop(query, sh=sh, model=model, base_url=s.url, **kw)
    assert end['type'] == 'final' and isinstance(end['answer'], str)
    return items, end

def answer(sh, *replies, **kw):
    with ScriptedServer(*replies) as s: return run(sh, s, **kw)[1]

def results(end): return [m['content'] for m in end['messages'] if m['role'] == 'tool']
def users(end): return [m['content'] for m in end['messages'] if m['role'] == 'user'][1:]

QUICK_START = '''
from rlm.tools import prep_shell, make_run_repl
from rlm.core import advanced_toolloop
from rlm.prompts import REPL_SYSTEM_PROMPT

context, query = "Oslo QX-7731\\n" * 1000, "Which key has Oslo?"
sh = prep_shell(context, model="openai/openai/gpt-oss-120b", base_url="{url}")
run_repl = make_run_repl(sh, max_output=5000, timeout=60)
responses = advanced_toolloop(query, sp=REPL_SYSTEM_PROMPT, tools=[run_repl], sh=sh, model="openai/openai/gpt-oss-120b", base_url="{url}", max_steps=50, final_prompt=None, verbose=True)
for item in responses:
    if isinstance(item, dict) and item.get("type") == "final": print("ANSWER", item["answer"])
'''

def test_the_quick_start_as_a_script():
    replies = code('print(context[:12])', content='Looking.'), code('a = llm_query(["which key?", "which town?"])\nprint(a)'), 'k', 'k', 'So:\n\nFINAL(QX-7731)'
    with ScriptedServer(*replies, key=KEY) as s:
        p = subprocess.run([sys.executable, '-c', QUICK_START.format(url=s.url)], capture_output=True, text=True, timeout=120, env={**os.environ, 'OPENAI_API_KEY': KEY, 'PYTHONWARNINGS': 'ignore'})
    assert p.returncode == 0, p.stderr
    assert p.stdout.strip().endswith('ANSWER QX-7731') and p.stderr == ''
    for o in ('>>> print(context[:12])', '  | Oslo QX-7731', "['k', 'k']", 'Looking.'): assert o in p.stdout
    assert [r['model'] for r in s.requests] == ['openai/gpt-oss-120b'] * 5
    assert ['tools' in r for r in s.requests] == [True, True, False, False, True]

def test_items_are_responses_tool_results_and_one_final(sh, capfd):
    with ScriptedServer(code('x = context.split()[1]', 'x'), 'FINAL_VAR(x)') as s: items, end = run(sh, s)
    assert [type(o).__name__ for o in items] == ['ModelResponse', 'dict', 'dict', 'ModelResponse']
    assert items[1] == dict(role='tool', tool_call_id='call_0', name='run_repl', content='(no output)')
    assert items[2]['content'] == "'QX-7731'"
    assert (end['answer'], end['stop_reason'], end['steps']) == ('QX-7731', 'final_var', 2)
    assert capfd.readouterr() == ('', '')

def test_first_two_messages(sh):
    query = '  Which key\n\nhas "Oslo"?  '
    with ScriptedServer('FINAL(x)') as s: run(sh, s, query, sp='My prompt.')
    assert s.messages[0] == [dict(role='system', content='My prompt.\n\n`context` is a str: 1,400 characters in 100 lines.'), dict(role='user', content=query)]

def test_each_request_is_the_last_one_plus_new_messages_byte_for_byte(sh):
    replies = [code('1', '2', content='Zürich “quoted” \\n'), message(None, [('run_repl', '{"python_code":  "x = 1"}'), ('run_repl', 'no json'), ('nix', '{}')]), '', 'thinking',
        message('', [('run_repl', dict(python_code='print("é\\ud83d")'), 'call_0')]), 'FINAL_VAR(nope)', code('3'), 'not yet', 'the end']
    with ScriptedServer(*replies) as s: items, end = run(sh, s, max_steps=8)
    def body(raw): return raw[:raw.rindex(b'],"model"')] if b'],"model"' in raw else None
    bodies = [body(r) for r in s.raw]
    assert len(bodies) == 9 and all(b.startswith(b'{"messages":[') for b in bodies)
    for a, b in zip(bodies, bodies[1:]): assert b.startswith(a) and len(b) > len(a)
    tails = {r[len(b):] for r, b in zip(s.raw[:-1], bodies)}
    assert len(tails) == 1
    assert (end['answer'], end['stop_reason'], end['steps']) == ('the end', 'fallback', 8)

BAD = [ # name, arguments, what the model must read
    ('run_repl', 'print(1)', 'not JSON'),
    ('run_repl', '{"python_code": "print(1)', 'not JSON'),
    ('run_repl', "{'python_code': '1'}", 'not JSON'),
    ('run_repl', '["1"]', 'must be a JSON object, not list'),
    ('run_repl', '"1"', 'must be a JSON object, not str'),
    ('run_repl', '{}', 'missing argument python_code'),
    ('run_repl', '', 'missing argument python_code'),
    ('run_repl', None, 'missing argument python_code'),
    ('run_repl', dict(code='1'), 'unknown argument code'),
    ('run_repl', dict(python_code='1', timeout=9), 'unknown argument timeout'),
    ('run_repl', dict(python_code=7), 'raised'),
    ('run_repl', dict(python_code=['a']), 'raised'),
    ('run_repl', dict(python_code=None), 'raised'),
    ('search', dict(q=1), "no tool 'search'. The tools are: run_repl, pick"),
    ('', dict(q=1), 'no tool'),
    (None, '{}', 'no tool'),
    ('functions.run_repl<|x|>', '{}', 'no tool'),
    ('pick', dict(items='a'), 'raised ValueError: there is no a'),
    ('pick', dict(), 'missing argument items'),
    ('run_repl', dict(python_code='1/0'), 'ZeroDivisionError'),
    ('run_repl', dict(python_code='x = ='), 'SyntaxError'),
    ('run_repl', dict(python_code='contxt'), 'names you have: ')]

def pick(
    items:str, # what
    strict:bool=True, # complain?
    most:int=None, # how many
)->str:
    "Pick items"
    if strict: raise ValueError(f'there is no {items}')
    return f'{items} {most}'

def test_a_run_in_which_every_call_is_wrong(sh):
    replies = [message(None, [(n, a)]) for n, a, _ in BAD] + [message('FINAL(done)')]
    end = answer(sh, *replies, tools=[make_run_repl(sh), pick])
    got = results(end)
    assert end['answer'] == 'done' and end['steps'] == len(BAD)+1 and len(got) == len(BAD)
    for text, (_, _, want) in zip(got, BAD): assert want in text

def test_all_wrong_calls_in_one_turn_and_the_good_one_runs(sh):
    end = answer(sh, message(None, [(n, a) for n, a, _ in BAD] + [('run_repl', dict(python_code='6*7'))]), 'FINAL(done)', tools=[make_run_repl(sh), pick])
    assert results(end)[-1] == '42' and end['steps'] == 2
    stored = next(m for m in end['messages'] if 'tool_calls' in m)['tool_calls']
    ids = [c['id'] for c in stored]
    assert len(set(ids)) == len(ids) == len(BAD)+1 and ids == [m['tool_call_id'] for m in end['messages'] if m['role'] == 'tool']
    for c in stored:
        assert isinstance(json.loads(c['function']['arguments']), dict)
        assert c['function']['name'] and set(c['function']['name']) <= set('abcdefghijklmnopqrstuvwxyz_x')

def test_custom_tools_with_optional_parameters(sh):
    end = answer(sh, message(None, [('pick', dict(items='a', strict=False)), ('pick', dict(items='b', strict=False, most=3)), ('pick', dict(items='c', strict=False, most=None))]), 'FINAL(x)', tools=[make_run_repl(sh), pick])
    assert results(end) == ['a None', 'b 3', 'c None']

def test_a_tool_of_the_user_that_cannot_be_described(sh):
    def undocumented(x:int): return x
    def untyped(x): "Doc"
    for f in (undocumented, untyped, lambda: 1):
        with pytest.raises(U.ToolError, match='docstring'): next(advanced_toolloop('Q', tools=[f], sh=sh, model=ScriptedModel()))

def test_a_tool_that_exits(sh):
    def leave()->str:
        "Leave"
        sys.exit(3)
    assert results(answer(sh, message(None, [('leave', {})]), 'FINAL(x)', tools=[leave])) == ['Error: leave raised SystemExit: 3']

@pytest.mark.parametrize('reply', ['', '   \n', message(None), message(None, reasoning_content='only thoughts')], ids=['empty', 'blank', 'null', 'thoughts'])
def test_an_empty_message(sh, reply):
    end = answer(sh, reply, 'FINAL(x)')
    assert users(end) == [EMPTY_PROMPT] and end['answer'] == 'x' and end['messages'][2]['content'].strip()

def test_prose_and_unrun_code_go_on(sh):
    end = answer(sh, 'I will call FINAL(answer).', '```python\nFINAL(1)\n```', 'FINAL(2)')
    assert users(end) == [NO_END_PROMPT]*2 and (end['answer'], end['steps']) == ('2', 3)

def test_an_ending_is_looked_for_after_all_calls_have_run(sh):
    with ScriptedServer(code('late = 1', 'late = 2', content='FINAL_VAR(late)')) as s: items, end = run(sh, s)
    assert (end['answer'], end['value'], end['steps']) == ('2', 2, 1) and len(items) == 3

@pytest.mark.parametrize('cells,want', [(['FINAL("in the REPL")'], 'in the REPL'), (['FINAL(7)', '1/0'], '7'), (['z = [1]\nFINAL_VAR("z")'], '[1]'), (['FINAL(0)'], '0'), (['FINAL(8)\n1/0'], '8')])
def test_final_in_the_repl(sh, cells, want): assert answer(sh, code(*cells, content='and so on'))['answer'] == want

@pytest.mark.parametrize('cell', ['FINAL("")', 'FINAL(None)', 'x = "  "\nFINAL_VAR("x")'])
def test_nothing_in_the_repl_is_no_answer(sh, cell):
    end = answer(sh, code(cell), 'FINAL(real)')
    assert end['answer'] == 'real' and 'is no answer' in results(end)[0]

def test_final_var_of_an_unknown_name(sh):
    end = answer(sh, code('found = "QX"'), 'FINAL_VAR(fuond)', 'FINAL_VAR(found)')
    assert 'no variable fuond' in users(end)[0] and 'found' in users(end)[0] and end['answer'] == 'QX'

def test_final_var_of_an_unknown_name_in_the_repl(sh):
    end = answer(sh, code('FINAL_VAR("fuond")'), 'FINAL(x)')
    assert 'NameError' in results(end)[0] and 'names you have' in results(end)[0] and end['answer'] == 'x'

def test_final_var_of_an_empty_variable(sh):
    end = answer(sh, code('found = None'), 'FINAL_VAR(found)', 'FINAL(x)')
    assert 'is empty (None)' in users(end)[0] and end['answer'] == 'x'

def test_an_ending_of_an_earlier_run_is_forgotten(sh):
    assert answer(sh, code('FINAL("first")'))['answer'] == 'first'
    assert answer(sh, code('1'), 'FINAL(second)')['answer'] == 'second'

def test_an_unclosed_ending(sh):
    end = answer(sh, "FINAL(it's (open", "FINAL(it's (closed))")
    assert 'was not closed' in users(end)[0] and end['answer'] == "it's (closed)"

def test_patterns(sh): assert answer(sh, 'FINAL(no)', 'ANSWER: yes', patterns=dict(final='ANSWER:'))['answer'] == 'yes'

# -- the last step

def last(sh, *replies, steps=1, **kw):
    with ScriptedServer(*[code('"a thought"', content='I think it is Rome.')]*steps, *replies) as s: return run(sh, s, max_steps=steps, **kw)[1], s

@pytest.mark.parametrize('said,want', [('It is Oslo.', 'It is Oslo.'), ('FINAL(Oslo)', 'Oslo'), ('FINAL_VAR(town)', 'Oslo'), ('FINAL(Oslo', 'Oslo'), ('<think>hm</think>\nOslo', 'Oslo'),
    ('```\nOslo\n```', '```\nOslo\n```')])
def test_the_last_step(sh, said, want):
    sh.user_ns['town'] = 'Oslo'
    end, s = last(sh, said, steps=2)
    assert (end['answer'], end['stop_reason'], end['steps'], end['usage'].calls) == (want, 'fallback', 2, 3)
    assert s.messages[-1][-1] == dict(role='user', content=FINAL_PROMPT) and 'tools' not in s.requests[-1] and 'tool_choice' not in s.requests[-1]

def test_final_prompt_and_tool_choice(sh):
    end, s = last(sh, 'Oslo', final_prompt='Now!', tool_choice='auto', parallel_tool_calls=True)
    assert s.messages[-1][-1]['content'] == 'Now!' and s.requests[0]['tool_choice'] == 'auto' and not {'tools', 'tool_choice', 'parallel_tool_calls'} & set(s.requests[-1])

@pytest.mark.parametrize('first', ['', message(None), 'FINAL_VAR(nowhere)', code('1')], ids=['empty', 'null', 'unknown', 'call'])
def test_the_last_step_is_asked_twice_if_nothing_comes(sh, first):
    end, s = last(sh, first, 'Oslo')
    assert (end['answer'], end['stop_reason'], end['usage'].calls) == ('Oslo', 'fallback', 3)
    roles = [m['role'] for m in s.messages[-1]]
    assert all(m.get('content') or m.get('tool_calls') for m in s.messages[-1]) and roles[-1] == 'user'

def test_no_answer_is_empty_and_not_a_thought(sh):
    end, s = last(sh, '', 'FINAL_VAR(nowhere)')
    assert (end['answer'], end['stop_reason']) == ('', 'fallback')

def test_a_problem_of_the_last_turn_is_told_with_the_final_prompt(sh):
    with ScriptedServer('FINAL_VAR(nowhere)', 'Oslo') as s: _, end = run(sh, s, max_steps=1)
    assert end['answer'] == 'Oslo' and len(users(end)) == 1 and 'no variable nowhere' in users(end)[0] and users(end)[0].endswith(FINAL_PROMPT)

def test_a_provider_that_wants_tools_while_the_history_has_calls(sh):
    text = "litellm.UnsupportedParamsError: Anthropic expects the `tools=` param to be passed in."
    end, s = last(sh, error(400, text), 'Oslo')
    assert end['answer'] == 'Oslo' and s.requests[-1]['tool_choice'] == 'none' and s.requests[-1]['tools'] == s.requests[0]['tools']
    with pytest.raises(U.BadRequest, match='too hot'): last(sh, error(400, 'too hot'))

def claude(*blocks): return dict(id='m', type='message', role='assistant', model='claude-haiku-4-5', content=list(blocks), stop_reason='end_turn', usage=dict(input_tokens=6, output_tokens=3))
def says(t): return dict(type='text', text=t)
def uses(i, name, **args): return dict(type='tool_use', id=i, name=name, input=args)

def test_anthropic_by_litellm(sh):
    with ScriptedServer(claude(says('Hm.'), uses('t1', 'run_repl', python_code='len(context)'), uses('t1', 'nix', a=1)), claude(), claude(says('It is Oslo.'))) as s:
        *_, end = advanced_toolloop('Q', sh=sh, model='anthropic/claude-haiku-4-5', base_url=s.url[:-3], api_key=KEY, max_steps=2, num_retries=0)
    assert (end['answer'], end['stop_reason']) == ('It is Oslo.', 'fallback') and results(end)[0] == '1400' and end['usage'].cost > 0
    sent = json.dumps(s.requests[-1]['messages'])
    assert sent.startswith(json.dumps(s.requests[1]['messages'])[:-1])

def test_signed_thoughts_go_back_to_anthropic(sh):
    thought = dict(type='thinking', thinking='Let me count.', signature='sig123')
    with ScriptedServer(claude(thought, uses('t1', 'run_repl', python_code='len(context)')), claude(says('FINAL(x)'))) as s:
        *_, end = advanced_toolloop('Q', sh=sh, model='anthropic/claude-haiku-4-5', base_url=s.url[:-3], api_key=KEY, num_retries=0, reasoning_effort='low')
    assert thought in s.requests[1]['messages'][1]['content'] and end['answer'] == 'x'

# -- faults

def test_a_fault_that_passes_does_not_change_the_run(sh):
    with ScriptedServer(code('1'), error(429, 'slow down'), torn(), 'FINAL(x)') as s: items, end = run(sh, s, num_retries=2)
    assert end['answer'] == 'x' and s.raw[1] == s.raw[2] == s.raw[3] and (end['steps'], end['usage'].calls) == (2, 2)

@pytest.mark.parametrize('exc,fault,kw', [(U.AuthError, error(401, 'Incorrect API key'), {}), (U.ModelNotFound, error(404, 'no such model'), {}), (U.ProviderError, error(500, 'boom'), {}),
    (U.ModelTimeout, hang(), dict(timeout=0.5)), (U.ContextWindowExceeded, error(400, 'maximum context length is 10 tokens'), {})], ids=lambda o: getattr(o, '__name__', ''))
def test_a_fault_in_mid_run_raises_one_clear_error(sh, exc, fault, kw):
    with ScriptedServer(code('mark = 5'), fault) as s:
        got = advanced_toolloop('Q', sh=sh, model='openai/small', base_url=s.url, api_key=KEY, num_retries=0, **kw)
        assert [type(next(got)).__name__ for _ in range(2)] == ['ModelResponse', 'dict']
        with pytest.raises(exc) as e: next(got)
    assert KEY not in str(e.value) and sh.user_ns['mark'] == 5

def test_a_gateway_that_stops_in_mid_run(sh):
    with ScriptedServer(code('1')) as s:
        got = advanced_toolloop('Q', sh=sh, model='openai/small', base_url=s.url, api_key=KEY, num_retries=0)
        next(got), next(got)
        s.stop()
        with pytest.raises(U.GatewayUnreachable, match='base_url='): next(got)

# -- sub-calls

def sub_shell(s, **kw): return prep_shell(TEXT, 'openai/sub', s.url, KEY, num_retries=0, **kw)

def test_sub_calls_are_counted():
    def by_model(body):
        if body['model'] == 'sub': return message('sub says', use=usage(1000, 50, cached=10))
        return code('a = llm_query("one")\nb = llm_query(["two", "three"])\n[a, *b]') if len(body['messages']) == 2 else message('FINAL(x)', use=usage(7, 1, reasoning=1))
    with ScriptedServer(by_model) as s:
        sh = sub_shell(s, temperature=0.3)
        for _ in range(2):
            _, end = run(sh, s)
            assert end['usage'] == Usage(calls=5, prompt_tokens=3017, completion_tokens=156, cached_tokens=30, reasoning_tokens=1, unpriced=5)
    assert results(end) == ["['sub says', 'sub says', 'sub says']"]
    subs = [r for r in s.requests if r['model'] == 'sub']
    assert {r['messages'][1]['content'] for r in subs} == {'one', 'two', 'three'} and all(r['temperature'] == 0.3 and 'tools' not in r for r in subs)
    as_repl(sh).close()

@pytest.mark.parametrize('cell', ['a = llm_query("one")', 'a = llm_query(["one", "two"])'])
def test_a_failed_sub_call_is_an_exception_and_not_an_answer(cell):
    def by_model(body):
        if body['model'] == 'sub': return error(401, 'Incorrect API key provided: ' + KEY)
        return code(cell, '"a" in dir()') if len(body['messages']) == 2 else message('FINAL(gave up)')
    with ScriptedServer(by_model) as s:
        sh = sub_shell(s)
        _, end = run(sh, s)
    text = results(end)
    assert 'AuthError' in text[0] and 'api_key=' in text[0] and f'line 1: {cell}' in text[0] and text[1] == 'False'
    assert KEY not in str(end) and end['sub_errors'][0].startswith('AuthError') and end['usage'].calls == 2
    as_repl(sh).close()

def test_a_failed_sub_call_can_be_handled_by_the_model():
    def by_model(body):
        if body['model'] == 'sub': return error(400, 'maximum context length is 10 tokens')
        return code('try: a = llm_query("x"*99)\nexcept Exception as e: a = type(e).__name__\na')
    with ScriptedServer(by_model) as s:
        sh = sub_shell(s)
        item = list(zip(range(2), advanced_toolloop('Q', sh=sh, model='openai/small', base_url=s.url, api_key=KEY, num_retries=0)))[1][1]
    assert item['content'] == "'ContextWindowExceeded'"
    as_repl(sh).close()

# -- contexts

@pytest.mark.parametrize('context,said', [(['a', 'bb'], 'a list: 2 items of type str with 3 characters together, the longest 2.'), ({'secret': 'x'}, 'a dict: 1 key; the values are 1 item'), (b'abc', 'a bytes: 3 bytes.')])
def test_any_context(context, said):
    sh = prep_shell(context, ScriptedModel())
    with ScriptedServer(code('type(context).__name__'), 'FINAL(x)') as s: _, end = run(sh, s)
    assert said in end['messages'][0]['content'] and results(end) == [repr(type(context).__name__)] and sh.user_ns['context'] is context and 'secret' not in end['messages'][0]['content']
    as_repl(sh).close()

MEMORY = """
import time
from pathlib import Path
from rlm.tools import prep_shell
from rlm.core import advanced_toolloop
def status(name): return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1]) * 1024
def settle():
    "Wait until what LiteLLM still loads in the background after its first call is there"
    last = 0
    while last != (last := status('VmRSS')): time.sleep(0.5)
def run(context):
    sh = prep_shell(context, model='openai/sub', base_url='{url}', api_key='k')
    for item in advanced_toolloop('Which key?', sh=sh, model='openai/small', base_url='{url}', api_key='k'): pass
    assert sh.user_ns['context'] is context
    return item
run('warm up ' * 1000)
context = 'x' * 60_000_000 + 'needle QX-7731\\n' + 'y' * 40_000_000
def growth():
    "How far the peak of this process rises in a run"
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmHWM')
    item = run(context)
    assert item['answer'] == 'QX-7731' and item['usage'].calls == 5, item
    return status('VmHWM') - before
settle()
print(growth(), growth())
"""

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_context_of_100_mb_is_not_copied():
    def steps(look): return [code(look), code('i = context.find("needle")\nkey = context[i:i+20].split()[1]\nkey'), code('llm_query(context[i:i+30])'), 'ok', 'FINAL_VAR(key)']
    warm = [code('i, key = 1, 2'), code('key'), code('llm_query(context[:9])'), 'ok', 'FINAL_VAR(key)']
    with ScriptedServer(*warm, *steps('print(len(context), context.count("\\n"))\ncontext[:100]'), *steps('len(context + "z")')) as s:
        p = subprocess.run([sys.executable, '-c', MEMORY.format(url=s.url)], capture_output=True, text=True, timeout=200)
    assert p.returncode == 0, p.stderr
    without, with_a_copy_made_by_the_model = map(int, p.stdout.split())
    assert without < 5_000_000 and with_a_copy_made_by_the_model > 90_000_000
    assert '100,000,015 characters in 2 lines' in s.messages[-1][0]['content'] and max(map(len, s.raw)) < 20_000

# -- other REPLs

KINDS = ['ipython', 'process', 'monty', *(['jail'] if shutil.which('bwrap') else [])]

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_repl(kind):
    sh = prep_shell(TEXT, ScriptedModel(default='sub'), repl=kind)
    replies = [code('len(context)', 'a = llm_query(["x", "y"])\na', 'class C: pass\nc, none = C(), None'), 'FINAL_VAR(nope)', 'FINAL_VAR(none)', code('z = {"k": [1, 2]}'), 'FINAL_VAR(z)']
    with ScriptedServer(*replies) as s: _, end = run(sh, s)
    assert results(end)[:2] == ['1400', "['sub', 'sub']"] and end['value'] == {'k': [1, 2]} and end['usage'].calls == 7
    assert 'The variables are: a, ' in users(end)[0] and 'is empty (None)' in users(end)[1]
    assert end['messages'][0]['content'].endswith('`context` is a str: 1,400 characters in 100 lines.')
    assert answer(sh, code('1/0', 'FINAL_VAR("z")'))['stop_reason'] == 'final_var'
    as_repl(sh).close()

@pytest.mark.parametrize('kind', ['process', 'monty'])
def test_a_variable_that_cannot_leave_its_repl(kind):
    sh = prep_shell(TEXT, ScriptedModel(), repl=kind)
    end = answer(sh, code('class C: pass\nc = C()'), 'FINAL_VAR(c)', 'FINAL(x)')
    assert 'c cannot be the answer' in users(end)[0] and end['answer'] == 'x'
    as_repl(sh).close()

def test_a_cell_that_never_ends(sh):
    with ScriptedServer(code('while True: pass'), code('len(context)'), 'FINAL(x)') as s: _, end = run(sh, s, tools=[make_run_repl(sh, timeout=0.3)])
    assert 'TimeoutError' in results(end)[0] and results(end)[1] == '1400'

def test_without_steps_and_without_iterating(sh):
    assert answer(sh, 'Oslo', max_steps=0)['stop_reason'] == 'fallback'
    with ScriptedServer() as s: advanced_toolloop('Q', sh=sh, model='openai/small', base_url=s.url)
    assert s.raw == []
