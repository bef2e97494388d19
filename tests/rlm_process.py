"""The command `rlm` in processes of its own, forked from one that has imported the libraries already:
a test waits for the command and not for its imports. Streams, terminal, signals and exit code are real."""
import atexit, fcntl, gc, io, json, os, signal, socket, struct, subprocess, sys, tempfile, termios, threading, time, traceback


def _keep(fds, ask):
    "Start the command, tell its number and, once it has ended, its status"
    *streams, told = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid: return _become(streams, told, ask)
    os.write(told, struct.pack('i', pid))
    os.write(told, struct.pack('i', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def _become(streams, told, ask):
    "In the process of the command"
    if ask['terminal']:
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for i, o in enumerate(streams): os.dup2(o, i)
    for o in (*streams, told): os.close(o)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(ask['env'])
    os.chdir(ask['cwd'])
    sys.argv = ['rlm', *ask['args']]
    sys.stdin, sys.stdout, sys.stderr = [io.TextIOWrapper(open(i, m, closefd=False), encoding='utf-8', line_buffering=i == 2) for i, m in enumerate(('rb', 'wb', 'wb'))]
    os._exit(_code())


def _code():
    "Run the command as the interpreter would, but for taking the libraries down at the end"
    from rlm.cli import main
    try: code = main()
    except SystemExit as e: code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for o in sys.stdout, sys.stderr:
        try: o.flush()
        except OSError: code = code or 120
    return code


def _serve(link):
    import httpcore, litellm, mcp, openai.resources.chat, prompt_toolkit.shortcuts, pydantic_monty, rlm.bench_models, rlm.chat, rlm.cli, rlm.documents, rlm.rlm
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    while True:
        data, fds, _, _ = socket.recv_fds(link, 1 << 20, 4)
        if not data: return
        if not os.fork():
            link.close()
            return _keep(fds, json.loads(data))
        for o in fds: os.close(o)


class Rlm:
    "Starts the command `rlm`"
    def __init__(self):
        self.link, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.proc = subprocess.Popen([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=os.environ | dict(LITELLM_LOCAL_MODEL_COST_MAP='True'))
        there.close()

    def start(self, args, env, stdin, stdout, stderr, cwd='.', terminal=False):
        "A `Process`; the streams are numbers of files"
        here, there = socket.socketpair()
        ask = dict(args=[str(o) for o in args], env=env, cwd=os.path.abspath(cwd), terminal=terminal)
        socket.send_fds(self.link, [json.dumps(ask).encode()], [stdin, stdout, stderr, there.fileno()])
        there.close()
        return Process(args, here)

    def run(self, args, env, input=None, timeout=120, **kw):
        "Run it to the end, as `subprocess.run`"
        with tempfile.TemporaryFile() as i, tempfile.TemporaryFile() as o, tempfile.TemporaryFile() as e:
            i.write(input or b'')
            for f in i, o, e: f.flush(); f.seek(0)
            code = self.start(args, env, i.fileno(), o.fileno(), e.fileno(), **kw).wait(timeout)
            for f in o, e: f.seek(0)
            return subprocess.CompletedProcess(args, code, o.read(), e.read())

    def close(self):
        self.link.close()
        self.proc.wait(60)


class Process:
    "A running command"
    def __init__(self, args, link):
        self.args, self.link, self.returncode, self.pid = args, link, None, None
        self.pid = self._told(120)

    def _told(self, timeout):
        self.link.settimeout(timeout)
        try: data = self.link.recv(4)
        except (TimeoutError, BlockingIOError): return None
        return struct.unpack('i', data)[0]

    def poll(self):
        if self.returncode is None and (code := self._told(0)) is not None:
            self.returncode = code
            self.link.close()
        return self.returncode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(.01)
        return self.returncode

    def send_signal(self, sig): os.kill(self.pid, sig)
    def kill(self): self.send_signal(signal.SIGKILL)


if __name__ == '__main__': _serve(socket.socket(fileno=int(sys.argv[1])))
