"The command `rlm` as a user meets it: a process with arguments, streams and an exit code"
import json, os, pty, resource, select, signal, subprocess, sys, time
import pytest
from rlm_process import Rlm
from scripted_server import ScriptedServer, closed_port, code, hang

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

def test_reader_gone(notes):
    with ScriptedServer(code('context'), 'FINAL(' + 'x' * 1_000_000 + ')') as s:
        p = subprocess.Popen([*rlm, 'ask', 'What?', str(notes), *to(s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        p.stdout.close()
        err = p.stderr.read()
        p.stderr.close()
        assert p.wait(60) == 1 and b'Traceback' not in err and b'Exception ignored' not in err, err.decode()

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
    assert '1,000,000 lines' in out and 'step 1' in out and 'truth:' in out and out.splitlines()[-1].startswith('right, ')
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
