"`rlm chat` as a user meets it: in a pseudo-terminal, and line by line from a pipe"
import fcntl, os, pty, re, select, struct, termios, time
import pytest
from ollama_server import Model, OllamaServer, code as ollama_code
from rlm_process import Rlm
from scripted_server import ScriptedServer, closed_port, code, error, hang

clean_env = {k: v for k, v in os.environ.items() if not k.startswith('RLM_') or k.startswith('RLM_LOCAL')} | dict(PYTHONIOENCODING='utf-8')
PATIENCE = 60

@pytest.fixture(scope='module', autouse=True)
def warm():
    global started
    started = Rlm()
    yield
    started.close()

@pytest.fixture
def env(tmp_path): return clean_env | dict(XDG_CONFIG_HOME=str(tmp_path/'config'), XDG_STATE_HOME=str(tmp_path/'state'), OLLAMA_HOST=f'127.0.0.1:{closed_port()}')

@pytest.fixture
def notes(tmp_path):
    path = tmp_path/'notes.txt'
    path.write_text('first line\nThe café opens at nine.\nlast line\n', encoding='utf-8')
    return path

def to(server): return ['--model', 'openai/scripted', '--base-url', server.url, '--api-key', 'none']

class Terminal:
    "A process in a terminal of its own"
    def __init__(self, args, env, columns=100):
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack('HHHH', 30, columns, 0, 0))
        self.proc = started.start(['chat', *args], env | dict(TERM='xterm-256color', PROMPT_TOOLKIT_NO_CPR='1'), side, side, side, terminal=True)
        os.close(side)
        self.got, self.at = b'', 0
    def __enter__(self): return self
    def __exit__(self, *exc):
        if self.proc.poll() is None: self.proc.kill()
        self.proc.wait()
        os.close(self.main)

    def send(self, text): os.write(self.main, text.encode())
    def line(self, text): self.send(text + '\r')
    @property
    def text(self): return plain(self.got.decode(errors='replace'))

    def read(self, seconds=.2):
        if not select.select([self.main], [], [], seconds)[0]: return True
        try: piece = os.read(self.main, 65536)
        except OSError: return False
        self.got += piece
        return bool(piece)

    def expect(self, pattern):
        "Wait until the pattern comes after what was expected before"
        end = time.time() + PATIENCE
        while not (m := re.compile(pattern, re.S).search(self.text, self.at)):
            assert time.time() < end and self.read(), f'{pattern!r} did not come:\n{self.text[self.at:]}'
        self.at = m.end()
        return m

    def ready(self, pattern=''):
        "Wait until the pattern comes, and after it the prompt, with nothing typed yet"
        return self.expect(pattern + r'.*\n> ?\Z')

    def end(self):
        "The exit code, once it has ended"
        end = time.time() + PATIENCE
        while self.read() and self.proc.poll() is None: assert time.time() < end, self.text
        return self.proc.wait(PATIENCE)

def plain(text): return re.sub(r'\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[=>78]|[\x07\x08\x0f]', '', text).replace('\r', '')

def piped(args, lines, env): return started.run(['chat', *args], env, '\n'.join(lines).encode(), PATIENCE)

# In a terminal -------------------------------------------------------------------------------------------------------
def test_variables_live_across_turns(notes, env):
    with ScriptedServer(code('n = len(context)'), 'FINAL(noted)', code('n + 1'), 'FINAL(one more)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('openai/scripted.*45 characters.*/help')
        t.line('How long is it?')
        t.ready(r'noted\n')
        t.line('And one more?')
        t.ready(r'one more\n')
        t.send('\x04')
        assert t.end() == 0
    last = s.messages[-1]
    assert [m['content'] for m in last if m['role'] == 'user'] == ['How long is it?', 'And one more?']
    assert [m['content'] for m in last if m['role'] == 'tool'] == ['(no output)', '46']
    assert s.requests[0]['temperature'] == .6

def test_commands(notes, tmp_path, env):
    other, saved, page = tmp_path/'other.txt', tmp_path/'talk.jsonl', tmp_path/'talk.html'
    other.write_text('another text\n')
    with ScriptedServer(code('n = len(context)'), 'FINAL(noted)', code('print(n, context)'), 'FINAL(both)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('/help')
        t.line('/help')
        t.ready('/context.*/model.*/cost.*/trace.*/quit')
        t.line('How long?')
        t.ready(r'noted\n')
        t.line(f'/context {other}')
        t.ready('13 characters')
        t.line('/model openai/second')
        t.ready('openai/second')
        t.line('And now?')
        t.ready(r'both\n')
        t.line('/cost')
        t.ready('4 calls, 40 prompt tokens')
        t.line('/trace')
        t.ready(r'And now\?.*print.*45 another text.*both')
        t.line(f'/trace {saved}')
        t.ready('talk.jsonl')
        t.line(f'/trace {page}')
        t.ready('talk.html')
        t.line('/context nothing.txt')
        t.ready('rlm: nothing.txt: no such file')
        t.line('/what')
        t.ready('no command /what')
        t.line('/quit')
        assert t.end() == 0
    assert [r['model'] for r in s.requests] == ['scripted', 'scripted', 'second', 'second']
    assert 'another text' not in str(s.messages[0]) and '45 another text' in s.messages[-1][-1]['content']
    from rlm.trace import Trace, read_trace
    assert [o.start['query'] for o in Trace(events=read_trace(saved)).runs()] == ['How long?', 'And now?']
    assert 'And now?' in page.read_text()

def test_interrupt_stops_the_answer(notes, env):
    "Ctrl-C while the model is asked: the chat and its variables stay"
    with ScriptedServer(code('n = len(context) - 4'), hang(60), code('n + 1'), 'FINAL(there)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('/help')
        t.line('First?')
        while len(s.requests) < 2: assert t.read()
        time.sleep(.5)
        start = time.time()
        t.send('\x03')
        t.ready('stopped')
        assert time.time() - start < 20
        t.line('Second?')
        t.ready(r'there\n')
        t.send('\x03')
        t.ready('ends')
        t.send('\x04')
        assert t.end() == 0
    assert s.messages[-1][-1]['content'] == '42'

@pytest.mark.parametrize('repl', ['monty', 'process'])
def test_interrupt_stops_a_cell(notes, env, repl):
    with ScriptedServer(code('while context: pass'), 'FINAL(there)') as s, Terminal(['-c', notes, '--repl', repl, *to(s)], env) as t:
        t.ready('/help')
        t.line('First?')
        t.expect('while context')
        time.sleep(1)
        t.send('\x03')
        t.ready('stopped')
        t.line('Second?')
        t.ready(r'there\n')
        t.line('/quit')
        assert t.end() == 0

def test_paste_of_several_lines(notes, env):
    with ScriptedServer(code('context'), 'FINAL(read)', code('context'), 'FINAL(again)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('/help')
        t.send('\x1b[200~one\ntwo\nthree\x1b[201~')
        t.expect('three')
        t.line('')
        t.ready(r'read\n')
        t.send('four\x1b\r')
        t.line('five')
        t.ready(r'again\n')
        t.line('/quit')
        assert t.end() == 0
    assert [m['content'] for m in s.messages[-1] if m['role'] == 'user'] == ['one\ntwo\nthree', 'four\nfive']

def test_history_and_completion(notes, env):
    with ScriptedServer('FINAL(a1)', 'FINAL(a1)', 'FINAL(a2)', 'FINAL(a2)') as s:
        with Terminal(to(s), env) as t:
            t.ready('/help')
            t.send('/con\t')
            t.expect('/context')
            t.send(f' {str(notes)[:-6]}\t')
            t.expect('es.txt')
            t.line('')
            t.ready('45 characters')
            t.line('Kept question?')
            t.ready(r'a1\n')
            t.line('/quit')
            assert t.end() == 0
        with Terminal(['-c', notes, *to(s)], env) as t:
            t.ready('/help')
            t.send('\x1b[A\x1b[A')
            t.expect(r'Kept question\?')
            t.line('')
            t.ready(r'a2\n')
            t.line('/quit')
            assert t.end() == 0
    assert s.messages[-1][1]['content'] == 'Kept question?'

def test_an_error_does_not_end_the_chat(notes, env):
    with ScriptedServer(error(401, 'Incorrect API key provided', 'invalid_api_key'), 'FINAL(well)', 'FINAL(well)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('/help')
        t.line('First?')
        t.ready('rlm: .*key')
        t.line('Second?')
        t.ready(r'well\n')
        assert 'Traceback' not in t.text
        t.line('/model 127.0.0.1:1/nothing:1b')
        t.ready('rlm: .*ollama serve')
        t.line('/quit')
        assert t.end() == 0

# From a pipe ---------------------------------------------------------------------------------------------------------
def test_from_a_pipe(notes, env):
    with ScriptedServer(code('n = len(context) - 44'), 'FINAL(first)', code('n'), 'FINAL(second)') as s:
        r = piped(['-c', notes, *to(s)], ['One?', '', 'Two?', '/cost'], env)
    assert r.returncode == 0, r.stderr.decode()
    assert r.stdout.decode().splitlines()[:2] == ['first', 'second'] and '4 calls' in r.stdout.decode()
    assert '\x1b' not in r.stdout.decode() + r.stderr.decode() and b'> n = len' in r.stderr

def test_a_mistake_in_a_pipe(notes, env):
    with ScriptedServer('FINAL(x)', 'FINAL(x)') as s: r = piped(['-c', notes, *to(s)], ['/context none.txt', 'What?', '/quit', 'never'], env)
    assert (r.returncode, r.stdout) == (1, b'x\n') and b'rlm: none.txt: no such file' in r.stderr and len(s.requests) == 2

def test_budget_is_for_each_answer(notes, env):
    with ScriptedServer(lambda body: code('1') if len(body['messages']) % 2 == 0 else 'FINAL(no)') as s:
        r = piped(['-c', notes, '--budget-calls', 2, *to(s)], ['One?'], env)
    assert b'within 2 calls' in r.stderr and len(s.requests) == 2, r.stderr.decode()

@pytest.mark.parametrize('args,words', [(['-c', 'none.txt'], 'no such file'), (['-m', 'nothing:1b'], 'ollama serve'), (['--base-url', 'http://127.0.0.1:1'], '--model')])
def test_what_cannot_be_begun(args, words, env):
    r = piped(args, ['What?'], env)
    assert (r.returncode, r.stdout) == (2, b'') and words in r.stderr.decode() and r.stderr.count(b'\n') == 1, r.stderr.decode()

def test_history_that_cannot_be_kept(notes, env, tmp_path):
    (tmp_path/'state').write_text('a file')
    with ScriptedServer('FINAL(x)', 'FINAL(x)') as s, Terminal(['-c', notes, *to(s)], env) as t:
        t.ready('/help')
        t.line('What?')
        t.ready(r'x\n')
        t.line('/quit')
        assert t.end() == 0

# Every option --------------------------------------------------------------------------------------------------------
def test_options_reach_ollama(notes, env):
    "And a model without tools takes the conversation over, with the variables"
    script = ollama_code('n = len(context)'), 'FINAL(noted)', '```repl\nprint(n, len(context))\n```', 'FINAL(both)'
    with OllamaServer(*script) as s:
        r = piped(['-c', notes, '-m', 'thinker:4b', '--host', s.host, '--num-ctx', 4096, '--temperature', .2, '--no-think'], ['One?', '/model plain:135m', 'Two?', '/model', '/cost'], env)
    assert r.returncode == 0 and r.stdout.decode().split('\n')[:3] == ['noted', 'ollama_chat/plain:135m', 'both'], r.stderr.decode()
    assert [b['model'] for b in s.chats] == ['thinker:4b'] * 2 + ['plain:135m'] * 2 and all(b['options']['temperature'] == .2 and b['options']['num_ctx'] == 4096 for b in s.chats)
    assert s.chats[0]['think'] is False and not s.chats[2].get('tools') and '```repl\nn = len(context)\n```' in s.chats[2]['messages'][2]['content'] and '45 45' in s.chats[3]['messages'][-1]['content']
    assert 'glm-5:cloud' in r.stdout.decode() and '4 calls' in r.stdout.decode()

def test_what_chat_does_unless_told(notes, env):
    with OllamaServer(ollama_code('print(context)'), 'FINAL(noted)', models={'long:8b': Model(context_length=200_000)}) as s: piped(['-c', notes, '-m', 'long:8b'], ['One?'], env | dict(OLLAMA_HOST=s.host))
    assert s.chats[0]['options'] == dict(temperature=.6, num_ctx=131072)
    assert '(15)' in started.run(['chat', '--help'], env).stdout.decode()

def test_turns_are_limited(notes, env):
    with ScriptedServer(lambda body: code('print(context)') if body.get('tools') else 'FINAL(so far)') as s: r = piped(['-c', notes, '--max-iterations', 2, *to(s)], ['One?', 'Two?'], env)
    assert r.stdout == b'so far\nso far\n' and r.stderr.count(b'within 2 steps') == 2

@pytest.mark.parametrize('option,value', [('--budget-tokens', 60), ('--budget-seconds', .001), ('--budget-cost', 1e-9)])
def test_budgets(notes, env, option, value):
    with ScriptedServer(lambda body: code('print(context)') if body.get('tools') else 'FINAL(so far)') as s:
        r = piped(['-c', notes, option, value, '--model', 'openai/gpt-4o-mini', '--base-url', s.url, '--api-key', 'none'], ['One?'], env)
    assert b'did not end the run within' in r.stderr and len(s.requests) < 5, r.stderr.decode()

def test_sub_calls_go_to_the_recursive_model(notes, env):
    with ScriptedServer(code("print(llm_query('Is it early? ' + context))"), 'yes', 'FINAL(early)') as s: r = piped(['-c', notes, '-r', 'openai/small', *to(s)], ['Early?'], env)
    assert r.stdout == b'early\n' and [b['model'] for b in s.requests] == ['scripted', 'small', 'scripted'], r.stderr.decode()

def test_several_documents(notes, tmp_path, env):
    (tmp_path/'b.md').write_text('# Second')
    with ScriptedServer(code('print(context)'), 'FINAL(x)') as s: piped(['-c', notes, '-c', tmp_path/'b.md', *to(s)], ['What?'], env)
    assert 'opens at nine' in s.messages[-1][-1]['content'] and '# Second' in s.messages[-1][-1]['content']

# With the bundled model ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_with_the_bundled_model(tmp_path, env):
    pytest.importorskip('xllamacpp')
    path = tmp_path/'log.txt'
    path.write_text('\n'.join(f'{i} nothing happened' for i in range(5000)) + '\nThe magic number is 4721.\nThe backup password is heron-42.\n')
    with Terminal(['-c', path], env) as t:
        t.ready('the bundled model.*/help')
        t.line('What is the magic number?')
        t.ready(r'4721\n')
        t.line('What is the backup password?')
        t.ready(r'heron-42\n')
        t.send('\x04')
        assert t.end() == 0

@pytest.mark.slow
def test_ollama_with_the_bundled_model_behind(tmp_path, env):
    "Real answers through Ollama's protocol, in a terminal"
    pytest.importorskip('xllamacpp')
    from rlm.local import local_model
    path = tmp_path/'log.txt'
    path.write_text('\n'.join(f'{i} nothing happened' for i in range(5000)) + '\nThe magic number is 4721.\n')
    with OllamaServer(backend=local_model()) as s, Terminal(['-c', path, '-m', 'smol:135m', '--host', s.host, '--temperature', '0'], env) as t:
        t.ready('smol:135m.*/help')
        t.line('What is the magic number?')
        t.ready(r'4721\n')
        t.line('/model bundled')
        t.ready('bundled')
        t.send('\x04')
        assert t.end() == 0
