"A real HTTP server on loopback that speaks the OpenAI chat protocol from a script: replies, faults, delays, hangs, torn bodies"
import asyncio, json, socket, subprocess, sys, threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    "One scripted answer: a JSON body with a status, sent after `delay` seconds; `torn` cuts the body short"
    body: object
    status: int = 200
    delay: float = 0
    torn: bool = False
    headers: dict = field(default_factory=dict)


def usage(prompt=10, completion=5, cached=0, reasoning=0):
    "A `usage` block as OpenAI's protocol has it"
    return dict(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt+completion,
        prompt_tokens_details=dict(cached_tokens=cached), completion_tokens_details=dict(reasoning_tokens=reasoning))


def message(content=None, calls=(), finish=None, use=None, model='scripted', **kw):
    "A chat completion with `content` and `calls`, a list of (name, arguments) or (name, arguments, id)"
    msg = dict(role='assistant', content=content, **kw)
    if calls: msg['tool_calls'] = [_call(i, *c) for i, c in enumerate(calls)]
    return dict(id='chatcmpl-1', object='chat.completion', created=1, model=model, usage=use or usage(),
        choices=[dict(index=0, finish_reason=finish or ('tool_calls' if calls else 'stop'), message=msg)])


def _call(i, name, args, id=None):
    args = args if isinstance(args, str) or args is None else json.dumps(args)
    return dict(id=f'call_{i}' if id is None else id, type='function', function=dict(name=name, arguments=args))


def code(*cells, content=None): return message(content, [('run_repl', dict(python_code=c)) for c in cells])
def error(status, text, code=None, **kw): return Reply(dict(error=dict(message=text, type='error', code=code)), status, **kw)
def hang(seconds=30): return Reply(message('too late'), delay=seconds)
def torn(): return Reply(message('torn in the middle'), torn=True)


class _Server(ThreadingHTTPServer): request_queue_size = 256 # a batch connects at once


class ScriptedServer:
    "Answers each POST with the next of `replies` (or `replies(body)`), and records every request"
    def __init__(self, *replies, key=None):
        self.replies, self.key, self.requests, self.raw, self.paths = list(replies), key, [], [], []
        self.lock, self.stopping, self.open = threading.Lock(), threading.Event(), []

    def next(self, raw, path, auth):
        with self.lock:
            body = json.loads(raw)
            self.requests.append(body); self.raw.append(raw); self.paths.append(path)
            if self.key and auth != f'Bearer {self.key}': return error(401, f'Incorrect API key provided: {auth[7:]}', 'invalid_api_key')
            if not self.replies: return error(400, 'the script is exhausted')
            r = self.replies[0] if callable(self.replies[0]) else self.replies.pop(0)
        if callable(r): r = r(body)
        if isinstance(r, str): r = message(r)
        return r if isinstance(r, Reply) else Reply(r)

    @property
    def url(self): return f'http://127.0.0.1:{self.httpd.server_port}/v1'
    @property
    def messages(self): return [r['messages'] for r in self.requests]

    def __enter__(self):
        owner = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *a): pass
            def setup(self):
                super().setup()
                owner.open.append(self.connection)
            def do_POST(self):
                raw = self.rfile.read(int(self.headers['Content-Length']))
                r = owner.next(raw, self.path, self.headers.get('Authorization', ''))
                owner.stopping.wait(r.delay)
                out = r.body if isinstance(r.body, bytes) else json.dumps(r.body).encode()
                try:
                    self.send_response(r.status)
                    for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(out)), **r.headers}.items(): self.send_header(k, v)
                    self.end_headers()
                    self.wfile.write(out[:len(out)//2] if r.torn else out)
                except (BrokenPipeError, ConnectionResetError): pass
                if r.torn: self.close_connection = True
        self.httpd = _Server(('127.0.0.1', 0), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *exc): self.stop()

    def stop(self):
        "Stop serving and break open connections off, as a server that dies does"
        self.stopping.set()
        self.httpd.shutdown(); self.httpd.server_close()
        for o in self.open:
            try: o.shutdown(socket.SHUT_RDWR)
            except OSError: pass


def closed_port():
    "A port of loopback that nothing listens on"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class SteadyServer:
    "Gives the same answer to everyone after `delay` seconds, in a process of its own: for measurements, which must not share an interpreter with it"
    def __init__(self, delay): self.delay = delay
    def __enter__(self):
        self.proc = subprocess.Popen([sys.executable, __file__, str(self.delay)], stdout=subprocess.PIPE, text=True)
        self.url = f'http://127.0.0.1:{int(self.proc.stdout.readline())}/v1'
        return self
    def __exit__(self, *exc):
        self.proc.kill()
        self.proc.wait()
        self.proc.stdout.close()


async def _steady(reader, writer, delay):
    body = json.dumps(message('steady')).encode()
    try:
        while head := await reader.readuntil(b'\r\n\r\n'):
            await reader.readexactly(next(int(o.split(b':')[1]) for o in head.lower().split(b'\r\n') if o.startswith(b'content-length:')))
            await asyncio.sleep(delay)
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b' % (len(body), body))
    except (asyncio.IncompleteReadError, ConnectionError): writer.close()


async def _serve(delay):
    server = await asyncio.start_server(lambda r, w: _steady(r, w, delay), '127.0.0.1', 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == '__main__': asyncio.run(_serve(float(sys.argv[1])))
