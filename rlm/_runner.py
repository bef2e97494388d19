"""Runs cells of model-written code. `rlm.repl` imports it for the in-process shell, and starts it as a script
in the child of `process` and `jail`: one file for both, so it uses the standard library only and imports nothing of `rlm`."""
import ast, base64, io, itertools, linecache, re, signal, sys, threading, time, warnings
from contextlib import contextmanager, suppress

GIVEN_HIDDEN = 'input', 'exit', 'quit'
KEEP = 500_000  # characters kept of each end of what a cell prints


class CellStop(BaseException): "Raised inside a cell that ran past its limit"


# Text that a model reads ---------------------------------------------------------------------------------------------
def clip(s, n, cut=0):
    "`s` in about `n` characters, head and tail kept; `cut` characters of its middle were dropped before"
    if len(s) <= n: return s
    tail = n // 3
    gone = len(s) - n + cut
    return f'{s[:n-tail]}\n... [{gone:,} of {len(s)+cut:,} characters cut here; print a slice or less] ...\n{s[len(s)-tail:]}'


class Tail:
    "Text that keeps its two ends, so that a flood costs no memory"
    def __init__(self, keep=KEEP): self.keep, self.head, self.tail, self.n, self.nhead, self.ntail = keep, [], [], 0, 0, 0

    def add(self, s):
        self.n += len(s)
        if room := max(self.keep - self.nhead, 0):
            self.head.append(s[:room])
            self.nhead += len(self.head[-1])
            s = s[room:]
        if not s: return
        self.tail.append(s[-self.keep:])
        self.ntail += len(self.tail[-1])
        if self.ntail > 2*self.keep:
            self.tail = [''.join(self.tail)[-self.keep:]]
            self.ntail = self.keep

    def done(self):
        "The text, and how many characters of its middle are missing"
        head, tail = ''.join(self.head), ''.join(self.tail)[-self.keep:]
        return head + tail, self.n - len(head) - len(tail)


ANSI = re.compile(r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])')
CONTROL = re.compile(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]')
def plain(s):
    "Without terminal codes; other control characters and lone surrogates are shown as escapes"
    s = ANSI.sub('', s).replace('\r\n', '\n')
    s = CONTROL.sub(lambda m: f'\\x{ord(m[0]):02x}', s.replace('\r', '\n'))
    return s.encode('utf-8', 'backslashreplace').decode() if not s.isascii() else s


def show(v, keep=KEEP):
    "`repr(v)`, of which a huge text or sequence is shown by its two ends"
    t, h = type(v), keep // 2
    if t in (str, bytes) and len(v) > keep: return f'{v[:h]!r} ... [{len(v)-2*h:,} cut] ... {v[-h:]!r}'
    if t in (list, tuple) and len(v) > keep: return f'{v[:1000]!r} ... [{len(v)-2000:,} items cut] ... {v[-1000:]!r}'
    return clip(repr(v), 2*keep)


# Running one cell ----------------------------------------------------------------------------------------------------
class _Stops(ast.NodeTransformer):
    "Puts `except CellStop: raise` before the handlers of each `try`, so that no cell swallows its own stop"
    def visit_Try(self, node):
        self.generic_visit(node)
        stop = ast.ExceptHandler(type=ast.Name('__cell_stop__', ast.Load()), name=None, body=[ast.Raise()])
        if node.handlers: node.handlers.insert(0, ast.fix_missing_locations(ast.copy_location(stop, node.handlers[0])))
        return node


FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
def compile_cell(code, name):
    "The cell as a code object which leaves its last expression in `__cell_value__`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tree = compile(code, name, 'exec', FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
        if 'except' in code: tree = _Stops().visit(tree)
        if tree.body and isinstance(last := tree.body[-1], ast.Expr):
            out = ast.copy_location(ast.Name('__cell_value__', ast.Store()), last)
            tree.body[-1] = ast.copy_location(ast.Assign([out], last.value), last)
        return compile(tree, name, 'exec', FLAGS, dont_inherit=True)


def needs_loop(compiled): return bool(compiled.co_flags & 0x80)


def _no_input(prompt='', /): raise EOFError('input() has nobody to answer it; everything you need is in `context`')
def _no_exit(code=None, /): raise SystemExit(code)


_ids = itertools.count(1)


class Session:
    "A namespace in which cells run one after the other: what they leave, what they were given, where they failed"
    def __init__(self, ns=None):
        self.ns, self.id, self.n, self.src, self.given, self.final = {} if ns is None else ns, next(_ids), 0, {}, {}, None
        self.live, self.lock, self.transform = False, threading.Lock(), None
        self.ns.setdefault('__name__', '__main__')
        self.ns.setdefault('__builtins__', __builtins__)
        self.ns['__cell_stop__'] = CellStop
        self.hidden = set(self.ns)
        self.give(FINAL=self.FINAL, FINAL_VAR=self.FINAL_VAR, input=_no_input, exit=_no_exit, quit=_no_exit)

    def give(self, **names):
        "Put names in that each cell finds again, whatever an earlier cell did to them"
        self.given.update(names)
        self.ns.update(names)

    def FINAL(self, answer):
        "End the run with this answer"
        if self.final is None: self.final = dict(value=answer, name=None)

    def FINAL_VAR(self, name):
        "End the run with the value of the variable of this name"
        if not isinstance(name, str): return self.FINAL(name)
        if name not in self.ns or name.startswith('__'):
            raise NameError(f'FINAL_VAR takes the name of a variable, and there is none named {name[:100]!r} ({self.listed()}); FINAL(value) ends with a value')
        if self.final is None: self.final = dict(value=self.ns[name], name=name)

    def names(self):
        "The names that the cells made"
        return [k for k in list(self.ns) if isinstance(k, str) and k not in self.given and k not in self.hidden and not k.startswith('_')]

    def listed(self, most=30):
        names = [k for k in self.given if k not in GIVEN_HIDDEN] + self.names()
        more = f', and {len(names)-most} more' if len(names) > most else ''
        return f"names you have: {', '.join(names[:most])}{more}"

    def restore(self):
        "Put the given names back; returns those that a cell had changed"
        changed = [k for k, v in self.given.items() if self.ns.get(k, self) is not v]
        self.ns.update((k, self.given[k]) for k in changed)
        if self.ns.get('__cell_stop__') is not CellStop: self.ns['__cell_stop__'] = CellStop
        return changed

    def prepare(self, code):
        "Compile the next cell; where `transform` is set, what is not Python goes through it first"
        self.n, self.final = self.n + 1, None
        try: return self._compile(code)
        except SyntaxError:
            if not self.transform or (changed := self.transform(code)).strip() == code.strip(): raise
        return self._compile(changed)

    def _compile(self, code):
        name = f'<cell {self.id}.{self.n}>'
        self.src[name] = code.splitlines()
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        return compile_cell(code, name)

    def execute(self, compiled):
        self.ns.pop('__cell_value__', None)
        res = eval(compiled, self.ns)
        if res is None: return self.shown()
        return self._await(res)

    async def _await(self, coro):
        await coro
        return self.shown()

    def shown(self):
        v = self.ns.pop('__cell_value__', None)
        return None if v is None else plain(show(v))

    def forget(self):
        for name in self.src: linecache.cache.pop(name, None)

    def failed(self, e, limit=None):
        "What the model reads of an exception: its own lines, the type, the message"
        try: return plain(self._failed(e, limit))
        except RecursionError: return f'{type(e).__name__}: (recursion too deep to show)'

    def _failed(self, e, limit):
        own = [(tb.tb_frame.f_code, n) for tb, n in _frames(e.__traceback__) if tb.tb_frame.f_code.co_filename in self.src]
        rows = [self._row(c.co_filename, n, c.co_name) for c, n in own]
        if isinstance(e, SyntaxError) and e.filename in self.src: rows.append(self._row(e.filename, e.lineno or 1, '<module>', e.text))
        if len(rows) > 8: rows = rows[:4] + [f'  ... {len(rows)-8} more lines of this kind ...'] + rows[-4:]
        return '\n'.join((['Traceback:'] if rows else []) + rows + [self._message(e, limit)])

    def _row(self, name, line, func, text=None):
        lines, n = self.src[name], int(name[:-1].rpartition('.')[2])
        text = (lines[line-1] if 0 < line <= len(lines) else text or '').strip()
        where = (f'cell {n}, ' if n != self.n else '') + f'line {line}' + (f', in {func}' if func != '<module>' else '')
        return f'  {where}: {clip(text, 200)}'

    def _message(self, e, limit):
        if isinstance(e, CellStop): return f'TimeoutError: the cell was stopped after {limit:g} s, the limit of a cell; work on less at a time'
        if isinstance(e, SystemExit): return 'SystemExit: the cell ended here; the REPL goes on. To end the run call FINAL(answer)'
        kind = type(e).__name__
        if isinstance(e, SyntaxError): return f'{kind}: {e.msg}'
        try: msg = str(e)
        except Exception as err: msg = f'(its message could not be shown: {type(err).__name__})'
        if isinstance(e, ImportError): msg = re.sub(r' \([^()]*[/\\][^()]*\)$| \(unknown location\)$', '', msg)
        msg = clip(msg, 2000)
        if type(e) is NameError and getattr(e, 'name', None) and 'names you have' not in msg: msg += f' ({self.listed()})'
        return f'{kind}: {msg}' if msg else kind


def _frames(tb):
    while tb:
        yield tb, tb.tb_lineno
        tb = tb.tb_next


# Capturing, in-process -----------------------------------------------------------------------------------------------
class _Bytes(io.RawIOBase):
    "The `buffer` of a captured stdout"
    def __init__(self, out): self.out = out
    def writable(self): return True
    def write(self, b):
        self.out.write(bytes(b).decode('utf-8', 'backslashreplace'))
        return len(b)


class Captured(io.TextIOBase):
    "What one cell prints"
    encoding, errors = 'utf-8', 'backslashreplace'
    def __init__(self): self.text, self.before, self.lock, self.buffer = Tail(), {t.ident for t in threading.enumerate()}, threading.Lock(), _Bytes(self)
    def writable(self): return True
    def write(self, s):
        if not isinstance(s, str): raise TypeError(f'write() argument must be str, not {type(s).__name__}')
        with self.lock: self.text.add(s)
        return len(s)


class Router(io.TextIOBase):
    "Stands in for stdout and stderr while cells run, and gives each thread's text to the cell that the thread belongs to"
    cells, lock, real = {}, threading.RLock(), None

    def __init__(self, old): self.old = old
    def _to(self):
        me = threading.get_ident()
        if own := self.cells.get(me): return own[-1]
        started = [o[-1] for o in list(self.cells.values()) if o and me not in o[-1].before]
        return started[-1] if started else self.old
    def writable(self): return True
    def write(self, s): return self._to().write(s)
    def flush(self): self._to().flush()
    def isatty(self): return False
    @property
    def buffer(self): return self._to().buffer
    @property
    def encoding(self): return 'utf-8'


@contextmanager
def captured(thread=None):
    "Capture what the cell in this thread (or the thread of this identity) prints; stdout and stderr are put back when the last cell ends"
    me, out = thread or threading.get_ident(), Captured()
    with Router.lock:
        if not Router.cells:
            Router.real = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = map(Router, Router.real)
        Router.cells.setdefault(me, []).append(out)
    try: yield out
    finally: release(me, out)


def release(me, out):
    "End a capture; more than once does no harm"
    with Router.lock:
        if out not in (mine := Router.cells.get(me, [])): return
        mine.remove(out)
        if not mine: del Router.cells[me]
        if not Router.cells: sys.stdout, sys.stderr = Router.real


# Limits --------------------------------------------------------------------------------------------------------------
@contextmanager
def alarm(seconds, session):
    "Raise `CellStop` in the main thread's running cell after `seconds`, again and again until it ends; timers may nest"
    if not seconds:
        yield
        return
    def ring(sig, frame):
        if session.live: raise CellStop
    old, t0 = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 0.02)
    if left and left < seconds: signal.setitimer(signal.ITIMER_REAL, left, 0.02)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        if left: signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic()-t0), 0.001), every)


def attempt(session, f, limit=None):
    "What `f` returns and the error text of what it raises; catches all that a cell can raise, but the user's Ctrl-C"
    try:
        try:
            session.live = True
            return f(), None
        finally: rest(session)
    except KeyboardInterrupt: raise
    except BaseException as e:
        rest(session)
        return None, session.failed(e, limit)


def rest(session):
    "From here on nothing stops the thread that ran the cell"
    with session.lock: session.live = False


def run_cell(session, code, timeout=None, capture=captured):
    "Run a cell in this thread; the limit is kept in the main thread only"
    with capture() as out, alarm(timeout, session):
        t0 = time.perf_counter()
        value, error = attempt(session, lambda: run_sync(session, session.prepare(code)), timeout)
        secs = time.perf_counter() - t0
    return finish(session, out, value, error, secs)


def run_sync(session, compiled):
    if not needs_loop(compiled): return session.execute(compiled)
    import asyncio
    try: asyncio.get_running_loop()
    except RuntimeError: return asyncio.run(session.execute(compiled))
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool: return pool.submit(asyncio.run, session.execute(compiled)).result()


def finish(session, out, value, error, seconds):
    "The parts of a result, after the given names are back"
    text, cut = out.text.done() if out else ('', 0)
    return dict(stdout=plain(text), cut=cut, value=value, error=error, seconds=seconds, final=session.final, changed=session.restore())
