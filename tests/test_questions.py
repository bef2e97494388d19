"The question set holds on the Python that runs it: every gold answer stands in its text, near its evidence"
import json, re
from importlib.resources import files

import pytest
from rlm.benchmarks import normal, real_contexts

DATA = json.loads(files('rlm').joinpath('questions.json').read_text(encoding='utf-8'))
QUESTIONS = DATA['questions']
ANSWERED = [q for q in QUESTIONS if q['kind'] not in ('count', 'absent')]


@pytest.fixture(scope='module')
def contexts(): return real_contexts()


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
    near = normal(text[max(0, found.start()-300):found.end()+300])
    assert any(normal(a) in near for a in q['answers'])
    question = normal(q['question'])
    told = [a for a in q['answers'] if re.search(rf'(?<!\w){re.escape(normal(a))}(?!\w)', question)]
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
