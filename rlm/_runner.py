"""Runs cells of model-written code. `rlm.repl` imports it for the in-process shell, and starts it as a script
in the child of `process` and `jail`: one file for both, so it uses the standard library only and imports nothing of `rlm`."""
import sys
if __name__ == '__main__' and sys.path[0] == __file__.rpartition('/')[0]: del sys.path[0]
import ast, base64, bisect, io, itertools, json, linecache, math, mmap, os, re, select, signal, socket, struct, threading, time, warnings
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


def row(cell, line, func, text):
    "One place of a traceback"
    where = (f'cell {cell}, ' if cell else '') + f'line {line}' + (f', in {func}' if func and func != '<module>' else '')
    return f'  {where}: {clip(text.strip(), 200)}'


def traceback_text(rows, message):
    if len(rows) > 8: rows = rows[:4] + [f'  ... {len(rows)-8} more lines of this kind ...'] + rows[-4:]
    return '\n'.join((['Traceback:'] if rows else []) + rows + [message])


def kind_of(e): return 'TypeError' if isinstance(e, Refused) else type(e).__name__


EXIT = 'SystemExit: the cell ended here; the REPL goes on. To end the run call FINAL(answer)'
TOO_LONG = 'TimeoutError: the cell was stopped after {:g} s, the limit of a cell; work on less at a time'
def listed(given, names, most=30):
    "The names there are, `context` first"
    names = sorted((k for k in given if k not in GIVEN_HIDDEN), key=lambda k: (k != 'context', k.startswith('FINAL'))) + list(names)
    more = f', and {len(names)-most} more' if len(names) > most else ''
    return f"names you have: {', '.join(names[:most])}{more}"


# Running one cell ----------------------------------------------------------------------------------------------------
class _Stops(ast.NodeTransformer):
    "Puts `except CellStop: raise` before the handlers of each `try`, so that no cell swallows its own stop"
    def visit_Try(self, node):
        self.generic_visit(node)
        stop = ast.ExceptHandler(type=ast.Name('__cell_stop__', ast.Load()), name=None, body=[ast.Raise()])
        if node.handlers: node.handlers.insert(0, ast.fix_missing_locations(ast.copy_location(stop, node.handlers[0])))
        return node

    def visit_While(self, node):
        "Python 3.10 does not look for signals where a loop jumps to a `try`, so it gets something to jump to before"
        self.generic_visit(node)
        look = ast.Expr(ast.Name('__cell_stop__', ast.Load()))
        if sys.version_info < (3, 11) and isinstance(node.body[0], ast.Try): node.body.insert(0, ast.fix_missing_locations(ast.copy_location(look, node.body[0])))
        return node


FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
def compile_cell(code, name):
    "The cell as a code object which leaves its last expression in `__cell_value__`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tree = compile(code, name, 'exec', FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
        if 'try' in code: tree = _Stops().visit(tree)
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
        self.live, self.busy, self.alone, self.lock, self.transform, self.ballast, self.clock = False, False, False, threading.Lock(), None, None, Clock()
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

    def listed(self): return listed(self.given, self.names())

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

    def failed(self, e):
        "What the model reads of an exception: its own lines, the type, the message"
        try: return plain(self._failed(e))
        except RecursionError: return f'{type(e).__name__}: (recursion too deep to show)'

    def _failed(self, e):
        own = [(tb.tb_frame.f_code, n) for tb, n in _frames(e.__traceback__) if tb.tb_frame.f_code.co_filename in self.src]
        rows = [self._row(c.co_filename, n, c.co_name) for c, n in own]
        if isinstance(e, SyntaxError) and e.filename in self.src: rows.append(self._row(e.filename, e.lineno or 1, '<module>', e.text))
        return traceback_text(rows, self._message(e))

    def _row(self, name, line, func, text=None):
        lines, n = self.src[name], int(name[:-1].rpartition('.')[2])
        return row(n if n != self.n else None, line, func, lines[line-1] if 0 < line <= len(lines) else text or '')

    def _message(self, e):
        if isinstance(e, CellStop): return TOO_LONG.format(self.clock.limit)
        if isinstance(e, SystemExit): return EXIT
        kind = kind_of(e)
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
    def close(self): "It is never closed: what it stands in for is"
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
class Clock:
    "The time that a cell has: for its own work, and in all. The first stands still while host functions work for it"
    def __init__(self, own=None, wall=None):
        self.own, self.wall, self.start, self.calls, self.since, self.still = own, wall, time.monotonic(), 0, 0., 0.
        self.lock = threading.RLock()

    def both(self):
        "Seconds left of each limit, with the limit"
        with self.lock:
            now = time.monotonic()
            still = self.still + (now - self.since if self.calls else 0)
        return [(n - (now - self.start - x), n) for n, x in ((self.own, still), (self.wall, 0)) if n]

    def left(self): return min((o for o, _ in self.both()), default=1e6)

    @property
    def limit(self): return min(self.both(), default=(0, 0))[1]

    @contextmanager
    def paused(self):
        with self.lock:
            if not self.calls: self.since = time.monotonic()
            self.calls += 1
        try: yield
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls: self.still += time.monotonic() - self.since


@contextmanager
def alarm(session):
    "Raise `CellStop` in the main thread's running cell when its time is over, again and again until it ends; timers may nest"
    if not session.clock.both():
        yield
        return
    clock, t0, left = session.clock, time.monotonic(), 0
    def ring(sig, frame):
        if (more := ring.left()) > 0: signal.setitimer(signal.ITIMER_REAL, max(more, 0.02), 0.02)
        elif session.live and not session.busy: raise CellStop
    def outer():
        if hasattr(old, 'left'): return old.left()
        return left - (time.monotonic()-t0) if left else math.inf
    ring.left = lambda: min(clock.left(), outer())
    old = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, max(clock.left(), 0.001), 0.02)
    if left: signal.setitimer(signal.ITIMER_REAL, max(min(ring.left(), left), 0.001), 0.02)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        if left: signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic()-t0), 0.001), every)


def attempt(session, f):
    "What `f` returns and the error text of what it raises; catches all that a cell can raise, but the user's Ctrl-C"
    try:
        try:
            session.live = True
            return f(), None
        finally: rest(session)
    except BaseException as e:
        rest(session)
        if isinstance(e, KeyboardInterrupt) and not session.alone: raise
        if isinstance(e, MemoryError): session.ballast = None
        return None, session.failed(e)


def rest(session):
    "From here on nothing stops the thread that ran the cell"
    with session.lock: session.live = False


def run_cell(session, code, timeout=None, wall=None, capture=captured):
    "Run a cell in this thread; the limit is kept in the main thread only"
    session.clock = Clock(timeout, wall)
    with capture() as out, alarm(session):
        t0 = time.perf_counter()
        value, error = attempt(session, lambda: run_sync(session, session.prepare(code)))
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


# Values over the wire: JSON with tags, read without running anything -------------------------------------------------
class Refused(TypeError): "A value that cannot cross between two processes"


def enc(v):
    "`v` as JSON data; what JSON lacks is a dict with a tag"
    t = type(v)
    if v is None or t in (bool, str, float): return v
    if t is int: return v if -2**63 <= v < 2**63 else {'~':'int', 'v':hex(v)}
    if t is list: return [enc(o) for o in v]
    if name := NAMED.get(t): return {'~':name, 'v':PACK[name](v)}
    for base in (bool, int, float, str, bytes, dict, list, tuple, set, frozenset):
        if isinstance(v, base): return enc(base(v))
    if t.__module__ == 'numpy' and getattr(v, 'shape', None) == (): return enc(v.item())
    raise Refused(f'a value of type {t.__name__} stays in its REPL; only text, bytes, numbers, dates, lists, tuples, sets and dicts of them can leave it')


def _dates():
    import datetime as dt
    from decimal import Decimal
    return dict(date=dt.date, datetime=dt.datetime, time=dt.time, timedelta=dt.timedelta, decimal=Decimal)


def _seq(v): return [enc(o) for o in v]
PACK = dict(bytes=lambda v: base64.b64encode(v).decode(), bytearray=lambda v: base64.b64encode(v).decode(), tuple=_seq, set=_seq, frozenset=_seq,
    dict=lambda v: [[enc(a), enc(b)] for a, b in v.items()], complex=lambda v: [v.real, v.imag], range=lambda v: [enc(v.start), enc(v.stop), enc(v.step)],
    date=lambda v: v.isoformat(), time=lambda v: v.isoformat(), datetime=lambda v: v.isoformat(),
    timedelta=lambda v: [v.days, v.seconds, v.microseconds], decimal=str)
NAMED = dict(bytes=bytes, bytearray=bytearray, tuple=tuple, set=set, frozenset=frozenset, dict=dict, complex=complex, range=range)
NAMED = {t:k for k, t in (NAMED | _dates()).items()}


def dec(o):
    "The value of what `enc` gave; raises `ValueError` for anything else"
    if isinstance(o, list): return [dec(x) for x in o]
    if not isinstance(o, dict): return o
    try: return UNPACK[o['~']](o['v'])
    except (KeyError, TypeError, ArithmeticError) as e: raise ValueError('not a value of this protocol') from e


def _unpack():
    d = _dates()
    return dict(int=lambda v: int(v, 16), bytes=lambda v: base64.b64decode(v), bytearray=lambda v: bytearray(base64.b64decode(v)),
        tuple=lambda v: tuple(map(dec, v)), set=lambda v: set(map(dec, v)), frozenset=lambda v: frozenset(map(dec, v)),
        dict=lambda v: {dec(a):dec(b) for a, b in v}, complex=lambda v: complex(*v), range=lambda v: range(*map(dec, v)),
        date=d['date'].fromisoformat, time=d['time'].fromisoformat, datetime=d['datetime'].fromisoformat,
        timedelta=lambda v: d['timedelta'](*v), decimal=d['decimal'])
UNPACK = _unpack()


MAX_FRAME = 128 << 20  # bytes of one message
MAX_PARTS = 5_000_000  # values in one message, so that a small message does not become gigabytes of objects
def _parts(data): return sum(map(data.count, (b'[', b'{', b',')))


class Wire:
    "JSON messages over a socket, each after its length"
    def __init__(self, sock, most=MAX_FRAME): self.sock, self.most, self.buf, self.sending = sock, most, bytearray(), threading.Lock()

    def send(self, **msg):
        try: data = json.dumps(msg).encode()
        except RecursionError: raise Refused('a value nested this deep stays in its REPL') from None
        if len(data) > self.most: raise Refused(f'a value of {len(data):,} bytes is too large to send; the limit is {self.most:,}')
        if _parts(data) > MAX_PARTS: raise Refused(f'a value of more than {MAX_PARTS:,} parts is too large to send')
        with self.sending: self.sock.sendall(struct.pack('>I', len(data)) + data)

    def fill(self):
        "Read what is there; `EOFError` at the end"
        part = self.sock.recv(1 << 20)
        if not part: raise EOFError
        self.buf += part

    def messages(self):
        "The messages that are complete"
        while len(self.buf) >= 4:
            n = struct.unpack_from('>I', self.buf)[0]
            if n > self.most: raise ValueError('a message larger than the limit')
            if len(self.buf) < 4 + n: return
            data = bytes(self.buf[4:4+n])
            del self.buf[:4+n]
            if _parts(data) > MAX_PARTS: raise ValueError('a message of too many parts')
            if not isinstance(m := json.loads(data), dict): raise ValueError('not a message')
            yield m


# A text that is a file -----------------------------------------------------------------------------------------------
class MappedText:
    "A UTF-8 file as text that is searched and sliced where it lies; positions count characters"
    BLOCK = 1 << 20
    def __init__(self, path):
        self.path, self._marks = str(path), None
        with open(path, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b''
        self.bytes = size

    def marks(self):
        "Characters before each block, and the total"
        if self._marks is None:
            inner, n, self._marks = bytes(range(0x80, 0xc0)), 0, [0]
            for i in range(0, self.bytes, self.BLOCK):
                n += len(self._map[i:i+self.BLOCK].translate(None, inner))
                self._marks.append(n)
        return self._marks

    def __len__(self): return self.marks()[-1]
    def __repr__(self): return f'<text of {len(self):,} characters in a file; slice it, or use find, count, lines, search, finditer>'
    def __str__(self): return self[:]
    def __iter__(self): return (c for part in self.blocks() for c in part)
    def __contains__(self, sub): return self._map.find(sub.encode()) >= 0 if self.bytes else not sub

    def _byte(self, i):
        "Byte position of character `i`"
        marks = self.marks()
        if i >= marks[-1]: return self.bytes
        b = bisect.bisect_right(marks, i) - 1
        pos, left = b*self.BLOCK, i - marks[b]
        part = self._map[pos:pos+self.BLOCK]
        skip = next((k for k, x in enumerate(part[:4]) if x & 0xc0 != 0x80), len(part))
        if marks[b+1] - marks[b] == len(part): return pos + left
        return pos + skip + len(part[skip:].decode('utf-8', 'ignore')[:left].encode())

    def _char(self, pos):
        "Character position of byte `pos`"
        b = pos // self.BLOCK
        return self.marks()[b] + len(self._map[b*self.BLOCK:pos].translate(None, bytes(range(0x80, 0xc0))))

    def __getitem__(self, k):
        if not isinstance(k, slice):
            n = len(self)
            if not -n <= k < n: raise IndexError('string index out of range')
            k = k % n
            return self._text(k, k+1)
        i, j, step = k.indices(len(self))
        if step == 1: return self._text(i, j)
        return (self._text(i, j) if step > 0 else self._text(j+1, i+1)[::-1])[::abs(step)]

    def _text(self, i, j): return self._map[self._byte(i):self._byte(j)].decode('utf-8', 'replace') if j > i else ''

    def _span(self, start, end):
        i, j, _ = slice(start, end).indices(len(self))
        return self._byte(i), self._byte(j)

    def find(self, sub, start=None, end=None):
        k = self._map.find(sub.encode(), *self._span(start, end))
        return k if k < 0 else self._char(k)

    def rfind(self, sub, start=None, end=None):
        k = self._map.rfind(sub.encode(), *self._span(start, end))
        return k if k < 0 else self._char(k)

    def index(self, sub, start=None, end=None):
        if (k := self.find(sub, start, end)) < 0: raise ValueError('substring not found')
        return k

    def count(self, sub):
        "Occurrences that do not overlap"
        n, pos, sub = 0, 0, sub.encode()
        if not sub: return len(self) + 1
        while (pos := self._map.find(sub, pos)) >= 0: n, pos = n+1, pos+len(sub)
        return n

    def startswith(self, sub): return self._map[:len(sub.encode())] == sub.encode()
    def endswith(self, sub): return self[max(len(self)-len(sub), 0):] == sub

    def blocks(self, size=4 << 20):
        "The text in parts of about `size` bytes that end at line ends"
        pos = 0
        while pos < self.bytes:
            end = min(pos+size, self.bytes)
            if end < self.bytes: end = self._map.find(b'\n', end-1) + 1 or self.bytes
            yield self._map[pos:end].decode('utf-8', 'replace')
            pos = end

    def lines(self): return (o for part in self.blocks() for o in part.splitlines())
    def splitlines(self): return list(self.lines())

    def finditer(self, pattern, flags=0):
        "(position, match) of each match; a match may not cross a part of `blocks`"
        pat, base = re.compile(pattern, flags), 0
        for part in self.blocks():
            for m in pat.finditer(part): yield base + m.start(), m
            base += len(part)

    def search(self, pattern, flags=0): return next(self.finditer(pattern, flags), None)
    def findall(self, pattern, flags=0): return [o for part in self.blocks() for o in re.findall(pattern, part, flags)]


# A context in a file that both sides hold ----------------------------------------------------------------------------
CHUNK = 16 << 20
def write_context(v, f):
    "Write a context into an open file; returns how to read it back. Parts of a text lie in reverse order, so that the reader can cut each off"
    if isinstance(v, str):
        ends = []
        for i in reversed(range(0, len(v), CHUNK)):
            f.write(v[i:i+CHUNK].encode('utf-8', 'surrogatepass'))
            ends.append(f.tell())
        return dict(kind='str', ends=ends)
    if isinstance(v, bytes):
        f.write(v)
        return dict(kind='bytes', size=len(v))
    import pickle
    pickle.dump(v, f, 5)
    return dict(kind='pickle')


def read_context(how, fd):
    "The context from the parent's file, which shrinks while it is read"
    with open(fd, 'r+b', buffering=0) as f:
        if how['kind'] == 'str': return _read_str(f, how['ends'])
        if how['kind'] == 'bytes': return _read_bytes(f, how['size'])
        import pickle
        f.seek(0)
        return pickle.load(io.BufferedReader(f, 1 << 20))


def _read_str(f, ends):
    s = ''
    for start, end in reversed(list(zip([0]+ends, ends))):
        s += _pread(f, start, end-start).decode('utf-8', 'surrogatepass')
        f.truncate(start)
    return s


def _pread(f, start, n):
    f.seek(start)
    parts = []
    while n > 0 and (part := f.read(n)):
        parts.append(part)
        n -= len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


def _read_bytes(f, size):
    import ctypes
    new = ctypes.pythonapi.PyBytes_FromStringAndSize
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_ssize_t]
    if size < CHUNK: return _pread(f, 0, size)
    res = new(None, size)
    view = memoryview((ctypes.c_char*size).from_address(id(res) + bytes.__basicsize__ - 1)).cast('B')
    for start in reversed(range(0, size, CHUNK)):
        view[start:start+CHUNK] = _pread(f, start, min(CHUNK, size-start))
        f.truncate(start)
    return res


# The child: cells ----------------------------------------------------------------------------------------------------
class Child:
    "Serves the parent over a socket: runs cells, and asks it for the host functions"
    def __init__(self, sock, setup):
        self.wire, self.session = Wire(sock), Session(vars(_fresh_main()))
        self.cond, self.reading, self.inbox, self.answers, self.waiting, self.ids = threading.Condition(), False, [], {}, set(), itertools.count()
        self.session.alone, self.out, self.pid = True, os.dup(1), os.getpid()
        self.session.give(**{o:self._host(o) for o in setup['funcs']})

    def _host(self, name):
        def call(*args, **kwargs): return self.call(name, args, kwargs)
        call.__name__ = call.__qualname__ = name
        call.__doc__ = 'A function of the host'
        return call

    @contextmanager
    def quiet(self, on=True):
        "Whether the alarm leaves the main thread alone, as it must while messages are handled"
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old, self.session.busy = self.session.busy, on
        try: yield
        finally: self.session.busy = old

    def wait(self, take):
        "What `take` finds among the messages; one thread reads for all"
        while True:
            with self.cond:
                if (found := take()) is not None: return found
                if self.reading:
                    with self.quiet(False): self.cond.wait(0.2)
                    continue
                self.reading = True
            try: self.read()
            finally:
                with self.cond:
                    self.reading = False
                    self.cond.notify_all()

    def read(self):
        with self.quiet(False): select.select([self.wire.sock], [], [])
        self.wire.fill()
        for m in self.wire.messages():
            if m['do'] != 'answer': self.inbox.append(m)
            elif m['id'] in self.waiting: self.answers[m['id']] = m

    def call(self, name, args, kwargs):
        "Ask the parent; any thread may, but no process that a cell forked"
        if os.getpid() != self.pid: raise RuntimeError(f'{name} works in the process of the REPL only, not in one forked from it')
        args, kwargs, n = enc(list(args)), [[k, enc(v)] for k, v in kwargs.items()], next(self.ids)
        with self.quiet(), self.session.clock.paused():
            self.waiting.add(n)
            try:
                self.wire.send(**{'is':'call'}, id=n, name=name, args=args, kwargs=kwargs)
                m = self.wait(lambda: self.answers.pop(n, None))
            finally: self.waiting.discard(n)
        if 'error' not in m: return dec(m['value'])
        raise exception(m['error'], m['message'])

    def serve(self):
        while True:
            m = self.wait(lambda: self.inbox.pop(0) if self.inbox else None)
            try: reply = getattr(self, f"do_{m['do']}")(m)
            except Exception as e: reply = {'is':'failed', 'error':kind_of(e), 'message':plain(str(e))[:2000]}
            try: self.wire.send(**reply)
            except Refused as e: self.wire.send(**_refused(reply, str(e)))

    def do_run(self, m):
        self.session.ballast = bytearray(BALLAST)
        parts = run_cell(self.session, m['code'], m['limit'], m['wall'], self.stdout)
        if os.getpid() != self.pid: os._exit(0)
        if parts['final']: parts['final'] = _leaving(parts['final'])
        return {'is':'done', 'parts':parts, 'names':self.session.names()[-1000:], 'full':self.session.ballast is None and _full()}

    @contextmanager
    def stdout(self):
        "File descriptors 1 and 2 and the streams over them, put right before and after a cell"
        self.streams()
        try: yield
        finally:
            with suppress(Exception): sys.stdout.flush()
            with suppress(Exception): self.stream.flush()
            self.streams()

    def streams(self):
        for fd in 1, 2: os.dup2(self.out, fd)
        self.stream = sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = io.TextIOWrapper(open(1, 'wb', closefd=False), 'utf-8', 'backslashreplace', line_buffering=True)

    def do_get(self, m):
        name = m['name']
        if name not in self.session.ns: raise KeyError(f'no variable {name!r} ({self.session.listed()})')
        return {'is':'value', 'value':enc(self.session.ns[name])}

    def do_put(self, m):
        name, value = m['name'], dec(m['value'])
        if name in self.session.given: self.session.give(**{name:value})
        else: self.session.ns[name] = value
        return {'is':'value', 'value':None, 'names':self.session.names()[-1000:]}


def _refused(reply, why):
    "What to send instead of a reply that is too large"
    if reply['is'] != 'done': return {'is':'failed', 'error':'TypeError', 'message':why}
    return reply | {'parts':reply['parts'] | dict(final=None, error=f'TypeError: {why}; end with less')}


BALLAST = 16 << 20  # bytes set aside so that a cell which took all memory can be answered
def _full():
    try: return not bytearray(2*BALLAST)
    except MemoryError: return True


def _leaving(final):
    "An ending in a form that can be sent: a value that cannot is sent as its text"
    try: return dict(final, value=enc(final['value']))
    except Exception:
        try: return dict(final, value=clip(str(final['value']), KEEP))
        except Exception as e: return dict(final, value=f'(a value of type {type(final["value"]).__name__}, which cannot be shown: {type(e).__name__})')


def exception(kind, message):
    "The built-in exception of this name, or a `RuntimeError` that names it"
    import builtins
    cls = getattr(builtins, kind, None)
    if isinstance(cls, type) and issubclass(cls, Exception):
        with suppress(TypeError): return cls(message)
    return RuntimeError(f'{kind}: {message}')


def _fresh_main():
    import types
    m = sys.modules['__main__'] = types.ModuleType('__main__')
    return m


# The child: limits ---------------------------------------------------------------------------------------------------
def _prctl(*args):
    import ctypes
    args = [ctypes.c_ulong(o) if isinstance(o, int) else o for o in args]
    return ctypes.CDLL(None, use_errno=True).prctl(*args)


def die_with_parent():
    if sys.platform == 'linux': _prctl(1, signal.SIGKILL)


SYSCALLS = dict(  # number: x86_64, aarch64
    x86_64=(0xc000003e, dict(clone=56, fork=57, vfork=58, clone3=435, socket=41), (29, 101, 155, 161, 165, 166, 169, 175, 246, 248, 249, 250, 272, 298, 304, 308, 310, 311, 313, 319, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)),
    aarch64=(0xc00000b7, dict(clone=220, clone3=435, socket=198), (39, 40, 41, 51, 97, 104, 105, 106, 117, 142, 194, 217, 218, 219, 241, 265, 268, 270, 271, 273, 279, 280, 282, 294, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)))


NAMESPACES = 0x7e020080  # the flags of clone that make namespaces
def filter_syscalls(children, network, dangerous):
    "A seccomp filter for this process and all that it starts; `OSError` where the kernel has none"
    import ctypes
    if (machine := os.uname().machine) not in SYSCALLS: raise OSError(f'no table of system calls for {machine}, so none can be filtered')
    arch, nr, bad = SYSCALLS[machine]
    load, jeq, jge, jset, ret = (lambda k: (0x20, 0, 0, k)), 0x15, 0x35, 0x45, (lambda k: (0x06, 0, 0, k))
    deny, allow = ret(0x00050000 | 1), ret(0x7fff0000)
    prog = [load(4), (jeq, 1, 0, arch), deny, load(0), (jge, 0, 1, 0x40000000), deny]
    for n in bad if dangerous else (): prog += [(jeq, 0, 1, n), deny]
    if dangerous: prog += [(jeq, 0, 1, nr['clone3']), ret(0x00050000 | 38), (jeq, 0, 4, nr['clone']), load(16), (jset, 0, 1, NAMESPACES), deny, load(0)]
    if not children:
        for k in ('fork', 'vfork'):
            if k in nr: prog += [(jeq, 0, 1, nr[k]), deny]
        prog += [(jeq, 0, 1, nr['clone3']), ret(0x00050000 | 38), (jeq, 0, 4, nr['clone']), load(16), (jset, 0, 1, 0x00010000), allow, deny]
    if not network: prog += [(jeq, 0, 4, nr['socket']), load(16), (jeq, 0, 1, 1), allow, deny]
    prog.append(allow)
    code = b''.join(struct.pack('=HBBI', *o) for o in prog)
    buf = ctypes.create_string_buffer(code, len(code))
    fprog = ctypes.create_string_buffer(struct.pack('@HP', len(prog), ctypes.addressof(buf)))
    if _prctl(38, 1, 0, 0, 0) or _prctl(22, 2, ctypes.byref(fprog)): raise OSError(ctypes.get_errno(), 'no seccomp filter on this kernel')


def set_limits(setup):
    import resource as r
    def limit(which, n):
        hard = r.getrlimit(which)[1]
        n = n if hard == r.RLIM_INFINITY else min(n, hard)
        r.setrlimit(which, (n, n))
    limit(r.RLIMIT_CORE, 0)
    if setup['files']: limit(r.RLIMIT_NOFILE, setup['files'])
    if setup['file_size']: limit(r.RLIMIT_FSIZE, setup['file_size'])
    if sys.platform != 'linux': return
    if setup['memory']: limit(r.RLIMIT_AS, _vm_size() + setup['memory'])
    if setup['children']: limit(r.RLIMIT_NPROC, setup['children'] + _user_tasks())


def _vm_size():
    with open('/proc/self/statm') as f: return int(f.read().split()[0]) * mmap.PAGESIZE


def _user_tasks():
    "Tasks of this user; that is how the kernel counts"
    n, me = 0, os.getuid()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with suppress(OSError):
            if os.stat(f'/proc/{pid}').st_uid == me: n += len(os.listdir(f'/proc/{pid}/task'))
    return n


def serve(fd):
    "Take the context and the limits from the parent, then run cells until it goes"
    sock = socket.socket(fileno=fd)
    child = Child(sock, setup := _first(sock))
    try:
        if setup['children'] == 0 or setup['jail']: filter_syscalls(setup['children'] != 0, not setup['jail'], setup['jail'])
        if setup['context']: child.session.give(context=_context(setup['context'], setup['context_fd']))
        with suppress(OSError): os.close(setup['context_fd'])
        set_limits(setup)
    except Exception as e:
        child.wire.send(**{'is':'failed'}, error=type(e).__name__, message=plain(str(e))[:2000])
        return
    child.wire.send(**{'is':'ready'})
    with suppress(EOFError, OSError, ValueError): child.serve()


def _context(how, fd): return MappedText(how['path']) if how['kind'] == 'path' else read_context(how, fd)


def _first(sock):
    wire = Wire(sock)
    while True:
        wire.fill()
        for m in wire.messages(): return m


# The guard: the child's parent, which outlives nobody ----------------------------------------------------------------
def guard(life, fd, command):
    "Start the child, by fork or as a command, and end it and all that it started when the host's process goes or closes `life`"
    host = os.getppid()
    if sys.platform == 'linux': _prctl(36, 1)
    pid = os.fork()
    if not pid: _begin(life, fd, command)
    null = os.open(os.devnull, os.O_RDWR)
    for o in 0, 1, 2: os.dup2(null, o)
    os.closerange(3, life)
    os.closerange(life+1, 4096)
    ended = [os.pidfd_open(pid)] if hasattr(os, 'pidfd_open') else []
    status = None
    while status is None and os.getppid() == host and not select.select([life], [], [], 0)[0]:
        select.select([life] + ended, [], [], 1 if ended else 0.05)
        got, st = os.waitpid(pid, os.WNOHANG)
        if got: status = st
    end_children(pid)
    os._exit(0 if status is None else 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def tend(command):
    "Run a command with this process's streams, and end it when the host's process goes"
    host = os.getppid()
    pid = os.fork()
    if not pid:
        die_with_parent()
        os.execv(command[0], command)
    null = os.open(os.devnull, os.O_RDWR)
    for o in 0, 1, 2: os.dup2(null, o)
    ended, got = [os.pidfd_open(pid)] if hasattr(os, 'pidfd_open') else [], 0
    while not got and os.getppid() == host:
        select.select(ended, [], [], 1 if ended else 0.05)
        got, status = os.waitpid(pid, os.WNOHANG)
    if not got: os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _begin(life, fd, command):
    "In the child"
    die_with_parent()
    os.setsid()
    os.close(life)
    if command: os.execv(command[0], command)
    try: serve(fd)
    finally: os._exit(0)


def end_children(pid):
    "Kill and reap every process below this one; those that lose their parent become its children"
    while True:
        for k in _children(pid):
            with suppress(ProcessLookupError): os.kill(k, signal.SIGKILL)
        try: os.waitpid(-1, 0)
        except ChildProcessError: return


def _children(pid):
    try:
        with open(f'/proc/self/task/{os.getpid()}/children') as f: return [int(o) for o in f.read().split()]
    except FileNotFoundError: return [pid]


def main(args):
    if args[0] == 'guard': guard(int(args[1]), int(args[2]), args[3:])
    if args[0] == 'tend': tend(args[1:])
    if args[0] == 'serve': serve(int(args[1]))


if __name__ == '__main__': main(sys.argv[1:])
