"A whole run, with a tool call, against a scripted server: run in environments that hold `rlm` and nothing else"
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from rlm.core import advanced_toolloop
from rlm.prompts import REPL_SYSTEM_PROMPT
from rlm.tools import prep_shell, make_run_repl

code = "import re; re.findall(r'magic number is (\\d+)', context)[0]"
call = dict(id='call_1', type='function', function=dict(name='run_repl', arguments=json.dumps(dict(python_code=code))))
requests = []

class Scripted(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        requests.append(request)
        last = request['messages'][-1]
        first = last['role'] != 'tool'
        message = dict(role='assistant', content=None, tool_calls=[call]) if first else dict(role='assistant', content=f"FINAL({last['content']})")
        choice = dict(index=0, message=message, finish_reason='tool_calls' if first else 'stop')
        usage = dict(prompt_tokens=10, completion_tokens=5, total_tokens=15)
        body = json.dumps(dict(id='x', object='chat.completion', created=0, model='scripted', choices=[choice], usage=usage)).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = ThreadingHTTPServer(('127.0.0.1', 0), Scripted)
threading.Thread(target=server.serve_forever, daemon=True).start()
model = dict(model='openai/scripted', base_url=f'http://127.0.0.1:{server.server_port}/v1', api_key='none')
sh = prep_shell('words ' * 1000 + 'the magic number is 4721 ' + 'words ' * 1000, **model)
final = list(advanced_toolloop('What is the magic number?', sp=REPL_SYSTEM_PROMPT, tools=[make_run_repl(sh)], sh=sh, **model))[-1]
assert requests[0]['tools'][0]['function']['name'] == 'run_repl', requests[0].get('tools')
print('found', final['answer'].strip("'"))
