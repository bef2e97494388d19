"What `monty` and `jail` keep in: attempts to get out, none of which may succeed, and the parent stays whole"
import os, signal, socket, subprocess, sys, threading
import pytest
from rlm.repl import open_repl
from repl_attempts import DO, READERS
from test_repl_conformance import no_jail

KINDS = ['monty', pytest.param('jail', marks=pytest.mark.skipif(bool(no_jail()), reason=no_jail() or ''))]
KEY, IN_FILE, IN_VARIABLE = 'sk-' + 'k7'*9, 'file-' + 'f3'*9, 'var-' + 'v5'*9
SECRETS = KEY, IN_FILE, IN_VARIABLE
ATTEMPTS = [(f'{c}-{i}', code) for c, l in DO.items() for i, code in enumerate(l)]
LOOKS = [(f'{c}-{i}', expr) for c, l in READERS.items() for i, expr in enumerate(l)]


def make_host(secret):
    "A host function that has a secret in its globals, its closure and its defaults"
    ns = dict(SECRET=secret)
    exec('def make(inner):\n    def llm_query(prompt, hidden=SECRET): return "read" if inner else SECRET\n    return llm_query', ns)
    return ns['make'](secret)


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    "The parent's side: secrets, servers, and what must not change"
    home, out, old = tmp_path_factory.mktemp('home'), tmp_path_factory.mktemp('out'), dict(os.environ)
    (home/'secret.txt').write_text(IN_FILE)
    (home/'secret_module.py').write_text(f'x = {IN_FILE!r}')
    os.environ.update(RLM_TEST_KEY=KEY, HOME=str(home))
    servers = [socket.create_server(('127.0.0.1', 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    servers[1].bind(str(out/'s'))
    servers[2].bind(f'\0rlm-{os.getpid()}')
    for o in servers[1:]: o.listen()
    yield dict(home=home, out=out, secret=home/'secret.txt', marker=out/'marker', unix=out/'s', pid=os.getpid(), port=servers[0].getsockname()[1])
    for o in servers: o.close()
    os.environ.clear()
    os.environ.update(old)


@pytest.fixture(scope='module', params=KINDS)
def repl(request, host):
    more = {} if request.param == 'monty' else dict(grace=0.3)
    with open_repl(request.param, 'the context', funcs=dict(llm_query=make_host(IN_VARIABLE)), timeout=2, memory=400 << 20, **more) as r: yield r


def held(repl, host, r):
    "Nothing came out, nothing changed, and the REPL goes on"
    text = repr((r.stdout, r.value, r.error, r.final))
    assert not [o for o in SECRETS if o in text] and 'WON' not in r.stdout
    assert not os.path.lexists(host['marker']) and host['secret'].read_text() == IN_FILE and os.environ['RLM_TEST_KEY'] == KEY
    assert host['secret'].stat().st_mode & 0o400 and len(r.stdout) < 5_000_000
    after = repl.run('print(context, llm_query("hi"))')
    if after.text() != 'the context read':  # the code has broken its own Python: a fresh one
        repl.close()
        after = repl.run('print(context, llm_query("hi"))')
    assert after.text() == 'the context read'


def test_enough_attempts(): assert len(ATTEMPTS) + len(LOOKS) >= 100


@pytest.mark.parametrize('code', [o[1] for o in ATTEMPTS], ids=[o[0] for o in ATTEMPTS])
def test_attempt(repl, host, code): held(repl, host, repl.run(code.format(**host), timeout=1))


@pytest.mark.parametrize('expr', [o[1] for o in LOOKS], ids=[o[0] for o in LOOKS])
def test_look(repl, host, expr):
    r = repl.run(f'x = {expr.format(**host)}\nprint(str(x)[:10**6])')
    held(repl, host, r)
    if expr.endswith(('"CMDLINE"', '"MAPS"', '" SIZE"')): assert r.error
    if '{home}' in expr: assert 'secret' not in r.stdout


def test_the_attempts_are_real(host):
    "The same readers do find the secrets where nothing keeps them in"
    won = set()
    with open_repl('process', 'c', funcs=dict(llm_query=make_host(IN_VARIABLE)), timeout=5) as r:
        for name, expr in LOOKS[:25] + [o for o in LOOKS if o[0].startswith('environment')]:
            text = r.run(f'x = {expr.format(**host)}\nprint(str(x)[:10**6])').stdout
            if any(o in text for o in SECRETS): won.add(name)
    assert len(won) >= 20
    with open_repl('process', 'c', children=None) as r:
        for i in (0, 1): assert 'WON' in r.run(DO['subprocess'][1].format(**host)).stdout
        assert 'WON' in r.run(DO['network'][0].format(**host)).stdout and 'WON' in r.run(DO['network'][4].format(**host)).stdout


def test_secrets_are_out_of_reach_of_the_guard_and_the_filter(repl):
    "The environment of everything the jail can see is scrubbed"
    if repl.kind != 'jail': pytest.skip('there is no /proc in monty')
    r = repl.run('import os\n{p: open(f"/proc/{p}/environ").read() for p in os.listdir("/proc") if p.isdigit()}')
    assert r.error is None and KEY not in r.value
    assert repl.run('import os\n(os.getuid(), sorted(os.environ))').value == "(65534, ['HOME', 'LANG', 'PATH', 'PWD'])"
    assert repl.run('[l for l in open("/proc/self/status") if l.startswith(("NoNewPrivs", "Seccomp:", "CapEff"))]').value == "['CapEff:\\t0000000000000000\\n', 'NoNewPrivs:\\t1\\n', 'Seccomp:\\t2\\n']"
