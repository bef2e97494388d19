"What ends a run and what does not: texts of messages, each with the ending that must be found in it"
import time
import pytest
from hypothesis import given, settings, strategies as st
from rlm.core import find_final, directives, blank_code, closing, FINAL_PATTERNS

F, V = 'final', 'final_var'
TAKEN = [ # text, kind, argument
    ('FINAL(42)', F, '42'),
    ('FINAL( QX-7731)', F, 'QX-7731'),
    ('FINAL(QX-7731 )', F, 'QX-7731'),
    ('FINAL (42)', F, '42'),
    ('  FINAL(42)', F, '42'),
    ('\tFINAL(42)  ', F, '42'),
    ('FINAL(42).', F, '42'),
    ('FINAL(42);', F, '42'),
    ('FINAL(42)\r\n', F, '42'),
    ('Some thought.\nFINAL(42)', F, '42'),
    ('Some thought.\n\nFINAL(42)\n\nDone.', F, '42'),
    ('FINAL(f(x) is 3)', F, 'f(x) is 3'),
    ('FINAL(f(g(x)) is ((3)))', F, 'f(g(x)) is ((3))'),
    ('FINAL(a (b\nc) d)', F, 'a (b\nc) d'),
    ('FINAL(\nfirst line\nsecond line\n)', F, 'first line\nsecond line'),
    ('FINAL(para one.\n\npara two (long).\n)', F, 'para one.\n\npara two (long).'),
    ('FINAL("42")', F, '42'),
    ("FINAL('42')", F, '42'),
    ('FINAL("""a\nb""")', F, 'a\nb'),
    ('FINAL("it says \\"no\\"")', F, 'it says "no"'),
    ('FINAL("a" and "b")', F, '"a" and "b"'),
    ('FINAL("a smiley :)")', F, 'a smiley :)'),
    ('FINAL("open ( only")', F, 'open ( only'),
    ('FINAL("line (one\nline two")', F, 'line (one\nline two'),
    ('FINAL(the sign ")" closes)', F, 'the sign ")" closes'),
    ("FINAL(the sign '(' opens)", F, "the sign '(' opens"),
    ('FINAL(call `f(` first)', F, 'call `f(` first'),
    ("FINAL(it's 5 o'clock)", F, "it's 5 o'clock"),
    ("FINAL(it's (a) and (b))", F, "it's (a) and (b)"),
    ('FINAL(5" (five inches))', F, '5" (five inches)'),
    ('FINAL(a smiley :) is all)', F, 'a smiley :) is all'),
    ('FINAL(sad :( but true)', F, 'sad :( but true'),
    ('FINAL(a) b) c)', F, 'a) b) c'),
    ('FINAL(1) wash, 2) rinse)', F, '1) wash, 2) rinse'),
    ('FINAL(The steps:\n1) wash\n2) rinse)', F, 'The steps:\n1) wash\n2) rinse'),
    ('FINAL(1)', F, '1'),
    ('FINAL(0)', F, '0'),
    ('FINAL([])', F, '[]'),
    ('FINAL(None)', F, 'None'),
    ('**FINAL(42)**', F, '42'),
    ('**FINAL(42).**', F, '42'),
    ('*FINAL(42)*', F, '42'),
    ('__FINAL(42)__', F, '42'),
    ('### FINAL(42)', F, '42'),
    ('**FINAL(f(x) is\n3)**', F, 'f(x) is\n3'),
    ('FINAL(**42**)', F, '**42**'),
    ('FINAL(the code:\n```python\nprint("hi")\n```\n)', F, 'the code:\n```python\nprint("hi")\n```'),
    ('```python\nprint(1)\n```\nFINAL(42)', F, '42'),
    ('```\nFINAL(no)\n```\nFINAL(yes)', F, 'yes'),
    ('I used `FINAL(no)` here.\nFINAL(yes)', F, 'yes'),
    ('an odd ` backtick\nFINAL(yes)\nand ` another', F, 'yes'),
    ('FINAL(draft)\nOn second thought:\nFINAL(better)', F, 'better'),
    ('FINAL(the file says:\nFINAL(no)\nand ends)', F, 'the file says:\nFINAL(no)\nand ends'),
    ('FINAL(oops\nFINAL(42)', F, '42'),
    ('<think>FINAL(no)\nFINAL(no)</think>\nFINAL(yes)', F, 'yes'),
    ('<think>\nmaybe FINAL(no)\n</think>FINAL(yes)', F, 'yes'),
    ('maybe\nFINAL(no)\n</think>\n\nFINAL(yes)', F, 'yes'),
    ('FINAL(naïve Zürich – 東京 🎉)', F, 'naïve Zürich – 東京 🎉'),
    ('FINAL({"a": [1, (2, 3)]})', F, '{"a": [1, (2, 3)]}'),
    ('FINAL(see https://x.y/a_(b))', F, 'see https://x.y/a_(b)'),
    ('FINAL(x = "a\\nb")', F, 'x = "a\\nb"'),
    ('FINAL_VAR(report)', V, 'report'),
    ('FINAL_VAR("report")', V, 'report'),
    ("FINAL_VAR('report')", V, 'report'),
    ('FINAL_VAR(`report`)', V, 'report'),
    ('FINAL_VAR( report )', V, 'report'),
    ('FINAL_VAR (report)', V, 'report'),
    ('**FINAL_VAR(report)**', V, 'report'),
    ('I put it into `report`.\n\nFINAL_VAR(report)\n', V, 'report'),
    ('FINAL(x)\nFINAL_VAR(report)', V, 'report'),
    ('FINAL_VAR(report)\nFINAL(x)', F, 'x'),
]

NOT_TAKEN = [
    '', '   ', 'FINAL', 'FINAL()', 'FINAL(   )', 'FINAL("")', 'FINAL(...)', 'FINAL_VAR()', 'FINAL_VAR("")',
    'then I will call FINAL(answer)',
    'I will answer with FINAL(answer) when I am done.',
    'FINAL(answer) is how I would end.',
    'FINAL(42) (as I said in section (3))',
    'The answer: FINAL(42)',
    '- FINAL(answer)\n- FINAL_VAR(name)',
    '> FINAL(42)',
    '1. FINAL(42)',
    '`FINAL(42)`',
    '`` FINAL(42) ``',
    '**`FINAL(42)`**',
    'Use `code` FINAL(42)',
    '`x` FINAL(42)',
    '```\nFINAL(42)\n```',
    '```python\nx = 1\nFINAL(x)\n```',
    '```repl\nFINAL_VAR(x)\n```',
    '~~~\nFINAL(42)\n~~~',
    '~~~python\nFINAL(42)\n```\n~~~',
    '````\n```\nFINAL(42)\n```\n````',
    '```python\nFINAL(42)',
    '~~~\nFINAL(42)',
    '  ```\n  FINAL(42)\n  ```',
    'final(42)', 'Final(42)', 'FINALLY(42)', 'MY_FINAL(42)', 'xFINAL(42)', 'FINAL_ANSWER(42)', 'FINAL: 42', 'FINAL[42]', 'FINAL\n(42)',
    'print(FINAL(42))',
    '<think>\nFINAL(42)\n</think>',
    '<think>\nFINAL(42)',
    'FINAL(42)\n</think>\nLet me look.',
    'FINAL(42', "FINAL(it's (open", 'FINAL(the function f(x)', 'FINAL(\n', 'FINAL_VAR(report',
]

def test_enough_texts(): assert len(TAKEN) >= 60 and len(NOT_TAKEN) >= 40 and len({t for t, *_ in TAKEN} | set(NOT_TAKEN)) == len(TAKEN) + len(NOT_TAKEN)

@pytest.mark.parametrize('text,kind,arg', TAKEN, ids=[repr(t) for t, *_ in TAKEN])
def test_taken(text, kind, arg):
    d = find_final(text)
    assert d and (d.kind, d.arg, d.closed) == (kind, arg, True)

@pytest.mark.parametrize('text', NOT_TAKEN, ids=repr)
def test_not_taken(text): assert find_final(text) is None

@pytest.mark.parametrize('text,arg', [("FINAL(it's (open", "it's (open"), ('FINAL(42', '42'), ('FINAL(the function f(x)', 'the function f(x)'), ('FINAL_VAR(report', 'report')])
def test_unclosed_is_seen_but_is_no_ending(text, arg):
    d, = directives(text)
    assert (d.arg, d.closed) == (arg, False)

@pytest.mark.parametrize('patterns,text,arg', [
    (dict(final=r'\\boxed\{'), 'So\n\\boxed{\\frac{1}{2}}', '\\frac{1}{2}'),
    (dict(final=r'ANSWER\['), 'ANSWER[a[0]]', 'a[0]'),
    (dict(final='Final answer:'), 'Well.\nFinal answer: 42 (all)\nBye', '42 (all)'),
    (dict(final='(?:DONE|END):'), 'END: x', 'x'),
    (FINAL_PATTERNS | dict(final=r'RESULT\('), 'FINAL(no)\nRESULT(yes)', 'yes')])
def test_patterns(patterns, text, arg): assert find_final(text, patterns).arg == arg

def test_other_patterns_replace_final(): assert find_final('FINAL(42)', dict(final='ANSWER:')) is None

plain = st.text(st.characters(blacklist_characters='()"\'`~<>:;\n\r.…', blacklist_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1).filter(lambda s: s.strip() and not s.isspace())
balanced = st.recursive(plain, lambda o: st.lists(o, min_size=1, max_size=3).map(lambda xs: ' '.join(xs)) | o.map(lambda s: f'({s})') | st.tuples(o, o).map('\n x'.join), max_leaves=6)

@settings(max_examples=300, deadline=None)
@given(balanced)
def test_balanced_text_comes_out_whole(s): assert find_final(f'Look:\nFINAL({s})\n').arg == s.strip()

@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='FINAL_VR()"\'`~\n x*:.<think/>', max_size=60) | st.lists(st.sampled_from(['FINAL(', 'FINAL_VAR(', ')', '\n', '```', '`', '"', "'", 'x ', '~~~', '<think>', '</think>', ' ', '**', ':)']), max_size=25).map(''.join))
def test_no_text_breaks_it(text):
    assert len(blank_code(text)) == len(text)
    for d in directives(text): assert d.arg.strip() and d.kind in FINAL_PATTERNS
    d = find_final(text)
    assert d is None or d.closed

@pytest.mark.parametrize('piece', ['FINAL(', 'FINAL(x', '(', ')', '"', "'", '`', '`a` ', '```\n', '~~~\n', 'FINAL("', '<think>', 'a) ', '\\"', '**', 'FINAL(a) b\n', ' :)', '\n1) x'])
def test_long_messages_take_no_time(piece):
    text, t0 = 'FINAL(' + piece * (20_000 // len(piece)), time.perf_counter()
    find_final(text)
    assert time.perf_counter() - t0 < 2
