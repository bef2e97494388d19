"The command `rlm` as a user meets it: a process with arguments, streams and an exit code"
import json, os, pty, resource, select, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from ollama_server import OllamaServer, code as ollama_code
from rlm_process import Rlm
from scripted_server import Reply, ScriptedServer, closed_port, code, hang, message

rlm = [sys.executable, '-c', 'from rlm.cli import main; raise SystemExit(main())']
KEYS = 'OPENAI_', 'ANTHROPIC_', 'TOGETHER_', 'GROQ_', 'FIREWORKS_', 'OPENROUTER_'
env = {k: v for k, v in os.environ.items() if (not k.startswith('RLM_') or k.startswith('RLM_LOCAL')) and not k.startswith(KEYS)} | dict(
    PYTHONIOENCODING='utf-8', XDG_CONFIG_HOME='/nowhere', OLLAMA_HOST=f'127.0.0.1:{closed_port()}')

@pytest.fixture(scope='module', autouse=True)
def warm():
    global started
    started = Rlm()
    yield
    started.close()

def run(*args, input=None, **kw): return started.run(args, env | kw.pop('env', {}), input, **kw)
def run_anew(*args): return subprocess.run([*rlm, *args], capture_output=True, env=env, timeout=120)

def to(server): return '--model', 'openai/scripted', '--base-url', server.url, '--api-key', 'none'

@pytest.fixture
def notes(tmp_path):
    path = tmp_path/'notes.txt'
    path.write_text('first line\nThe café opens at nine.\nlast line\n', encoding='utf-8')
    return path

def refused(r, *words):
    "One line, exit code 2"
    said = r.stderr.decode()
    assert (r.returncode, r.stdout, said.count('\n')) == (2, b'', 1), said
    assert said.startswith('rlm: ') and 'Traceback' not in said
    for word in words: assert word in said

# Without a model -----------------------------------------------------------------------------------------------------
def test_help_is_quick():
    "In seconds of the processor, which a busy machine does not change: the process waits for nothing"
    def used(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = used()
    assert b'demo' in run_anew('--help').stdout
    assert used() - start < 0.4

def test_version():
    import rlm as package
    assert run('--version').stdout.decode() == f'rlm {package.__version__}\n'

@pytest.mark.parametrize('command', ['demo', 'ask', 'bench', 'serve'])
def test_each_command_has_help(command): assert run(command, '--help').stdout.startswith(f'usage: rlm {command}'.encode())

def test_no_command(): assert run().returncode == 2

@pytest.mark.parametrize('option', [('--lines', '0'), ('--lines', 'many'), ('--seed', 'x'), ('--max-steps', '-1')])
def test_bad_numbers(option): assert run('demo', *option).returncode == 2

bad_files = dict(nul=b'abc\0def', png=b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', empty=b'', blank=b' \n\n', latin1='caf\xe9'.encode('latin-1'))

@pytest.mark.parametrize('name,words', [('nul', 'not a text file'), ('png', 'not a text file'), ('empty', 'empty'), ('blank', 'empty'), ('latin1', '--encoding')])
def test_files_that_are_no_text(tmp_path, name, words):
    path = tmp_path/name
    path.write_bytes(bad_files[name])
    refused(run('ask', 'What?', path), words, name)

def test_other_mistakes(tmp_path, notes):
    refused(run('ask', 'What?', tmp_path/'none.txt'), 'none.txt: no such file')
    (tmp_path/'empty').mkdir()
    refused(run('ask', 'What?', tmp_path/'empty'), 'nothing to read')
    refused(run('ask', '  ', notes), 'question is empty')
    refused(run('ask', 'What?', notes, '--base-url', 'http://127.0.0.1:1'), '--model')
    refused(run('ask', 'What?', notes, '--encoding', 'utf-99'), 'utf-99')
    refused(run('ask', 'What?', '-', input=b''), 'stdin is empty')

def test_debug_shows_the_traceback(tmp_path):
    for args in (('--debug', 'ask'), ('ask', '--debug')):
        r = run(*args, 'What?', tmp_path/'none.txt')
        assert r.returncode and b'Traceback' in r.stderr

# With a scripted model -----------------------------------------------------------------------------------------------
def test_answer_on_stdout_steps_on_stderr(notes):
    with ScriptedServer(code("context.split('\\n')[1]"), 'FINAL(nine)') as s:
        r = run('ask', 'When does the café open?', notes, *to(s))
    assert (r.returncode, r.stdout) == (0, b'nine\n'), r.stderr.decode()
    said = r.stderr.decode()
    assert "> context.split('\\n')[1]" in said and "< 'The café opens at nine.'" in said and '10 tokens read' in said
    assert '\x1b' not in said
    assert s.messages[0][1]['content'] == 'When does the café open?'

def test_json(notes):
    with ScriptedServer(code('x = context'), 'FINAL(nine "o\'clock")') as s:
        r = run('ask', 'When?', notes, '--json', '--quiet', *to(s))
    found = json.loads(r.stdout)
    assert r.stderr == b'' and r.stdout.count(b'\n') == 1
    assert (found['answer'], found['steps'], found['stop_reason'], found['model']) == ('nine "o\'clock"', 2, 'final', 'openai/scripted')
    assert found['usage']['calls'] == 2 and found['usage']['prompt_tokens'] == 20

def test_several_files_and_stdin(tmp_path, notes):
    other = tmp_path/'other.txt'
    other.write_bytes('\ufeffsecond file\r\nends'.encode())
    with ScriptedServer(code('FINAL(context)')) as s:
        r = run('ask', 'What?', notes, other, '-', *to(s), input='from stdin ü'.encode())
    assert r.stdout.decode() == f'==> {notes} <==\n{notes.read_text(encoding="utf-8")}\n==> {other} <==\nsecond file\nends\n==> - <==\nfrom stdin ü\n'

def test_the_answer_is_found_in_a_file_and_a_line(tmp_path):
    paths = [tmp_path/'one.txt', tmp_path/'two.txt']
    paths[0].write_text('nothing here\n'*3)
    paths[1].write_text('first\nOslo is QX-7731 to us\nlast')
    def go(*more):
        with ScriptedServer(code('print(context[context.find("Oslo"):][:30])'), 'FINAL(QX-7731)') as s: return run('ask', 'Which?', *paths, *more, *to(s))
    r = go()
    assert r.stdout == b'QX-7731\n' and r.stderr.decode().endswith(f'found in {paths[1]}:2\n')
    assert json.loads(go('--json', '--quiet').stdout)['found_in'] == [f'{paths[1]}:2']

def test_encodings(tmp_path):
    path = tmp_path/'text'
    for data, args in (('grüße'.encode('utf-16'), ()), ('grüße'.encode('latin-1'), ('--encoding', 'latin-1')), ('grüße'.encode('utf-16-le'), ('--encoding', 'utf-16-le'))):
        path.write_bytes(data)
        with ScriptedServer(code('FINAL(context)')) as s: assert run('ask', 'What?', path, *args, *to(s)).stdout.decode() == 'grüße\n'

def test_fallback_is_said(notes):
    with ScriptedServer(code('x = 1'), 'It opens at nine.') as s:
        r = run('ask', 'When?', notes, '--max-steps', 1, *to(s))
    assert (r.returncode, r.stdout) == (0, b'It opens at nine.\n')
    assert b'did not end the run within 1 step' in r.stderr

def test_wrong_key_and_no_server(notes):
    with ScriptedServer('FINAL(x)', key='right') as s:
        refused_last(run('ask', 'What?', notes, '--model', 'openai/scripted', '--base-url', s.url, '--api-key', 'wrong-key-123'), 'api_key')
    refused_last(run('ask', 'What?', notes, '--model', 'openai/x', '--base-url', f'http://127.0.0.1:{closed_port()}/v1', '--api-key', 'none'), 'base_url')
    refused_last(run('ask', 'What?', notes, '--model', 'no-such-model'), 'model')

def test_no_key_and_no_such_provider(notes):
    refused_last(run('ask', 'What?', notes, '-m', 'openai/gpt-4o-mini'), 'api_key=')
    refused_last(run('ask', 'What?', notes, '-m', 'nobody/model'), 'provider/name')
    refused(run('ask', 'What?', notes, '-q', '-m', 'anthropic/'), 'no name of a model')

def refused_last(r, *words):
    "As `refused`, after progress"
    last = r.stderr.decode().splitlines()[-1]
    assert (r.returncode, r.stdout) == (2, b'') and last.startswith('rlm: ') and b'Traceback' not in r.stderr, r.stderr.decode()
    for word in words: assert word in last

def test_bench(tmp_path):
    from rlm.cli import held_out
    gold = [t.answers[0] for t in held_out(3, 10, 'needle', 1000)]
    with ScriptedServer(code('len(context)'), f'FINAL({gold[0]})', 'FINAL(no idea)', f'FINAL({gold[2]})') as s:
        r = run('bench', 'tasks', '-n', 3, '--seed', 10, '--family', 'needle', '--lines', 1000, '--json', tmp_path/'score.json', *to(s))
    assert r.returncode == 0, r.stderr.decode()
    table = r.stdout.decode()
    assert '| all | 3 | 2 | 66.7% | 21% to 94% | 1.3 | 20 |' in table and 'openai/scripted, what tasks, seed 10; 4 calls, 60 tokens' in table
    assert [line.split()[1] for line in r.stderr.decode().splitlines()] == ['right', 'WRONG', 'right']
    found = json.loads((tmp_path/'score.json').read_text())
    assert (found['n'], found['right'], found['model'], [row['right'] for row in found['rows']]) == (3, 2, 'openai/scripted', [True, False, True])

def test_bench_questions():
    with ScriptedServer('FINAL(PEP 572)', 'FINAL(PEP 1)') as s: r = run('bench', 'questions', '-n', 2, *to(s))
    assert r.returncode == 0 and '| all | 2 | 1 | 50.0% |' in r.stdout.decode(), r.stderr.decode()

def test_bench_mistakes(tmp_path):
    with ScriptedServer() as s:
        refused(run('bench', 'tasks', '--family', 'none', *to(s)), 'needle')
        refused(run('bench', 'tasks', '--json', tmp_path/'no'/'x.json', *to(s)), 'x.json')
    assert not s.requests

def test_environment_names_the_model(notes):
    with ScriptedServer(code('context'), 'FINAL(nine)') as s:
        r = run('ask', 'When?', notes, env=dict(RLM_MODEL='openai/scripted', RLM_BASE_URL=s.url, RLM_API_KEY='none'))
    assert r.stdout == b'nine\n', r.stderr

hostile = '\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m \x1b]52;c;aGk=\x1b\\[bold]x[/bold] \u202eback'

def on_a_terminal(args, **extra):
    "Run with a terminal as stdout and stderr; returns what it got"
    main, side = pty.openpty()
    p = started.start(args, env | dict(TERM='xterm-256color') | extra, side, side, side, terminal=True)
    os.close(side)
    got, end = b'', time.time() + 60
    while time.time() < end:
        if not select.select([main], [], [], 1)[0]: continue
        try: piece = os.read(main, 65536)
        except OSError: break
        if not piece: break
        got += piece
    os.close(main)
    assert p.wait(10) == 0, got
    return got.decode()

@pytest.mark.parametrize('no_color', [False, True])
def test_hostile_text_on_a_terminal(notes, no_color):
    "Neither code, output, message nor answer moves the cursor, sets the title or the clipboard, or is read as markup"
    with ScriptedServer(code(f'print({hostile!r}) # {hostile} context', content=hostile), f'FINAL({hostile})') as s:
        got = on_a_terminal(['ask', 'What?', notes, *to(s)], **({'NO_COLOR': '1'} if no_color else {}))
    for bad in '\x1b]', '\x1b[2J', '\x9b', '\u202e', '\x07': assert bad not in got
    assert 'red [bold]x[/bold] back' in got
    assert ('\x1b[' in got) != no_color

def test_interrupt(notes):
    with ScriptedServer(hang(20)) as s:
        p = subprocess.Popen([*rlm, 'ask', 'What?', str(notes), *to(s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        end = time.time() + 60
        while not s.requests and time.time() < end: time.sleep(0.05)
        time.sleep(0.2)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=15)
    assert (p.returncode, out) == (130, b'')
    assert err.decode().endswith('rlm: interrupted\n') and b'Traceback' not in err

def test_an_interrupted_score_keeps_what_was_measured(tmp_path):
    with ScriptedServer('FINAL(1)', 'FINAL(2)', hang(20)) as s:
        p = subprocess.Popen([*rlm, 'bench', 'tasks', '-n', '4', '--lines', '1000', '--json', str(tmp_path/'score.json'), *to(s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        end = time.time() + 60
        while len(s.requests) < 3 and time.time() < end: time.sleep(0.05)
        time.sleep(0.2)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=15)
    assert p.returncode == 130 and err.decode().endswith('rlm: interrupted\n') and '| all | 2 |' in out.decode()
    assert [row['answer'] for row in json.loads((tmp_path/'score.json').read_text())['rows']] == ['1', '2']

def test_reader_gone(notes):
    with ScriptedServer(code('context'), 'FINAL(' + 'x' * 1_000_000 + ')') as s:
        p = subprocess.Popen([*rlm, 'ask', 'What?', str(notes), *to(s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        p.stdout.close()
        err = p.stderr.read()
        p.stderr.close()
        assert p.wait(60) == 1 and b'Traceback' not in err and b'Exception ignored' not in err, err.decode()

# Every option, against Ollama's protocol with the bundled model behind it, or a script in its place --------------------
FIND = "import re\nprint(re.search(r'magic number is (\\d+)', context)[1])"
def seen(body): return f"FINAL({body['messages'][-1]['content'].split()[0]})"
def finds(n=1): return [ollama_code(FIND), seen] * n

def test_options_reach_ollama(notes):
    with OllamaServer(ollama_code('print(context)', thinking='Let me look.'), 'FINAL(nine)') as s:
        r = run('ask', 'When?', notes, '-m', 'thinker:4b', '--host', s.host, '--num-ctx', '4_096', '--temperature', '.3', '--think')
    assert (r.returncode, r.stdout) == (0, b'nine\n'), r.stderr.decode()
    assert all((b['model'], b['think'], b['options']) == ('thinker:4b', True, dict(num_ctx=4096, temperature=.3)) for b in s.chats) and len(s.chats) == 2

@pytest.mark.parametrize('args,sent', [(['--no-think'], False), ([], None)])
def test_thinking_is_a_choice(notes, args, sent):
    with OllamaServer(ollama_code('print(context)'), 'FINAL(nine)') as s: assert run('ask', 'When?', notes, '-m', 'thinker:4b', *args, env=dict(OLLAMA_HOST=s.host)).returncode == 0
    assert all(b.get('think') == sent and b['options']['num_ctx'] == 40960 for b in s.chats)

def test_a_model_without_tools_gets_the_fenced_protocol(notes):
    with OllamaServer('```repl\nprint(context)\n```', 'FINAL(nine)') as s: r = run('ask', 'When?', notes, '-m', 'plain:135m', '--host', s.host)
    assert r.stdout == b'nine\n' and not any(b.get('tools') for b in s.chats), r.stderr.decode()

def test_sub_calls_go_to_the_recursive_model(notes):
    with OllamaServer(ollama_code("print(llm_query('Is nine early? ' + context))"), 'yes it is', 'FINAL(early)') as s:
        r = run('ask', 'Early?', notes, '-m', 'thinker:4b', '-r', 'smol:135m', '--host', s.host, '--temperature', '0')
    assert r.stdout == b'early\n', r.stderr.decode()
    assert [b['model'] for b in s.chats] == ['thinker:4b', 'smol:135m', 'thinker:4b'] and s.chats[1]['options']['num_ctx'] == 8192 and b'yes it is' in r.stderr

def test_what_ollama_lacks_is_said(notes):
    with OllamaServer(signed_in=False) as s:
        refused_last(run('ask', 'When?', notes, '-m', 'nothing:1b', '--host', s.host), 'ollama pull nothing:1b')
        refused_last(run('ask', 'When?', notes, '-m', 'glm-5:cloud', '--host', s.host), 'ollama signin')
    refused_last(run('ask', 'When?', notes, '-m', 'qwen3:4b'), 'ollama serve', 'bundled')

@pytest.mark.parametrize('option,limit,words', [('--budget-calls', 2, '2 calls'), ('--budget-tokens', 60, '60 tokens'), ('--budget-seconds', .5, '0.5 seconds'), ('--max-iterations', 1, '1 steps')])
def test_limits(notes, option, limit, words):
    def slowly(body): return Reply(code('print(context)') if body.get('tools') else message('FINAL(so far)'), delay=.3)
    with ScriptedServer(slowly) as s: r = run('ask', 'When?', notes, option, limit, '--json', *to(s))
    found = json.loads(r.stdout)
    assert found['stop_reason'] in ('calls', 'tokens', 'seconds', 'iterations') and f'within {words}' in r.stderr.decode() and len(s.requests) < 6

def test_a_budget_of_money(notes):
    with ScriptedServer(lambda body: code('print(context)') if body.get('tools') else message('FINAL(so far)')) as s:
        r = run('ask', 'When?', notes, '--model', 'openai/gpt-4o-mini', '--base-url', s.url, '--api-key', 'none', '--budget-cost', '.00001', '--json')
    assert json.loads(r.stdout)['stop_reason'] == 'cost' and b'within $1e-05' in r.stderr, r.stderr.decode()

@pytest.mark.parametrize('repl', ['monty', 'jail', 'process', 'ipython'])
def test_each_repl(notes, repl):
    with ScriptedServer(code('n = len(context)'), code('FINAL(n)')) as s: r = run('ask', 'How long?', notes, '--repl', repl, '--json', '-q', *to(s))
    if repl == 'jail' and r.returncode == 2: pytest.skip(r.stderr.decode())
    assert json.loads(r.stdout)['answer'] == '45', r.stderr.decode()

def test_the_sandbox_is_the_default(notes):
    with ScriptedServer(code('print(len(context))\nprint(open("/etc/passwd").read())'), 'FINAL(no)') as s: r = run('ask', 'Where?', notes, *to(s))
    said = s.messages[-1][-1]['content']
    assert 'Error' in said and 'root:' not in said

def test_child_runs(notes):
    def reply(body):
        if any('first word' in str(m['content']) for m in body['messages'][:2]): return code('FINAL(context.split()[0])')
        return 'FINAL(last)' if any(m['role'] == 'tool' for m in body['messages']) else code("print(rlm_query('What is the first word?', 'last line'), len(context))")
    with ScriptedServer(reply) as s: r = run('ask', 'Which?', notes, '--depth', 2, '--json', '-q', *to(s))
    found = json.loads(r.stdout)
    assert found['answer'] == 'last' and found['usage']['calls'] == 3, s.messages

# Saved runs ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def runs(tmp_path_factory, warm):
    "Two saved runs, the first with its page"
    d = tmp_path_factory.mktemp('runs')
    (d/'notes.txt').write_text('first line\nThe café opens at nine.\n')
    for name, answer in ('a', 'nine'), ('b', 'ten'):
        with ScriptedServer(code('print(context)'), f'FINAL({answer})') as s: r = run('ask', 'When?', 'notes.txt', '--save', f'{name}.jsonl', '--html', f'{name}.html', *to(s), cwd=d)
        assert r.returncode == 0, r.stderr.decode()
    return d

def test_a_saved_run_and_its_page(runs):
    from rlm.trace import read_trace
    assert [e['type'] for e in read_trace(runs/'a.jsonl')][-1] == 'final' and 'nine' in (runs/'a.html').read_text() and '<html' in (runs/'a.html').read_text()[:500].lower()

def test_asked_again_nothing_is_paid_again(runs, tmp_path):
    (tmp_path/'a.jsonl').write_bytes((runs/'a.jsonl').read_bytes())
    with ScriptedServer() as s: r = run('ask', 'When?', 'notes.txt', '--save', tmp_path/'a.jsonl', *to(s), cwd=runs)
    assert (r.returncode, r.stdout, s.requests) == (0, b'nine\n', []), r.stderr.decode()

def test_trace_commands(runs, tmp_path):
    listed = run('trace', 'ls', cwd=runs).stdout.decode()
    assert 'a.jsonl' in listed and 'b.jsonl' in listed and 'When?' in listed and run('trace', 'ls', runs/'a.jsonl').returncode == 0
    shown = run('trace', 'show', runs/'a.jsonl').stdout.decode()
    assert '> print(context)' in shown and 'FINAL(nine)' in shown
    assert run('trace', 'diff', runs/'a.jsonl', runs/'a.jsonl').returncode == 0
    differ = run('trace', 'diff', runs/'a.jsonl', runs/'b.jsonl')
    assert differ.returncode == 1 and 'ten' in differ.stdout.decode()
    assert run('trace', 'html', runs/'b.jsonl', '-o', tmp_path/'b.html').stdout.decode() == f"{tmp_path/'b.html'}\n" and 'ten' in (tmp_path/'b.html').read_text()
    refused(run('trace', 'show', tmp_path/'none.jsonl'), 'none.jsonl: No such file')
    refused(run('trace', 'show', runs), 'rlm trace ls')
    (tmp_path/'empty.jsonl').touch()
    refused(run('trace', 'html', tmp_path/'empty.jsonl'), 'is empty')
    refused(run('trace', 'show', runs/'notes.txt'), 'is not a trace')
    refused(run('trace', 'ls', tmp_path/'none'), 'none')
    (tmp_path/'nothing').mkdir()
    refused(run('trace', 'ls', tmp_path/'nothing'), '--save run.jsonl')

def test_a_place_that_cannot_be_written_costs_nothing(notes, tmp_path):
    with ScriptedServer() as s:
        for option in '--save', '--html': refused_last(run('ask', 'When?', notes, option, tmp_path/'no'/'file', *to(s)), 'cannot be written')
        refused_last(run('ask', 'When?', notes, '--save', tmp_path, *to(s)), 'is a folder')
    assert not s.requests

# What ask reads ------------------------------------------------------------------------------------------------------
def test_folders_patterns_and_pages(tmp_path):
    (tmp_path/'src').mkdir()
    for name, text in {'src/a.md': '# Heading', 'src/b.csv': 'x,y\n1,2', 'src/c.json': '{"k": 1}', 'src/d.py': 'def f(): pass', 'page.html': '<p>Hello <b>you</b></p><script>no()</script>'}.items(): (tmp_path/name).write_text(text)
    with ScriptedServer(code('FINAL(context)')) as s: text = run('ask', 'What?', 'src', 'pa*.html', '-q', *to(s), cwd=tmp_path).stdout.decode()
    for o in '# Heading', 'x,y', '{"k": 1}', 'def f()', 'Hello you': assert o in text
    assert 'no()' not in text
    with page_server(b'<h1>News</h1><p>The caf\xc3\xa9 moved.</p>') as url, ScriptedServer(code('FINAL(context)')) as s: text = run('ask', 'What?', url, '-q', *to(s)).stdout.decode()
    assert 'News' in text and 'The café moved.' in text and '<p>' not in text

@contextmanager
def page_server(body):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Type', 'text/html; charset=utf-8')
            self.end_headers()
            self.wfile.write(body)
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    try: yield f'http://127.0.0.1:{httpd.server_port}/'
    finally:
        httpd.shutdown()
        httpd.server_close()

def test_five_gigabytes(tmp_path):
    "The sandbox says what to do; a process reads it where it lies"
    path = tmp_path/'huge.log'
    line = b'nothing happened here, as on most days of the year\n' * 20_000
    with open(path, 'wb') as f:
        f.write(line)
        f.truncate(5_000_000_000)
    r = run('ask', 'What?', path)
    assert (r.returncode, r.stdout) == (2, b'') and r.stderr.count(b'\n') == 1 and b'Traceback' not in r.stderr, r.stderr.decode()

# Models, needles, comparisons ----------------------------------------------------------------------------------------
def test_models():
    with OllamaServer() as s: r = run('models', '--host', s.host, '--json', env=dict(OPENAI_API_KEY='sk-x'))
    rows = json.loads(r.stdout)['models']
    assert r.returncode == 0 and {o['name'] for o in rows} >= {'smol:135m', 'glm-5:cloud', 'openai/gpt-4o-mini'} and 'bundled' in {o['provider'] for o in rows} and b'sk-x' not in r.stdout
    plain = run('models').stdout.decode()
    assert 'ollama serve' in plain and 'bundled' in plain

def test_niah():
    with OllamaServer(*finds()) as s: r = run('niah', '-m', 'smol:135m', '--host', s.host, '--lines', 500, '--seed', 3, '--json', '-q')
    found = json.loads(r.stdout)
    assert r.returncode == 0 and r.stderr == b'' and found['right'] and (found['lines'], found['seed'], found['iterations']) == (500, 3, 2) and len(found['expected']) == 7, r.stderr.decode()
    with OllamaServer(ollama_code('print(context[:5])'), 'FINAL(1)') as s: assert run('niah', '-m', 'smol:135m', '--host', s.host, '--lines', 500).returncode == 1

def test_bench_models(tmp_path):
    with OllamaServer(*finds(4)) as s, OllamaServer(*finds(2)) as other:
        r = run('bench', 'models', '--no-local', '--ollama', 'smol:135m', f'{other.url}/thinker:4b', '--ollama', 'nothing:1b', '--ollama-host', s.host, '--no-cloud-auto', '--lines', 300, '--trials', 2, '--seed', 5,
            '--think', '--num-ctx', 2048, '--temperature', 0, '--json', tmp_path/'t.json', '--plot', tmp_path/'t.svg', env=dict(OPENAI_API_KEY='sk-never'))
    table = r.stdout.decode()
    assert r.returncode == 0 and table.split('\n')[0].split() == ['model', 'provider', 'accuracy', 'time', 'iterations', 'tokens', 'cost'], r.stderr.decode()
    rows = json.loads((tmp_path/'t.json').read_text())['rows']
    assert [(o['model'], o['n'], o['right']) for o in rows] == [('smol:135m', 2, 2), ('thinker:4b', 2, 2), ('nothing:1b', 0, 0)] and 'ollama pull nothing:1b' in table
    assert [t['seed'] for t in rows[0]['trials']] == [5, 6] and (tmp_path/'t.svg').read_text().lstrip().startswith('<?xml') and 'gpt-4o' not in table
    assert all(b['options'] == dict(num_ctx=2048, temperature=0) for b in s.chats) and len(s.chats) == 4 and all(b['think'] for b in other.chats) and b'6/6' in r.stderr

def test_bench_models_of_clouds():
    "A key that no cloud knows costs a row, not the table; no request leaves the machine, since the address is here"
    with ScriptedServer(key='right') as s:
        r = run('bench', 'models', '--no-local', '--cloud', 'openai:gpt-4o-mini', '--lines', 100, '--trials', 1, '--json', '-', env=dict(OPENAI_API_KEY='sk-wrong', OPENAI_BASE_URL=s.url, OPENAI_API_BASE=s.url))
    assert r.returncode == 1 and 'AuthError' in json.loads(r.stdout)['rows'][0]['error'] and b'sk-wrong' not in r.stdout + r.stderr, r.stderr.decode()
    refused(run('bench', 'models', '--no-local', '--no-cloud-auto'), '--ollama', '--cloud')
    refused(run('bench', 'models', '--plot', 'table.zzz'), '.svg')

def test_a_bar_on_a_terminal():
    with OllamaServer(*finds()) as s: got = on_a_terminal(['bench', 'models', '--no-local', '--no-cloud-auto', '--ollama', 'smol:135m', '--host', s.host, '--lines', 200, '--trials', 1])
    assert '100%' in got and 'smol:135m: right' in got

# Defaults, help, completion ------------------------------------------------------------------------------------------
def test_defaults_from_the_file(notes, tmp_path):
    config = tmp_path/'rlm'/'config.toml'
    config.parent.mkdir()
    with OllamaServer(*[ollama_code('print(context)'), 'FINAL(nine)'] * 3) as s:
        config.write_text(f'host = "{s.host}"\nmodel = "thinker:4b"\n[ask]\nnum_ctx = 4096\nthink = true\nquiet = true\n')
        at = dict(XDG_CONFIG_HOME=str(tmp_path))
        r = run('ask', 'When?', notes, env=at)
        assert (r.returncode, r.stdout, r.stderr) == (0, b'nine\n', b'')
        run('ask', 'When?', notes, '--no-think', '-m', 'smol:135m', env=at)
        run('ask', 'When?', notes, env=at | dict(RLM_MODEL='gpt-oss:20b'))
    assert [(b['model'], b.get('think'), b['options']['num_ctx']) for b in s.chats[::2]] == [('thinker:4b', True, 4096), ('smol:135m', None, 4096), ('gpt-oss:20b', 'medium', 4096)]

@pytest.mark.parametrize('text,words', [('modell = "x"', "no option 'modell'"), ('[ask]\nlines = 3', 'rlm ask has no option'), ('num_ctx = "many"', 'not a whole number'), ('repl = "bash"', 'monty, jail'), ('model = ', 'config.toml'), ('think = 3', 'true or false')])
def test_mistakes_in_the_file(notes, tmp_path, text, words):
    (tmp_path/'rlm').mkdir()
    (tmp_path/'rlm'/'config.toml').write_text(text)
    refused(run('ask', 'When?', notes, env=dict(XDG_CONFIG_HOME=str(tmp_path))), words, 'config.toml')

def test_each_help_shows_an_example():
    from rlm.cli import COMMANDS
    assert set(COMMANDS) >= {'demo', 'ask', 'chat', 'bench models', 'bench repl', 'niah', 'models', 'trace ls', 'trace show', 'trace diff', 'trace html', 'serve', 'completion'}
    for words in COMMANDS: assert f'examples:\n  rlm {words}' in run(*words.split(), '--help').stdout.decode(), words

def complete(line, script):
    words = line.split(' ')
    test = f'{script}\nCOMP_WORDS=({" ".join(repr(o) for o in words)}); COMP_CWORD={len(words)-1}; _rlm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(['bash', '-c', test], capture_output=True, text=True).stdout.split()

def test_completion_in_bash():
    script = run('completion', 'bash').stdout.decode()
    assert complete('rlm b', script) == ['bench'] and set(complete('rlm bench ', script)) >= {'models', 'tasks', 'loop', 'repl'}
    assert complete('rlm ask --num', script) == ['--num-ctx'] and complete('rlm ask --repl m', script) == ['monty'] and complete('rlm trace sh', script) == ['show']
    for shell in 'zsh', 'fish': assert 'bench' in run('completion', shell).stdout.decode()

# With the bundled model ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_demo(seed):
    "A million lines; within a time that leaves room for a busy machine"
    pytest.importorskip('xllamacpp')
    start = time.perf_counter()
    r = run('demo', '--seed', seed)
    out = r.stdout.decode()
    assert r.returncode == 0, out + r.stderr.decode()
    assert '1,000,000 lines' in out and 'turn 1' in out and 'truth:' in out and out.splitlines()[-1].startswith('right, ')
    assert time.perf_counter() - start < 60

@pytest.mark.slow
def test_ask_with_the_bundled_model(tmp_path):
    pytest.importorskip('xllamacpp')
    path = tmp_path/'log.txt'
    path.write_text('\n'.join(f'{i} nothing happened' for i in range(5000)) + '\nThe magic number is 4721.\n')
    r = run('ask', 'What is the magic number?', path)
    assert (r.returncode, r.stdout) == (0, b'4721\n'), r.stderr.decode()

@pytest.mark.slow
def test_serve():
    pytest.importorskip('xllamacpp')
    from openai import OpenAI
    p = subprocess.Popen([*rlm, 'serve', '--port', '0', '--key', 'a key'], stdout=subprocess.PIPE, env=env, text=True)
    try:
        url = p.stdout.readline().split()[2]
        assert [m.id for m in OpenAI(base_url=url, api_key='a key').models.list()] == ['rlm-smollm2-135m']
    finally: p.send_signal(signal.SIGINT)
    assert p.wait(20) == 0
    p.stdout.close()

@pytest.mark.slow
def test_through_a_gateway(tmp_path, notes):
    "A LiteLLM proxy in front of the bundled model: an answer, its list, a wrong key, an unknown model"
    for o in 'xllamacpp', 'fastapi': pytest.importorskip(o)
    from rlm.local import MODEL, LocalServer
    from test_proxy import Gateway
    path = tmp_path/'log.txt'
    path.write_text('\n'.join(f'{i} nothing happened' for i in range(5000)) + '\nThe magic number is 4721.\n')
    with LocalServer() as model, Gateway(model, tmp_path/'log') as g:
        at = dict(RLM_BASE_URL=g.url, RLM_API_KEY=g.key)
        r = run('ask', 'What is the magic number?', path, '-m', MODEL, env=at)
        assert (r.returncode, r.stdout) == (0, b'4721\n'), r.stderr.decode()
        r = run('chat', '-c', path, '-m', f'openai/{MODEL}', '--base-url', g.url, '--api-key', g.key, '--temperature', '0', input=b'What is the magic number?\n/cost\n')
        assert r.stdout.startswith(b'4721\n') and b' calls' in r.stdout, r.stderr.decode()
        assert f'openai/{MODEL}' in [o['name'] for o in json.loads(run('models', '--json', env=at).stdout)['models']]
        r = run('niah', '-m', MODEL, '--lines', 2000, '--seed', 1, '--json', '-q', env=at)
        assert json.loads(r.stdout)['right'], r.stderr.decode()
        refused_last(run('ask', 'What?', notes, '-m', MODEL, '--base-url', g.url, '--api-key', 'sk-wrong-0123456789'), 'api_key')
        refused_last(run('ask', 'What?', notes, '-m', 'unheard-of', env=at), 'model')

@pytest.mark.slow
def test_needles_with_the_bundled_model():
    pytest.importorskip('xllamacpp')
    r = run('bench', 'models', '--lines', 1000, '--trials', 2, '--no-cloud-auto')
    assert r.returncode == 0 and 'bundled  bundled   100% (2 of 2' in r.stdout.decode(), r.stdout.decode()
    r = run('niah', '--seed', 1)
    assert r.returncode == 0 and 'right' in r.stdout.decode(), r.stderr.decode()

@pytest.mark.slow
def test_bench_repl(tmp_path):
    r = run('bench', 'repl', '--json', tmp_path/'repl.json')
    assert r.returncode == 0 and 'monty' in r.stdout.decode() and 'monty' in (tmp_path/'repl.json').read_text(), r.stderr.decode()
