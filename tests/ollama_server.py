"""A server that speaks Ollama's protocol, written after its public API description: /api/version, /api/tags, /api/show, /api/chat.
Answers come from a script, or from the bundled model behind it. Every request is recorded."""
import http.client, json, threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WHEN = '2026-11-21T12:00:00.000000Z'


@dataclass
class Model:
    "A model that the server has; `remote`: it runs in Ollama's cloud; `capabilities=None`: an old server that does not tell"
    capabilities: list = field(default_factory=lambda: ['completion', 'tools'])
    context_length: int = 8192
    family: str = 'llama'
    thinking: list = None
    remote: bool = False
    size: int = 94_000_000


@dataclass
class Fault:
    "A scripted error body with its status"
    status: int
    error: str
    more: dict = field(default_factory=dict)


MODELS = {'smol:135m': Model(), 'plain:135m': Model(['completion']), 'thinker:4b': Model(['completion', 'tools', 'thinking'], 40960, 'qwen3'),
    'gpt-oss:20b': Model(['completion', 'tools', 'thinking'], 131072, 'gptoss', ['low', 'medium', 'high']), 'glm-5:cloud': Model(['completion', 'tools', 'thinking'], 202752, 'glm', remote=True),
    'old:7b': Model(None)}


def message(content='', thinking=None, calls=()):
    "A scripted answer; `calls` is a list of (name, arguments)"
    m = dict(role='assistant', content=content)
    if thinking: m['thinking'] = thinking
    if calls: m['tool_calls'] = [dict(function=dict(name=n, arguments=a)) for n, a in calls]
    return m


def code(cell, **kw): return message(calls=[('run_repl', dict(python_code=cell))], **kw)


class OllamaServer:
    "`script`: answers to /api/chat in order (text, `message`, `Fault`, or a function of the request); none left: `backend`, a dict from `local_model`, is asked"
    def __init__(self, *script, backend=None, models=MODELS, signed_in=True, key=None):
        self.script, self.backend, self.models, self.signed_in, self.key = list(script), backend, models, signed_in, key
        self.requests, self.lock = [], threading.Lock()

    @property
    def url(self): return f'http://127.0.0.1:{self.httpd.server_port}'
    @property
    def host(self): return f'127.0.0.1:{self.httpd.server_port}'
    def of(self, path):
        "The bodies of the requests to a path"
        with self.lock: return [body for p, body, _ in self.requests if p == path]
    @property
    def chats(self): return self.of('/api/chat')

    def __enter__(self):
        owner = self
        class Handler(_Handler): pass
        Handler.owner = owner
        self.httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self
    def __exit__(self, *exc):
        self.httpd.shutdown()
        self.httpd.server_close()

    def model(self, body):
        "The model that a request names, or its `Fault`"
        tag = body.get('model')
        if not tag: return Fault(400, 'model is required')
        m = self.models.get(tag) or self.models.get(f'{tag}:latest')
        return m or Fault(404, f"model '{tag}' not found")

    def tags(self):
        row = lambda tag, m: dict(name=tag, model=tag, modified_at=WHEN, size=m.size if not m.remote else 384, digest='0'*64,
            details=dict(format='gguf', family=m.family, families=[m.family], parameter_size='135M', quantization_level='Q4_K_M')) | (dict(remote_model=tag.split(':')[0], remote_host='https://ollama.com') if m.remote else {})
        return dict(models=[row(t, m) for t, m in self.models.items()])

    def show(self, body):
        m = self.model(body)
        if isinstance(m, Fault): return m
        res = dict(modelfile='FROM x', template='{{ .Prompt }}', modified_at=WHEN, details=dict(format='gguf', family=m.family, parameter_size='135M'),
            model_info={'general.architecture': m.family, f'{m.family}.context_length': m.context_length})
        if m.capabilities is not None: res['capabilities'] = m.capabilities
        if m.thinking: res['thinking'] = dict(values=m.thinking, default=m.thinking[0])
        return res | (dict(remote_host='https://ollama.com') if m.remote else {})

    def chat(self, body):
        "The last object of an answer, or a `Fault`"
        m, can = self.model(body), lambda o: m.capabilities is not None and o in m.capabilities
        if isinstance(m, Fault): return m
        if m.remote and not self.signed_in: return Fault(401, 'unauthorized', dict(signin_url='https://ollama.com/connect?name=here&key=x'))
        if body.get('tools') and not can('tools'): return Fault(400, f"registry.ollama.ai/library/{body['model']} does not support tools")
        if body.get('think') and not can('thinking'): return Fault(400, f'"{body["model"]}" does not support thinking')
        if isinstance(body.get('think'), str) and body['think'] not in ('low', 'medium', 'high'): return Fault(400, f'invalid think value: "{body["think"]}" (must be "high", "medium", "low", true, or false)')
        with self.lock: o = self.script.pop(0) if self.script else None
        if callable(o): o = o(body)
        if isinstance(o, Fault): return o
        if o is None: return self.ask_backend(body)
        return _done(body, message(o) if isinstance(o, str) else o, 12, 7)

    def ask_backend(self, body):
        "Hand the request to the model behind, which speaks OpenAI's protocol"
        if not self.backend: return Fault(500, 'the script is exhausted and there is no model behind')
        req = dict(model=self.backend['model'].split('/', 1)[1], messages=_openai_messages(body['messages']))
        req |= {k: body[k] for k in ('tools',) if body.get(k)} | {k: v for k, v in body.get('options', {}).items() if k in ('temperature', 'seed')}
        u = urlsplit(self.backend['base_url'])
        link = http.client.HTTPConnection(u.hostname, u.port, timeout=600)
        link.request('POST', f'{u.path}/chat/completions', json.dumps(req), {'Content-Type': 'application/json', 'Authorization': f"Bearer {self.backend['api_key']}"})
        r = link.getresponse()
        out = json.loads(r.read())
        link.close()
        if r.status != 200: return Fault(500, out['error']['message'])
        m = out['choices'][0]['message']
        calls = [(c['function']['name'], json.loads(c['function']['arguments'])) for c in m.get('tool_calls') or []]
        return _done(body, message(m.get('content') or '', calls=calls), out['usage']['prompt_tokens'], out['usage']['completion_tokens'])


def _done(body, msg, read, wrote):
    if body.get('think') is False: msg = {k: v for k, v in msg.items() if k != 'thinking'}
    return dict(model=body['model'], created_at=WHEN, message=msg, done=True, done_reason='stop', total_duration=10**9, load_duration=10**6,
        prompt_eval_count=read, prompt_eval_duration=10**8, eval_count=wrote, eval_duration=10**8)


def _openai_messages(messages):
    "Ollama's messages, whose tool calls carry objects and need no ids, as OpenAI's protocol has them"
    res, waiting = [], []
    for i, m in enumerate(messages):
        out = dict(role=m['role'], content=m.get('content') or '')
        if m.get('tool_calls'):
            waiting = [f'call_{i}_{j}' for j in range(len(m['tool_calls']))]
            out['tool_calls'] = [dict(id=d, type='function', function=dict(name=c['function']['name'], arguments=json.dumps(c['function']['arguments']))) for d, c in zip(waiting, m['tool_calls'])]
        if m['role'] == 'tool': out['tool_call_id'] = waiting.pop(0)
        res.append(out)
    return res


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def note(self, body=None):
        o = self.owner
        with o.lock: o.requests.append((self.path, body, dict(self.headers)))
        return o.key and self.headers.get('Authorization') != f'Bearer {o.key}'

    def do_GET(self):
        if self.note(): return self.out(Fault(401, 'unauthorized'))
        if self.path == '/api/tags': return self.out(self.owner.tags())
        self.out(dict(version='0.40.12') if self.path == '/api/version' else Fault(404, '404 page not found'))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.note(body): return self.out(Fault(401, 'unauthorized'))
        if self.path == '/api/show': return self.out(self.owner.show(body))
        if self.path != '/api/chat': return self.out(Fault(404, '404 page not found'))
        res = self.owner.chat(body)
        if isinstance(res, Fault) or body.get('stream') is False: return self.out(res)
        self.stream(res)

    def out(self, res):
        bad = isinstance(res, Fault)
        data = json.dumps(dict(error=res.error, **res.more) if bad else res).encode()
        self.send_response(res.status if bad else 200)
        self.send_header('Content-Type', 'application/json; charset=utf-8')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, res):
        "One object a line: thinking, text in pieces, tool calls, then the figures"
        self.send_response(200)
        self.send_header('Content-Type', 'application/x-ndjson')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        msg, head = res['message'], {k: res[k] for k in ('model', 'created_at')}
        pieces = [dict(thinking=msg['thinking'], content='')] if msg.get('thinking') else []
        pieces += [dict(content=msg['content'][i:i+8]) for i in range(0, len(msg['content']), 8)]
        if msg.get('tool_calls'): pieces.append(dict(content='', tool_calls=msg['tool_calls']))
        for o in [head | dict(message=dict(role='assistant') | p, done=False) for p in pieces] + [res | dict(message=dict(role='assistant', content=''))]:
            data = json.dumps(o).encode() + b'\n'
            self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))
        self.wfile.write(b'0\r\n\r\n')


@contextmanager
def same_answer(status, text):
    "A server that answers everything with one text; yields its address and the headers of each request"
    heard = []
    class Handler(_Handler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get('Content-Length', 0)))
            heard.append(dict(self.headers))
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(data := text.encode())))
            self.end_headers()
            self.wfile.write(data)
        do_POST = do_GET
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    try: yield f'127.0.0.1:{httpd.server_port}', heard
    finally:
        httpd.shutdown()
        httpd.server_close()
