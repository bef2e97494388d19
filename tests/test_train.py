"The trainer's Llama is the one that llama.cpp runs, and training moves it"
import json, urllib.request
import pytest

torch = pytest.importorskip('torch', reason="training needs PyTorch: pip install 'rlm[train]'")
xl = pytest.importorskip('xllamacpp', reason="the comparison needs llama.cpp: pip install 'rlm[local]'")
from rlm.data import make_task, package_texts, real_task, token_words, trace
from rlm.local import find_adapter, find_gguf
from rlm import train as T

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def gguf(): return str(find_gguf())

@pytest.fixture(scope='module')
def tokenizer(gguf): return T.load_tokenizer(gguf)

def serve(gguf, adapter=None):
    p = xl.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = gguf, 4096, 1, False, 0
    if adapter: p.lora_adapters = [xl.CommonAdapterLoraInfo(str(adapter), 1.)]
    return xl.Server(p)

def prompt(n):
    "A held-out trace up to its last turn, as the model reads it"
    turns = trace(make_task(n, n_lines=300))
    return ''.join(f'<|im_start|>{role}\n{text}<|im_end|>\n' for role,text,_ in [('system', T.SEARCH_PROMPT, False), *turns[:-1]]) + '<|im_start|>assistant\n'

def difference(model, tokenizer, server, n=4):
    "Mean absolute difference of the log-probabilities of what llama.cpp writes"
    diffs = []
    for i in range(n):
        text = prompt(i)
        r = server.handle_completions(dict(prompt=text, max_tokens=24, temperature=0, logprobs=5, cache_prompt=False))
        said = r['choices'][0]['logprobs']['content']
        ids = tokenizer.encode(text).ids
        with torch.no_grad(): lp = torch.log_softmax(model(torch.tensor([ids + [c['id'] for c in said]]))[0], -1)
        diffs += [abs(lp[len(ids)-1+k, c['id']].item() - c['logprob']) for k,c in enumerate(said)]
    return sum(diffs)/len(diffs)


def test_the_adapter_is_the_same_in_torch_and_in_llama_cpp(gguf, tokenizer, tmp_path, monkeypatch):
    "And a wrong layout of the rotary dimensions, which still answers most questions, shows"
    model, adapter = T.load_gguf(gguf), find_adapter()
    loras = T.add_lora(model)
    T.load_adapter(loras, adapter, model.c)
    right = difference(model, tokenizer, serve(gguf, adapter))
    monkeypatch.setattr(T, '_neighbours', lambda w, heads: w)
    T.save_adapter(loras, tmp_path/'wrong.gguf', model.c)
    wrong = difference(model, tokenizer, serve(gguf, tmp_path/'wrong.gguf'))
    assert right < .03 and wrong > 2*right, (right, wrong)


def test_the_tokenizer_is_llama_cpps(gguf, tokenizer):
    server = serve(gguf)
    def theirs(text):
        body = json.dumps(dict(content=text, add_special=False, parse_special=True)).encode()
        req = urllib.request.Request(server.listening_address+'/tokenize', body, {'Content-Type': 'application/json'})
        return json.load(urllib.request.urlopen(req))['tokens']
    texts = [t[:3000] for t in package_texts()[:20]] + ["Hello  world 12345 don't\n\n\t x=1;  naïve café — 日本語 🎉", '  \n \n  a\r\n b   c', '١٢٣ ½ x²', prompt(1)]
    assert [t[:60] for t in texts if tokenizer.encode(t).ids != theirs(t)] == []


def test_training_lowers_the_loss_and_writes_an_adapter(gguf, tokenizer, tmp_path):
    said, out = [], tmp_path/'adapter.gguf'
    T.train(gguf, str(out), minutes=.3, say=said.append, every=1)
    loss = [float(s.split('loss ')[1].split(',')[0]) for s in said]
    assert len(loss) > 2 and loss[-1] < loss[0], said
    model = T.load_gguf(gguf)
    loras = T.add_lora(model)
    T.load_adapter(loras, out, model.c)
    assert any(l.B.abs().max() > 0 for l in loras.values())
    assert 'choices' in serve(gguf, out).handle_completions(dict(prompt=prompt(0), max_tokens=4))


def test_training_words_leave_out_the_held_out_ones(gguf):
    from rlm.data import held_words
    words = token_words(gguf)
    assert len(words['low']) > 5000 and not held_words() & {w.lower() for ws in words.values() for w in ws}


def test_questions_about_real_sources_can_be_solved():
    tasks = [t for i in range(60) if (t := real_task(i))]
    solved = [t for t in tasks if trace(t)]
    assert len(tasks) > 40 and len(solved) > .8*len(tasks)
