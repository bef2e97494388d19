"What a run looks like: on a terminal (a real pseudo-terminal, read through a screen emulator), in a pipe, in a notebook; hostile text, large traces, Ctrl-C"
import fcntl, html, io, json, os, pty, re, select, signal, struct, subprocess, sys, termios, time
from html.parser import HTMLParser
from types import SimpleNamespace
import pyte, pytest
from hypothesis import given, settings, strategies as st
from rlm.models import ScriptedModel, repl_call
from rlm.rlm import RLM
from rlm.show import Live, Story, clean, diff_traces, list_traces, run_html, show_live, show_trace, summary
from rlm.trace import Trace
from rlm.usage import Budget

EVENTS = '''
import json, sys, time
from rlm.show import *
from rlm.trace import Trace
def reply(t, run, depth, step, text, code=None, kind='root', key=None):
    calls = dict(tool_calls=[dict(function=dict(name='run_repl', arguments=json.dumps(dict(python_code=code))))]) if code else {}
    t.add('reply', run=run, depth=depth, step=step, kind=kind, key=key, message=dict(content=text, **calls), usage=dict(prompt_tokens=1000, completion_tokens=20), cost=.001, seconds=1.)
def sub(t, i): t.add('request', run='root', depth=1, step=1, kind='sub', key=str(i), messages=[dict(role='user', content=f'Is line {i} red?')])
def run(t, n=40, pause=0):
    t.add('run', run='root', parent=None, depth=0, query='How many lines are red? ' + 'Count with care. '*8, model='openai/small', context='str of 12,000 characters', settings=dict(budget=dict(tokens=90_000)))
    reply(t, 'root', 0, 1, 'I ask about each line.', 'for line in context.split("\\\\n"): answers.append(llm_query(f"Is this line red? {line}" + "x"*100))')
    for i in range(n): sub(t, i)
    for i in range(n):
        reply(t, 'root', 1, 1, 'no', kind='sub', key=str(i))
        time.sleep(pause)
    t.add('cell', run='root', depth=0, step=1, index=1, code='', output='0123456789'*30 + '\\nsecond', error=None, cut=7, lost=[])
    t.add('run', run='c', parent='root', depth=1, query='And the rest?', model='openai/small', context='list of 2 items')
    t.add('final', run='c', depth=1, answer='none', stop_reason='final', iterations=1, seconds=1.)
    t.add('guard', run='root', depth=0, step=1, name='no_end', text='Go on.')
    t.add('final', run='root', depth=0, answer='Three lines are red. '*6, stop_reason='final', iterations=1, seconds=2., places=[dict(line=1310, text='red is line one', n=1), dict(line=1310, text='red is line one', n=2), dict(item='b', line=2, text='also red')])
'''

AT_80 = '''
? How many lines are red? Count with care. Count with care. Count with care.
  Count with care. Count with care. Count with care. Count with care. Count with
  care.
  openai/small · str of 12,000 characters
turn 1 · 1,000 tokens read, 20 written, S
  I ask about each line.
  > for line in context.split("\\n"): answers.append(llm_query(f"Is this line re…
  ~ Is line 0 red? → no
  ~ Is line 1 red? → no
  ~ sub-calls ━━━━━━━━━━━━━━━━━━━━ 40/40 · 40 calls · 40,800 tokens · $0.0400 ·
    S
  < 012345678901234567890123456789012345678901234567890123456789012345678901234…
  < second
  < 7 characters of it were cut
  │ run 1 ? And the rest?
  │   openai/small · list of 2 items
  │ run 1 = none
  │   final after 1 turn
  ! no_end: Go on.
= Three lines are red. Three lines are red. Three lines are red. Three lines are
  red. Three lines are red. Three lines are red.
  @ line 1,310: red is line one
  @ context['b'], line 2: also red
  final after 1 turn · 41 calls · 41,820 tokens · $0.0410 · S · left: 48,180
  tokens
'''.strip().split('\n')


class Terminal:
    "A program under a pseudo-terminal of some size, and the screen that a user would see"
    def __init__(self, code, columns=80, rows=100, **env):
        self.screen, self.raw = pyte.Screen(columns, rows), b''
        self.stream = pyte.ByteStream(self.screen)
        env = {k:v for k,v in os.environ.items() if k not in ('NO_COLOR', 'FORCE_COLOR', 'COLUMNS', 'LINES')} | dict(TERM='xterm-256color', PYTHONIOENCODING='utf-8', LITELLM_LOCAL_MODEL_COST_MAP='True') | env
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
        def attach():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.proc = subprocess.Popen([sys.executable, '-c', code], stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=attach)
        os.close(slave)

    def read(self, until=None, seconds=60):
        "Feed the screen until the program ends, or until a text stands on it"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until and until in self.text: return self
            if not select.select([self.master], [], [], .2)[0]: continue
            try: data = os.read(self.master, 65536)
            except OSError: break
            if not data: break
            self.raw += data
            self.stream.feed(data)
        else: raise AssertionError(f'no {until!r} in {seconds} s:\n{self.text}')
        assert until is None, f'ended without {until!r}:\n{self.text}'
        self.code = self.proc.wait(10)
        return self

    @property
    def lines(self): return '\n'.join(o.rstrip() for o in self.screen.display).strip('\n').split('\n')
    @property
    def text(self): return '\n'.join(self.lines)
    @property
    def cursor_shown(self): return not self.screen.cursor.hidden and self.raw.rfind(b'\x1b[?25l') <= self.raw.rfind(b'\x1b[?25h')
    def __enter__(self): return self
    def __exit__(self, *exc):
        if self.proc.poll() is None: self.proc.kill()
        self.proc.wait()
        os.close(self.master)

def in_pipe(code, **env):
    env = os.environ | dict(PYTHONIOENCODING='utf-8') | env
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, env=env, timeout=120)
    assert r.returncode == 0, r.stderr.decode()
    return r.stdout.decode(), r.stderr.decode()

def shown(f, *args, **kw):
    out = io.StringIO()
    f(*args, out=out, **kw)
    return out.getvalue()

def no_seconds(lines): return [re.sub(r'[\d.,]+ s\b', 'S', o) for o in lines]


# on a terminal

LIVE = EVENTS + 't = Trace()\nt.listeners.append(Live())\nrun(t)'
STATIC = EVENTS + 't = Trace()\nrun(t)\nshow_trace(t)'

@pytest.mark.parametrize('code', [LIVE, STATIC], ids=['live', 'static'])
def test_eighty_columns(code):
    with Terminal(code, 80) as t:
        assert no_seconds(t.read().lines) == no_seconds(AT_80) and t.code == 0 and t.cursor_shown
        assert b'\x1b[1;32m' in t.raw, 'the answer is bold green'

@pytest.mark.parametrize('code', [LIVE, STATIC], ids=['live', 'static'])
def test_two_hundred_columns_are_as_the_plain_lines(code):
    plain = in_pipe(code)[0].splitlines()
    with Terminal(code, 200) as t:
        wide = t.read().lines
        assert t.cursor_shown
    assert no_seconds(wide) == no_seconds([o.rstrip() if len(o.rstrip()) <= 200 else o[:199] + '…' for o in plain])
    assert '  < ' + ('0123456789'*30)[:195] + '…' in wide

def test_the_bar_and_what_is_left_stand_below_and_go():
    with Terminal(EVENTS + 't = Trace()\nt.listeners.append(Live())\nrun(t, 20, .15)', 80) as t:
        t.read(until='sub-calls ━━━━━━━━━━──────────')
        *_, busy, status = t.lines
        assert re.fullmatch(r'  ~ sub-calls ━{10}─{10} 1[01]/20', busy), busy
        assert re.fullmatch(r'\S turn 2 · 1[12] calls · 1[12],\d\d0 tokens · \$0\.01\d0 · [\d.]+ s · left: 7\d,\d+ tokens', status), status
        assert t.screen.cursor.hidden
        t.read()
        assert t.cursor_shown and not any(o.startswith(('⠋', '⠙', '⠹')) or '/20' in o and '20/20' not in o for o in t.lines)

SLOW = '''
import time
from rlm.rlm import RLM
from rlm.models import ScriptedModel, repl_call
def slow(messages):
    time.sleep({pause})
    {then}
RLM(ScriptedModel(repl_call('print(llm_query("a long one"))'), 'FINAL(x)'), ScriptedModel(default=slow), verbose=True).completion('Wait.', 'text')
'''

def test_ctrl_c_gives_the_terminal_back():
    with Terminal(SLOW.format(pause=30, then="return 'x'"), 100) as t:
        t.read(until='sub-calls ──')
        assert t.screen.cursor.hidden
        os.write(t.master, b'\x03')
        t.read(seconds=30)
        assert t.cursor_shown and '! KeyboardInterrupt' in t.text and t.code in (1, 130, -2)
        assert not any(o.startswith('  ~ sub-calls') and 'call' not in o[40:] for o in t.lines)

def test_an_exception_gives_the_terminal_back():
    code = EVENTS + "t = Trace()\nwith Live() as live:\n    t.listeners.append(live)\n    t.add('run', run='root', parent=None, query='q')\n    time.sleep(.3)\n    1/0"
    with Terminal(code, 100) as t:
        t.read()
        assert t.code == 1 and t.cursor_shown and t.lines[-1] == 'ZeroDivisionError: division by zero'

def test_a_program_that_ends_in_the_middle_gives_it_back():
    with Terminal(EVENTS + "live = Live()\nlive(dict(v=1, n=0, t=0, type='run', run='root', parent=None, query='q'))\ntime.sleep(.3)") as t: assert t.read().cursor_shown and t.code == 0

def test_prints_of_others_stand_above_the_live_lines():
    code = EVENTS + "live = Live()\nlive(dict(v=1, n=0, t=0, type='run', run='root', parent=None, query='q'))\nfor i in range(5):\n    print('printed', i)\n    time.sleep(.2)\nlive.close()"
    with Terminal(code) as t: assert [o for o in t.read().lines if 'printed' in o] == [f'printed {i}' for i in range(5)]


# not on a terminal, or not in colour

@pytest.mark.parametrize('env', [dict(NO_COLOR='1'), dict(TERM='dumb')], ids=str)
def test_plain_lines_on_a_terminal_that_wants_none(env):
    with Terminal(LIVE, 300, **env) as t: assert b'\x1b' not in t.read().raw and '= Three lines are red.' in t.text

def test_a_pipe_gets_plain_lines():
    out, err = in_pipe(LIVE)
    assert '\x1b' not in out and err == '' and out.splitlines()[-5] == '  ! no_end: Go on.'
    assert '━' not in in_pipe(LIVE, PYTHONIOENCODING='ascii')[0]

def test_nothing_is_printed_unless_asked(capfd):
    RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(x)')).completion('Q', 'text')
    list(RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(x)')).stream('Q', 'text'))
    assert capfd.readouterr() == ('', '')

def test_verbose_tells_budget_child_runs_and_sub_calls(capsys):
    m = ScriptedModel(repl_call('print(rlm_query("deeper?", context[:4]))'), repl_call('print(llm_query("p") + context)'), 'plain', 'FINAL(child)', 'FINAL(all)')
    res = RLM(m, depth=2, verbose=True, budget=Budget(tokens=50_000, calls=9)).completion('Q', 'some text')
    out = capsys.readouterr().out
    assert '  │ run 1 ? deeper?' in out and '  │   ~ p → plain' in out and out.index('run 1 = child') < out.index('= all')
    assert re.search(r'final after 2 turns · 5 calls · [\d,]+ tokens · .* · left: [\d,]+ tokens, 4 calls\n', out)
    assert sorted(no_seconds(out.splitlines())) == sorted(no_seconds(shown(show_trace, res.trace).splitlines()))

def test_a_run_that_goes_on_says_so(tmp_path, capsys):
    path = tmp_path/'run.jsonl'
    RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(x)'), checkpoint=path).completion('Q', 'text')
    path.write_bytes(b''.join(path.read_bytes().splitlines(True)[:-3]))
    RLM(ScriptedModel('FINAL(x)'), checkpoint=path, verbose=True).completion('Q', 'text')
    out = capsys.readouterr().out
    assert out.count('from the checkpoint') == 2 and 'final after 2 turns · 2 calls' in out


# hostile text

HOSTILE = ['\x1b[2J\x1b[H\x1b]0;owned\x07', '\x1b]52;c;aGFja2Vk\x07', '\x1b[?1049h\x1b[31m\x9b2J\x90q\x9c', 'a\rb\x08\x08c\x0b\x0c\x7f\x00', '\u202egnp.exe\u2066\u200f', '[bold red]markup[/] [link=file:///etc/passwd]x[/link] :smile:',
    '\ud83d lone \udcff', 'line\u2028next\x85', '\x1b', '\x1b[', '<script>alert(1)</script><img src=x onerror=alert(1)>', '</pre></details></div>', '$\\href{javascript:alert(1)}{x}$']

def hostile_trace():
    bad, t = ' '.join(HOSTILE), Trace()
    t.add('run', run='root', parent=None, depth=0, query=bad, model=bad, context=bad, settings={bad:bad})
    t.add('request', run='root', depth=1, step=bad, kind='sub', key=bad, messages=[dict(content=bad)])
    t.add('reply', run='root', depth=1, step=bad, kind='sub', key=bad, message=dict(content=bad), usage={}, cost=0)
    t.add('reply', run='root', depth=0, step=bad, kind='root', message=dict(content=f'{bad}\n```repl\n{bad}\n```', reasoning_content=bad, tool_calls=[dict(function=dict(name=bad, arguments=json.dumps(dict(python_code=bad))))]), usage={}, cost=0)
    t.add('cell', run='root', depth=0, step=1, code=bad + '!', output=bad, error=bad, cut=bad, lost=[bad])
    for kind in ('failed', 'guard', 'compact', 'protocol', bad): t.add(kind, run='root', name=bad, text=bad, error=bad, **{'x'+bad:bad})
    t.add('final', run='root', depth=0, answer=bad, stop_reason=bad, iterations=1, places=[dict(line=bad, item=bad, text=bad)])
    t.add('error', run='root', depth=0, error=bad, text=bad)
    return t

OWN = re.compile(r'\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[\d*A|\r')

@pytest.mark.parametrize('how', ['show_trace(t)', 'live = Live()\nfor e in t: live(e)\nlive.close()', 'list_traces([sys.argv[-1], "\\x1b[31m.jsonl"])', 'diff_traces(t, [])'])
def test_hostile_text_does_not_drive_the_terminal(how, tmp_path):
    path = hostile_trace().save(tmp_path/'bad.jsonl')
    code = f'import sys\nsys.argv.append({str(path)!r})\n{EVENTS}\nfrom rlm.trace import read_trace\nt = list(read_trace(sys.argv[-1]))\n{how}'
    with Terminal(code, 120, 300) as t:
        t.read()
        assert t.code == 0, t.text
        left = OWN.sub('', t.raw.decode())
        assert not [c for c in left if (ord(c) < 32 and c != '\n') or 0x7f <= ord(c) < 0xa0 or c in '\u202e\u2066\u200f'] and t.screen.title == '' and t.cursor_shown
        assert '[bold red]markup[/]' in t.text or 'list' in how

class Balance(HTMLParser):
    "Which elements and attributes there are; each must be closed"
    def __init__(self, text):
        super().__init__()
        self.tags, self.attrs, self.stack = set(), set(), []
        self.feed(text)
        self.close()
        assert not self.stack
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag); self.attrs.update(k for k,_ in attrs); self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop() == tag

SAFE = {'div', 'pre', 'details', 'summary', 'code'}

def test_hostile_text_is_text_in_a_notebook():
    page = Balance(hostile_trace()._repr_html_())
    assert page.tags <= SAFE and page.attrs <= {'class', 'style'}

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(HOSTILE), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=8), o, max_size=3), max_leaves=6)
FIELDS = 'places run parent depth step kind key query model context settings messages message usage cost seconds code output error cut lost name text answer stop_reason iterations t'.split()
EVENT = st.builds(lambda kind, fields: dict(v=1, n=0, t=0) | fields | dict(type=kind), st.sampled_from('run request reply cell failed guard compact protocol final error batch budget custom'.split()),
    st.dictionaries(st.sampled_from(FIELDS), VALUES | st.sampled_from(['root', 'sub', 'a', 'b']), max_size=8))

@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=8))
def test_any_events_can_be_shown(events):
    "A file that anyone wrote: no event, of whatever types its fields are, stops a view"
    told = shown(show_trace, events)
    assert clean(told) == told
    live = Live(io.StringIO())
    for e in events: live(e)
    assert Balance(run_html(events)).tags <= SAFE
    Balance(Trace(events=events)._repr_html_())
    summary(events)
    diff_traces(events, events[::-1], out=io.StringIO())


# size

def large(n):
    ev = []
    def add(type, **kw): ev.append(dict(v=1, n=len(ev), t=len(ev)/100, type=type, run='root', **kw))
    add('run', parent=None, query='q', model='m', context='str')
    while len(ev) < n:
        step, code = len(ev), f'x{len(ev)} = llm_query_batched(prompts)'
        add('reply', depth=0, step=step, kind='root', message=dict(content=f'I look.\n```repl\n{code}\n```'), usage=dict(prompt_tokens=1000, completion_tokens=50), cost=.001, seconds=1)
        for i in range(5): add('request', step=step, depth=1, kind='sub', key=f'{step}.{i}', messages=[dict(role='user', content='is it? '*50)])
        for i in range(5): add('reply', step=step, depth=1, kind='sub', key=f'{step}.{i}', message=dict(content='no'), usage=dict(prompt_tokens=100), cost=.0001, seconds=1)
        add('cell', step=step, depth=0, index=1, code=code, output='a line\n'*20, error=None, seconds=.1, cut=0, lost=[])
    add('final', depth=0, answer='42', stop_reason='final', iterations=9, seconds=9)
    return ev

def took(f, *args, **kw):
    "Seconds of work, however busy the machine is"
    t0 = time.process_time()
    f(*args, **kw)
    return time.process_time() - t0

class Tty(io.TextIOWrapper):
    def __init__(self): super().__init__(io.BytesIO(), encoding='utf-8')
    def isatty(self): return True

@pytest.fixture
def colours(monkeypatch):
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')

def test_ten_thousand_events_are_quick(colours):
    ev = large(10_000)
    live = Live(Tty(), 120)
    assert took(show_trace, ev, out=io.StringIO()) < 3
    assert took(show_trace, ev, out=Tty(), width=120) < 10
    assert took(lambda: [live(e) for e in ev]) < 10
    assert took(summary, ev) < 2
    page = []
    assert took(lambda: page.append(run_html(ev))) < 3
    assert len(page[0]) < 600_000 and 'more events' in page[0]
    Balance(page[0])

def test_a_megabyte_is_quick(colours):
    big = dict(line='x'*1_000_000, lines='line\n'*200_000, hostile='\x1b[31m\u202e\ud800'*150_000, words='word '*200_000, code='x = 1\n'*170_000)
    ev = [dict(v=1, n=0, t=0, type='run', run='root', parent=None, query=big['words'])]
    ev += [dict(v=1, n=0, t=0, type='cell', run='root', code=big['code'], output=o, error=None) for o in big.values()]
    ev += [dict(v=1, n=0, t=0, type='reply', run='root', kind='root', step=i, message=dict(content=o), usage={}) for i,o in enumerate(big.values())]
    ev += [dict(v=1, n=0, t=0, type='final', run='root', answer=big['words'], stop_reason='final')]
    for out in io.StringIO(), Tty(): assert took(show_trace, ev, out=out, width=120) < 8
    assert took(run_html, ev) < 8
    assert took(diff_traces, ev, [e | dict(output='y'*1_000_000) for e in ev], out=io.StringIO()) < 8

def test_many_runs_at_once_do_not_slow_the_display():
    live = Live(io.StringIO())
    live(dict(v=1, n=0, t=0, type='run', run='root', parent=None, query='q'))
    runs = [f'root/{i}' for i in range(2000)]
    def all_of(**e):
        for r in runs: live(dict(v=1, n=0, t=0, run=r, parent='root', query='q', kind='sub', key='k', message=dict(content='a'), usage={}, answer='a', **e))
    assert took(lambda: [all_of(type=t) for t in ('run', 'request', 'request', 'reply', 'final')]) < 8
    assert live.story.runs['root/1999'].label == '2000'


# files

def test_a_list_of_traces(tmp_path):
    for i,question in enumerate(['How many?', 'Which\n\x1b[31mone?']): RLM(ScriptedModel(repl_call('print(context)'), f'FINAL({i})'), checkpoint=tmp_path/f'{i}.jsonl').completion(question, 'text')
    (tmp_path/'rows.jsonl').write_text('{"no": 1}\n')
    (tmp_path/'torn.jsonl').write_bytes((tmp_path/'0.jsonl').read_bytes()[:-40])
    out = shown(list_traces, [tmp_path, tmp_path/'none.jsonl'])
    lines = out.splitlines()
    assert lines[0].split() == 'file question model turns calls tokens cost seconds ended'.split()
    assert [o.split()[0].rpartition('/')[2] for o in lines[1:4]] == ['0.jsonl', '1.jsonl', 'torn.jsonl'] and len(lines) == 5
    assert re.search(r'/1\.jsonl +Which one\? +scripted +2 +2 +[\d,]+ +\$0\.0000 +\d\.\d +final$', out, re.M) and re.search(r'torn.*not ended', out) and 'No such file' in lines[4]
    narrow = shown(list_traces, [tmp_path], width=80).splitlines()
    assert narrow[0].split() == 'file question turns calls tokens cost seconds ended'.split() and max(map(len, narrow)) <= 80 and narrow[2].startswith('…') and narrow[2].endswith('final')

def test_two_runs_side_by_side():
    a = RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(one)')).completion('Q', 'text').trace
    b = RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(two)'), budget=Budget(calls=5)).completion('Q', 'text').trace
    out = shown(diff_traces, a, b)
    assert 'turn 1: the same' in out and '    -one\n    +two\n' in out and "+{'calls': 5}" in out and re.search(r'^calls +2 +2$', out, re.M)
    assert diff_traces(a, b, out=io.StringIO()) and not diff_traces(a, a, out=io.StringIO())


# in a notebook

def test_a_result_shows_its_answer_first():
    res = RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(<b>five</b>)')).completion('How <many>?', '<i>text</i>')
    for page in res._repr_html_(), res.trace._repr_html_():
        assert Balance(page).tags == SAFE and page.index(html.escape('<b>five</b>')) < page.index('<details>') and html.escape('<i>text</i>') in page
    assert 'final after 2 turns' in res._repr_markdown_()

def test_a_stream_is_shown_in_a_notebook():
    from execnb.shell import CaptureShell
    sh = CaptureShell()
    sh.user_ns['rlm'] = RLM(ScriptedModel(repl_call('print(context)'), 'FINAL(five)'))
    out = sh.run("from rlm.show import show_live\nres = show_live(rlm.stream('How many?', 'text'), every=0)\nprint(res.answer)")
    assert not sh.exc and 'five' in str(out)
    pages = [''.join(o['data'].get('text/html', '')) for o in out if 'data' in o]
    assert pages and all(Balance(p).tags <= SAFE for p in pages)

def test_a_stream_is_shown_without_one():
    out = in_pipe(EVENTS + 't = Trace()\nrun(t)\nprint(show_live(iter([*t, "the result"])))')[0]
    assert out.startswith('? How many lines') and out.endswith('tokens\nthe result\n')
