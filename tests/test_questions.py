"The question set holds on the Python that runs it: every gold answer stands in its text, near its evidence"
import json, re, string, sysconfig
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGES = 'asyncio collections concurrent email http importlib json logging sqlite3 unittest urllib xml'.split()
SITE = {'sitecustomize.py', 'usercustomize.py'}
DATA = json.loads(files('rlm').joinpath('questions.json').read_text(encoding='utf-8'))
QUESTIONS = DATA['questions']
ANSWERED = [q for q in QUESTIONS if q['kind'] not in ('count', 'absent')]


def topics():
    from pydoc_data.topics import topics
    return '\n\n'.join(topics[key] for key in sorted(topics))


def stdlib():
    root = Path(sysconfig.get_path('stdlib'))
    top = (p for p in root.glob('*.py') if not p.name.startswith('_sysconfigdata') and p.name not in SITE)
    deep = (p for name in PACKAGES for p in (root/name).rglob('*.py'))
    paths = {p.relative_to(root).as_posix(): p for p in (*top, *deep)}
    kept = sorted(name for name in paths if not {'test', 'tests'} & set(name.split('/')))
    return '\n\n'.join(paths[name].read_text(encoding='utf-8') for name in kept)


def norm(text):
    "Outer spaces, quotes and periods off, runs of whitespace made one space, lower case"
    outer = string.whitespace + '\'"`'
    return ' '.join(text.lstrip(outer).rstrip(outer+'.').split()).lower()


def test_norm():
    assert norm(' "`Kent  Beck\'s`". ') == "kent beck's" and norm('.pdbrc') == '.pdbrc'


@pytest.fixture(scope='module')
def contexts(): return dict(topics=topics(), stdlib=stdlib())


def by_id(qs): return pytest.mark.parametrize('q', qs, ids=[q['id'] for q in qs])


def test_sizes(contexts):
    assert 4e5 < len(contexts['topics']) < 8e5
    assert 5e6 < len(contexts['stdlib']) < 1e7


def test_shape():
    assert len(QUESTIONS) == 50 == len({q['id'] for q in QUESTIONS}) == len({q['question'] for q in QUESTIONS})
    for q in QUESTIONS:
        gold = 'answer_expr' if q['kind'] == 'count' else 'answers'
        assert set(q) == {'id', 'context', 'question', gold, 'evidence', 'kind'}, q['id']
        assert q['context'] in DATA['contexts'] and q[gold] and q['question'].endswith('?'), q['id']
    kinds = [q['kind'] for q in QUESTIONS]
    assert kinds.count('count') == 2 and kinds.count('absent') == 3


@by_id(ANSWERED)
def test_answered(q, contexts):
    text = contexts[q['context']]
    found = re.search(q['evidence'], text)
    assert found, 'the evidence is not in the text'
    near = norm(text[max(0, found.start()-300):found.end()+300])
    assert any(norm(a) in near for a in q['answers'])
    question = norm(q['question'])
    told = [a for a in q['answers'] if re.search(rf'(?<!\w){re.escape(norm(a))}(?!\w)', question)]
    assert not told, 'the question gives its answer away'


@by_id([q for q in QUESTIONS if q['kind'] == 'count'])
def test_count(q, contexts):
    text = contexts[q['context']]
    assert re.search(q['evidence'], text)
    gold = eval(q['answer_expr'], dict(re=re, context=text))
    assert type(gold) is int and gold > 1


@by_id([q for q in QUESTIONS if q['kind'] == 'absent'])
def test_absent(q, contexts):
    assert not re.search(q['evidence'], contexts[q['context']])
    assert 'not found' in q['answers']
