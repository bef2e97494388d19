"The page of a run, opened in Chromium: what it shows, what it does, and that nothing a trace holds runs, loads or leaves"
import html, json, math, os, re, shutil, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from rlm.models import ScriptedModel, repl_call
from rlm.page import places, save_html, trace_html
from rlm.rlm import RLM
from rlm.trace import Trace, read_trace
from rlm.usage import Budget, RLMError

ARGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
LOAD = 4 # how much slower than an idle machine a test may run
LOG = [f'Day {i}: wind from the west, {i%7} boats in the harbour, nothing to note.' for i in range(2000)]
LOG[1310] = 'Day 1310: the Meridian came in at noon under captain Oda Lindqvist, with salt and two passengers.'
LOG[1604] = 'Day 1604: the Meridian sailed again, captain Lindqvist on board; harbour dues of 48 crowns were paid.'
HITS = "hits = [l for l in context.splitlines() if 'Meridian' in l]\nfor h in hits: print(h)"

# -- pages to open

def reader(messages):
    "Reads a part, and as a child run looks for itself"
    time.sleep(.15)
    if 'run_repl' in messages[0]['content']: return 'FINAL(It came twice, under captain Oda Lindqvist.)' if len(messages)>3 else repl_call("print(llm_query('Sum up: ' + context[:900]))")
    return 'The captain is Oda Lindqvist.' if 'Lindqvist' in messages[-1]['content'] else 'No captain is named here.'

@pytest.fixture(scope='module')
def res():
    "A run with cells, a batch of sub-calls, child runs, and a guard"
    root = ScriptedModel(repl_call("print(len(context), context[:300])", say='I begin with the shape of the context: how long it is, and what its lines look like.'), repl_call(HITS),
        repl_call("parts = [context[i:i+9000] for i in range(0, len(context), 9000)]\nanswers = llm_query_batched([f'Who commands the Meridian? Say so if it is not told.\\n\\n{p}' for p in parts])\nprint([a for a in answers if 'No captain' not in a])",
            say='Two lines name the ship. To be sure, every part is read by a sub-call, and those that name a captain are kept.'),
        repl_call("print(rlm_query_batched(['What does this part say of the Meridian?']*3, [context[90000:99000], context[100000:109000], context[50000:59000]]))"), 'Now I know it.', 'FINAL(Oda Lindqvist)', name='planner-large')
    return RLM(root, recursive_model=ScriptedModel(default=reader, name='reader-small'), depth=2, max_concurrency=6).completion('Who is the captain of the Meridian, and is it the same person on both visits?', '\n'.join(LOG))

def a_browser(p):
    for path in (shutil.which('chromium'), shutil.which('google-chrome'), p.chromium.executable_path):
        if path and os.path.exists(path): return p.chromium.launch(executable_path=path, args=ARGS)
    pytest.skip('no Chromium: apt-get install chromium, or playwright install chromium')

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with sync_api.sync_playwright() as p:
        b = a_browser(p)
        yield b
        b.close()

@pytest.fixture
def show(browser, tmp_path):
    "Opens the page of a trace; afterwards nothing may have left it, popped up or failed"
    told, contexts = [], []
    def show(trace, width=1280, height=900, **kw):
        path = trace if isinstance(trace, Path) else save_html(trace, tmp_path/f'{len(contexts)}.html')
        c = browser.new_context(viewport=dict(width=width, height=height), **kw)
        c.set_default_timeout(20_000)
        contexts.append(c)
        page = c.new_page()
        page.on('request', lambda r: told.append(f'request {r.url}') if r.url.partition('#')[0]!=path.as_uri() else None)
        page.on('dialog', lambda d: (told.append(f'dialog {d.message}'), d.dismiss()))
        page.on('pageerror', lambda e: told.append(f'error {e}'))
        page.on('console', lambda m: told.append(f'console {m.text}') if m.type in ('error', 'warning') else None)
        page.on('popup', lambda p: told.append('popup'))
        t0 = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector('html[data-ready]', state='attached')
        page.seconds, page.path = time.perf_counter()-t0, path
        return page
    yield show
    for c in contexts: c.close()
    assert told == []

def items(page, kind): return page.locator(f'#talk .item.k-{kind}')
def unfold(item): item.locator('> .head').click()
def search(page, text):
    page.fill('#find', text)
    page.wait_for_function('q => query === q', arg=text)
def unfold_all(page):
    "Unfold what is folded, and what that brings, a few times"
    for _ in range(4): page.evaluate("document.querySelectorAll('#talk .head[aria-expanded=false]').forEach(h => h.click())")

# -- what it shows

def test_the_answer_and_what_it_rests_on_come_first(show, res):
    page = show(res)
    assert page.title() == 'Who is the captain of the Meridian, and is it the same person on both visits? · rlm'
    assert page.locator('main > *').first.get_attribute('id') == 'the-answer' and page.locator('main > *').nth(1).get_attribute('id') == 'places'
    assert page.inner_text('.answer') == 'Oda Lindqvist' and page.inner_text('.question').startswith('Who is the captain')
    stats = dict(zip(page.locator('.stats dt').all_inner_texts(), page.locator('.stats dd').all_inner_texts()))
    assert stats['Turns'].startswith('6\n') and stats['Model calls'].startswith(f'{res.usage.calls}\n') and stats['Depth'] == '2\n3 child runs'
    first = page.locator('.place').first
    assert first.locator('mark').inner_text() == 'Oda Lindqvist' and LOG[1310] in first.locator('pre').inner_text() and LOG[1604] in first.locator('pre').inner_text()
    first.locator('button').click()
    opened = page.locator('.item.flash')
    assert 'turn 2' in first.inner_text() and LOG[1310] in opened.locator('pre').inner_text() and page.evaluate("document.activeElement.closest('.item').classList.contains('flash')")
    assert opened.evaluate('o => { const r = o.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight }')

def test_every_place_opens_where_it_says(show, res):
    page, found = show(res), places(res.trace)[0]['places']
    assert {o['what'] for o in found} == {'output', 'reply'} and page.locator('.place').count() == len(found)
    for i,o in enumerate(found):
        page.locator('.place button').nth(i).click()
        assert o['match'] in page.locator('.item:focus-within .body pre').last.inner_text()

def test_a_turn_says_what_is_left_of_the_budget(show):
    m = ScriptedModel(repl_call('print(context)'), 'FINAL(text)')
    page = show(RLM(m, budget=Budget(calls=5, tokens=90_000, seconds=60)).completion('Q?', 'text'))
    assert re.fullmatch(r'left: 8\d[.\d]*k tokens, 3 calls, [\d.]+ s, 29 turns', page.locator('.turn .left').first.inner_text()), page.locator('.turn .left').first.inner_text()

def test_a_place_says_where_in_the_context_it_stands(show, res):
    page = show(res)
    assert page.locator('.place .at').all_inner_texts() == ['context, line 1,311']*4
    assert page.locator('.stands code').all_inner_texts() == [LOG[1310]]*3 and page.locator('.stands mark').first.inner_text() == 'Oda Lindqvist'
    assert [(o['line'], '\n'.join(LOG)[o['at']:][:13]) for o in res.trace[-1]['places']] == [(1311, 'Oda Lindqvist')]*4

@pytest.mark.parametrize('context, at', [(LOG, 'context[1310], line 1'), (dict(notes='x', log='\n'.join(LOG)), 'context["log"], line 1,311'), (dict(a=3), None), (None, None)])
def test_a_context_of_several_texts(show, context, at):
    m = ScriptedModel(repl_call(f'print({LOG[1310]!r})'), 'FINAL(oda lindqvist)', 'FINAL(oda lindqvist)')
    page = show(RLM(m).completion('Who?', context))
    assert page.locator('.place').count() == 1 and page.locator('.place .at').all_inner_texts() == ([at] if at else [])

def test_a_context_in_a_huge_file_is_looked_through_in_time(tmp_path):
    path = tmp_path/'log.txt'
    path.write_text('\n'.join([*('ä quiet day, nothing to note'*40 for _ in range(20_000)), LOG[1310], *LOG[:1000]]))
    t0 = time.perf_counter()
    res = RLM(ScriptedModel(repl_call('print(context[context.find("Meridian")-40:][:120])'), 'FINAL(Oda Lindqvist)')).completion('Who?', path)
    assert path.stat().st_size > 20e6 and time.perf_counter()-t0 < 4*LOAD
    assert [(o['line'], o['text']) for o in res.trace[-1]['places']] == [(20_001, LOG[1310])]

def test_code_output_and_sub_calls_unfold(show, res):
    page = show(res)
    assert page.locator('#talk .turn').count() == 6 and page.locator('#talk .head[aria-expanded=true]').count() == 0
    assert 'I begin with the shape' in page.locator('.turn').first.inner_text() and 'Turn 1' in page.locator('.turn').first.inner_text()
    code = items(page, 'code').nth(1)
    assert code.locator('pre').count() == 0
    unfold(code)
    assert code.locator('pre').inner_text() == HITS and code.locator('pre .kw').first.inner_text() == 'for' and code.locator('> .head').get_attribute('aria-expanded') == 'true'
    unfold(code)
    assert not code.locator('pre').is_visible()
    batch = items(page, 'subs').first
    n = len([e for e in res.trace.of('reply') if e['kind']=='sub' and e['depth']==1])
    assert f'{n} of {n} sub-calls answered' in batch.inner_text()
    unfold(batch)
    call = batch.locator('.item.k-sub').first
    unfold(call)
    assert 'Who commands the Meridian?' in call.locator('pre').nth(1).inner_text() and call.locator('pre').last.inner_text() == 'No captain is named here.'
    call.get_by_text('As in the trace').click()
    assert '"type": "request"' in call.inner_text() and '"finish_reason": "stop"' in call.inner_text()
    assert 'Now I know it.' in page.locator('.turn').nth(4).inner_text() and items(page, 'guard').count() == len(res.trace.of('guard'))

def test_child_runs_unfold_to_conversations_of_their_own(show, res):
    page = show(res)
    unfold(items(page, 'runs'))
    kids = page.locator('.item.k-run')
    assert kids.count() == 3
    unfold(kids.nth(1))
    kid = kids.nth(1).locator('.kid')
    assert 'What does this part say of the Meridian?' in kid.inner_text() and 'reader-small' in kid.inner_text() and kid.locator('.turn').count() == 2
    assert kid.locator('.item.k-subs').count() == 1 and 'It came twice' in kid.locator('.item.k-final').inner_text()

def test_the_timeline_has_lanes_for_depths_and_parallel_calls(show, res):
    page = show(res)
    svg = page.locator('#timeline svg')
    assert re.match(r'Timeline: \d+ model calls and 7 cells on \d+ lanes over', svg.get_attribute('aria-label'))
    assert [t for t in svg.locator('text').all_text_contents() if t.startswith('depth')] == ['depth 0', 'depth 1', 'depth 2']
    rows = svg.locator('.bar-sub').evaluate_all('bs => new Set(bs.map(b => b.getAttribute("y"))).size')
    assert rows >= 5 and 1 <= svg.locator('.bar-cell').count() <= 7 and 4 <= svg.locator('.bar-call').count() <= 12
    at = svg.locator('.bar-sub').evaluate_all('bs => bs.map(b => [b.getAttribute("y"), +b.getAttribute("x"), +b.getAttribute("width")])')
    for y in {o[0] for o in at}:
        row = sorted(o[1:] for o in at if o[0]==y)
        assert all(a[0]+a[1] <= b[0]+3 for a,b in zip(row, row[1:])), 'bars of one lane lie on each other'
    svg.locator('.bar-sub').last.click()
    call = page.locator('.item.flash')
    assert 'k-sub' in call.get_attribute('class') and page.locator('.item.k-run:has(.item.flash)').count() == 1, 'a sub-call of a child run is opened inside it'

def test_the_chart_and_its_table_tell_what_was_used(show, res):
    page = show(res)
    rows = {r[0]: r[1:] for r in (tr.locator('td').all_inner_texts() for tr in page.locator('#table tbody tr').all() + page.locator('#table tfoot tr').all())}
    total, n = res.usage, lambda x: f'{x:,}'
    assert rows['All'][:4] == [n(total.calls), n(total.prompt_tokens), n(total.cached_tokens), n(total.completion_tokens)]
    assert sorted(rows) == ['All', 'planner-large · depth 0', 'reader-small · depth 1', 'reader-small · depth 2']
    assert rows['planner-large · depth 0'][1] == n(total.by_model['planner-large'].prompt_tokens) and rows['reader-small · depth 2'][0] == '3'
    chart = page.locator('#tokens svg')
    assert chart.get_attribute('aria-label').startswith('Tokens over time') and chart.locator('path[data-series]').count() == 3
    chart.hover(position=dict(x=chart.bounding_box()['width']-5, y=60))
    readout = page.inner_text('.readout')
    shown = float(re.match(r'([\d.,]+)k', readout)[1])
    assert abs(shown*1000 - total.total_tokens) <= 60 and 'planner-large · depth 0' in readout
    page.get_by_role('button', name='Cost').click()
    assert 'Nothing was paid' in page.inner_text('#tokens .in')

def test_prices_are_drawn_where_they_are_known(show, res):
    paid = [e | (dict(usage=e['usage'] | dict(cost=.25)) if e['type']=='reply' else {}) for e in res.trace]
    page = show(paid)
    page.get_by_role('button', name='Cost').click()
    assert f'${.25*res.usage.calls:.4f} in all' in page.locator('#tokens svg').get_attribute('aria-label')
    assert page.locator('#table tfoot td').nth(6).inner_text() == f'${.25*res.usage.calls:.4f}'

# -- finding things

def test_search_finds_in_code_outputs_and_sub_calls(show, res):
    page = show(res)
    search(page, 'oda LINDQVIST')
    n = int(page.inner_text('#count').split()[0])
    assert n == page.locator('#talk .item').count() > 5 and {m.lower() for m in page.locator('#talk mark').all_inner_texts()} == {'oda lindqvist'}
    search(page, 'harbour dues of 48')
    item = items(page, 'output').first
    unfold(item)
    assert item.locator('pre mark').inner_text() == 'harbour dues of 48' and 'Turn 2' in page.inner_text('#talk .where')
    item.get_by_text('Show in the conversation').click()
    assert page.locator('#talk .turn').count() == 6 and LOG[1604] in page.locator('.item.flash pre').inner_text() and page.input_value('#find') == ''
    search(page, '.*(no such thing')
    assert 'Nothing in this trace fits.' in page.inner_text('#talk')
    page.press('#find', 'Escape')
    assert page.locator('#talk .turn').count() == 6

def test_filters(show, res):
    page = show(res)
    def chip(name): page.locator(f'.chip[data-kind="{name}"]').click()
    chip('Code')
    assert items(page, 'code').count() == 7 == page.locator('#talk .item').count() and page.inner_text('#count').startswith('7 of ')
    page.select_option('select[aria-label="All depths"]', label='Depth 1')
    assert page.locator('#talk .item').count() == 3
    chip('Sub-calls')
    chip('Code')
    assert page.locator('#talk .item').count() == int(page.inner_text('#count').split()[0]) > 10
    page.select_option('select[aria-label="All models"]', label='planner-large')
    assert 'Nothing in this trace fits.' in page.inner_text('#talk')
    page.keyboard.press('Escape')
    assert page.locator('#talk .turn').count() == 6 and page.locator('.chip[aria-pressed=true]').count() == 0

def test_keyboard(show, res):
    page = show(res)
    focus = lambda: page.evaluate("[...document.querySelectorAll('#talk .head')].indexOf(document.activeElement)")
    for key, at in [('j', 0), ('j', 1), ('j', 2), ('k', 1)]:
        page.keyboard.press(key)
        assert focus() == at
    page.keyboard.press('e')
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == 'true' and page.locator('#talk pre').count() == 1
    page.keyboard.press('e')
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == 'false'
    page.keyboard.press('/')
    page.keyboard.type('jeke Meridian')
    assert page.input_value('#find') == 'jeke Meridian', 'keys are letters while one types'
    page.keyboard.press('Escape')
    assert page.input_value('#find') == '' and focus() == -1
    page.keyboard.press('t')
    assert page.evaluate('document.documentElement.dataset.theme') == 'dark'
    page.keyboard.press('Tab')
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != 'none'

# -- how it looks

CONTRAST = '''() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgba = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data] }
  const over = (a, b) => a.slice(0, 3).map((v, i) => v*a[3]/255 + b[i]*(1 - a[3]/255))
  const ground = e => { const layers = []; for (; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor)); return layers.reduce((b, l) => over(l, b), [255, 255, 255]) }
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b }
  const worst = new Map()
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || e.closest('script') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue
    const back = ground(e), s = getComputedStyle(e), a = light(over(rgba(e.closest('svg') ? s.fill : s.color), back)), b = light(back), ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05)
    if (ratio < 4.5) worst.set(`${e.tagName} ${e.getAttribute('class')} ${e.textContent.slice(0, 30)}`, ratio)
  }
  return Object.fromEntries(worst)
}'''

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(show, res, scheme):
    page = show(res, color_scheme=scheme)
    unfold_all(page)
    assert page.evaluate(CONTRAST) == {}
    search(page, 'Meridian')
    unfold_all(page)
    assert page.evaluate(CONTRAST) == {}

def test_light_and_dark_are_the_readers_choice(show, res):
    ground = lambda p: sum(map(int, re.findall(r'\d+', p.evaluate('getComputedStyle(document.body).backgroundColor'))))
    light, dark = show(res, color_scheme='light'), show(res, color_scheme='dark')
    assert ground(light) > 600 and ground(dark) < 150
    dark.click('#theme')
    assert ground(dark) > 600

@pytest.mark.parametrize('width', [320, 390])
def test_on_a_phone_nothing_is_wider_than_the_screen(show, res, width):
    page = show(res, width=width, height=844, is_mobile=True, has_touch=True)
    for _ in range(2):
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > innerWidth + 1).length") == 0
        unfold_all(page)
    assert page.locator('.answer').is_visible() and page.locator('#find').is_visible()
    page.locator('.place button').first.tap()
    assert page.locator('.item.flash pre').is_visible()

def test_it_can_be_used_without_seeing_it(show, res):
    page = show(res)
    unfold_all(page)
    assert page.evaluate("[...document.querySelectorAll('button, input, select, a')].filter(e => !(e.getAttribute('aria-label') || e.innerText || e.textContent).trim()).map(e => e.outerHTML)") == []
    assert page.evaluate("[...document.querySelectorAll('svg')].filter(s => !(s.getAttribute('aria-hidden') || s.getAttribute('role') === 'img' && s.getAttribute('aria-label'))).length") == 0
    assert page.evaluate("[...document.querySelectorAll('main > section')].every(s => s.getAttribute('aria-label') || document.getElementById(s.getAttribute('aria-labelledby')).textContent)")
    assert page.get_by_role('banner').count() == page.get_by_role('main').count() == page.get_by_role('contentinfo').count() == page.get_by_role('search').count() == page.get_by_role('heading', level=1).count() == 1
    assert page.locator('html').get_attribute('lang') == 'en' and page.locator('#count').get_attribute('role') == 'status'
    assert page.evaluate('new Set([...document.querySelectorAll("[id]")].map(e => e.id)).size === document.querySelectorAll("[id]").length')

# -- hostile traces

EVIL = '<img src=x onerror=alert(1)><img src="http://127.0.0.1:9/x.png"></script><script>alert(2)</script><!--<script> {{data}} {{policy}} ]]> \\u003cb> &lt;i&gt; \u202egnp\x1b[31m\x00\u2028 javascript:alert(4) \ud800 ' + "';alert(5)//\""

def evil_events():
    told = [('run', dict(run='root', parent=None, depth=0, query=EVIL, model=EVIL, context=EVIL, repl=EVIL)), ('request', dict(run='root', depth=0, step=1, kind='root', key='k', model=EVIL, messages=[dict(role=EVIL, content=EVIL)])),
        ('reply', dict(run='root', depth=0, step=1, kind='root', key='k', model=EVIL, seconds=.5, usage=dict(prompt_tokens=5), message=dict(role=EVIL, content=EVIL, tool_calls=[dict(function=dict(name=EVIL, arguments=EVIL))]))),
        ('request', dict(run='root', depth=1, step=1, kind='sub', key='s', model=EVIL, messages=[dict(role='user', content=EVIL)])), ('reply', dict(run='root', depth=1, step=1, kind='sub', key='s', model=EVIL, usage='none', message=dict(content=EVIL))),
        ('cell', dict(run='root', depth=0, step=1, index=1, code=EVIL, output=f'{EVIL}\nquoted {EVIL}', seconds=.1)), ('guard', dict(run='root', depth=0, step=1, name=EVIL, text=EVIL)), ('failed', dict(run='root', depth=0, step=1, key='z', error=EVIL, text=EVIL)),
        (EVIL, dict(run='root', depth=0, anything=[EVIL, {EVIL: EVIL}])), ('run', dict(run=EVIL, parent='root', depth=1, query=EVIL, model=EVIL)), ('error', dict(run=EVIL, depth=1, error=EVIL, text=EVIL)), ('final', dict(run='root', depth=0, answer=EVIL, stop_reason=EVIL, places=[dict(n=k, line=7, item=EVIL, text=EVIL, match=EVIL[:60]) for k in range(99)]))]
    return [dict(v=1, n=i, t=1e9+i, type=t, **k) for i,(t,k) in enumerate(told)]

@pytest.mark.parametrize('width', [1280, 390])
def test_nothing_in_a_trace_runs_or_loads(show, tmp_path, width):
    page = show(save_html(Trace(events=evil_events()), tmp_path/'evil.html', title=EVIL), width=width)
    nodes = page.evaluate("[document.scripts.length, document.querySelectorAll('img, iframe, object, embed, link, form, video, audio, b, image, use, style ~ style').length]")
    for _ in range(3):
        unfold_all(page)
        page.evaluate("document.querySelectorAll('#talk .foot .link[aria-expanded=false]').forEach(b => b.click())")
        search(page, '<script>')
        assert int(page.inner_text('#count').split()[0]) >= 9
    shown = page.inner_text('.answer')
    assert nodes[0] == 2 and '<img src=x onerror=alert(1)>' in shown and '</script><script>alert(2)</script><!--<script> {{data}} {{policy}}' in shown and '\\u003cb> &lt;i&gt;' in shown
    assert '⟨U+202E⟩' in shown and '\u202e' not in page.inner_text('body') and '\x1b' not in page.inner_text('body') and '␛[31m' in shown
    assert page.evaluate("[document.scripts.length, document.querySelectorAll('img, iframe, object, embed, link, form, video, audio, b:not(.chip b, .name b, .runhead b), image, use').length]") == [2, 0]
    assert page.locator('.stands').count() >= 1 and '<img src=x onerror=alert(1)>' in page.locator('.stands .at').first.inner_text()
    assert page.title().startswith('<img src=x') and page.evaluate('document.documentElement.scrollWidth') <= width

def test_the_policy_refuses_what_a_hole_in_the_script_would_need(browser, res, tmp_path):
    page = browser.new_page()
    asked = []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(save_html(res, tmp_path/'p.html').as_uri())
    refused = page.evaluate('''async () => {
      const res = [], attempt = async (name, f) => { try { await f(); res.push([name, 'went']) } catch (e) { res.push([name, 'refused']) } }
      await attempt('innerHTML', () => { document.body.innerHTML += '<b>x</b>' })
      await attempt('eval', () => new Promise((ok, no) => setTimeout(() => { try { ok((0, eval)('1')) } catch (e) { no(e) } }, 99)))
      await attempt('fetch', () => fetch('http://127.0.0.1:9/'))
      await attempt('script', () => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.head.append(s); if (!window.ran) throw 1 })
      await attempt('image', () => new Promise((ok, no) => { const i = new Image(); i.onload = ok; i.onerror = no; i.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw=' }))
      await attempt('style', () => { const s = document.createElement('style'); s.textContent = 'body { opacity: .5 }'; document.head.append(s); if (getComputedStyle(document.body).opacity === '1') throw 1 })
      return res }''')
    assert dict(refused) == dict.fromkeys(('innerHTML', 'eval', 'fetch', 'script', 'image', 'style'), 'refused')
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == []
    page.close()

def holes(page): return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])

def test_the_file_names_no_place_to_load_from(res):
    page = trace_html(Trace())
    assert not re.search(r'https?:(?!//www\.w3\.org/2000/svg)|\b(src|srcset|action)=|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function', page)
    assert re.findall(r'href="([^"]*)"', page) == ['#conversation', '#the-answer', '#timeline', '#tokens', '#conversation']
    assert page.count('<script') == 2 and "default-src 'none'" in page and "'unsafe" not in page and page.index('charset') < 200
    assert trace_html(res).count('<script') == 2

texts = st.text(st.characters() | st.sampled_from('<>&"\'/!-{}\\\u2028'), max_size=40) | st.sampled_from(['</script>', '<!--', '{{data}}', '\ud800'])
values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)

@settings(max_examples=120, deadline=None)
@given(st.lists(st.dictionaries(texts, values, max_size=4), max_size=5), texts)
def test_what_a_trace_holds_is_in_the_page_as_it_is(told, title):
    events = [e | dict(type='odd') for e in told]
    page = trace_html(events, title)
    assert holes(page)['events'] == events and page.count('<script') == 2 and page.count('</script') == 2 and page.count('<!--') == 0
    shown = html.unescape(re.search('<title>(.*?)</title>', page, re.S)[1])
    assert shown.split() == re.sub('[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]', ' ', title).split()

ODD = ((None,)*11, ('a', 'b', 'x', 'y', -3, [], [1], ['k'], 's', 5, 'sub'), ('b', 'a', 1e308, -1e308, 1e308, dict(prompt_tokens='x'), dict(content=[dict(text='t'), 3]), 'k', -5, dict(a=1), 'sub'),
    (dict(z=1), 'q', 2.5, 1e300, 7.7, dict(prompt_tokens=1e300), 'm', 3, 1e300, 'ooo', 7), ('__proto__', 'constructor', True, math.nan, math.inf, 3, [None, [{}]], '__proto__', math.nan, None, {}))

def test_fields_of_any_kind(show):
    names = 'run parent step t depth usage message key seconds output kind'.split()
    kinds = 'run request reply failed cell batch guard compact budget final error constructor __proto__ new'.split()
    page = show([dict(v=1, type=k, **(f := dict(zip(names, o))), messages=f['message'], code=f['output'], answer=f['output'], text=f['message'], name=f['key']) for k in kinds for o in ODD])
    unfold_all(page)
    search(page, 'x')
    unfold_all(page)
    assert page.locator('#talk .item').count() > 3 and page.evaluate('document.documentElement.scrollWidth') <= 1280

# -- large, torn, empty and new traces

def many_events(n=10_000):
    "A run that asks 24 sub-calls in each turn"
    events, t, step, add = [], 1.7e9, 0, lambda type, **kw: events.append(dict(v=1, n=len(events), t=t, type=type, run='root', **kw))
    add('run', parent=None, depth=0, query='How many visits are told of in ten thousand pages?', model='planner', context='`context` is a list of 10,000 pages', repl='monty')
    while len(events) < n-1:
        step += 1
        add('request', depth=0, step=step, kind='root', key=f'r{step}', model='planner', messages=[dict(role='tool', content='seen so far\n'*40)])
        t += 2
        add('reply', depth=0, step=step, kind='root', key=f'r{step}', model='planner', message=dict(role='assistant', content=f'On to part {step}.'), usage=dict(calls=1, prompt_tokens=1000+step*10, completion_tokens=60, cost=.001), seconds=2)
        for k in range(24): add('request', depth=1, step=step, kind='sub', key=f's{step}.{k}', model='reader', messages=[dict(role='user', content=f'Count in page {step}.{k}: '+'a boat came in, a boat went out. '*16)])
        for k in range(24):
            t += .05
            add('reply', depth=1, step=step, kind='sub', key=f's{step}.{k}', model='reader', message=dict(role='assistant', content=f'{k*7} visits'), usage=dict(calls=1, prompt_tokens=300, completion_tokens=9, cost=.0001), seconds=(k+1)*.05)
        add('cell', depth=0, step=step, index=1, code='counts += llm_query_batched(pages)', output=f'{step*31} visits so far\n'*20, seconds=1.25)
    del events[n-1:]
    add('final', depth=0, answer='6,200', stop_reason='final', iterations=step, seconds=t-1.7e9)
    return events

def test_ten_thousand_events_open_in_two_seconds(show):
    events = many_events()
    path = show(events[:3]).path.with_name('many.html')
    assert len(events) == 10_000
    page = show(Trace(events=events).save_html(path))
    seconds = min(page.seconds, show(path).seconds)
    assert seconds < 2*LOAD and page.evaluate("document.querySelectorAll('*').length") < 12_000
    steps = max(e.get('step', 0) for e in events)
    t0 = time.perf_counter()
    search(page, f'count in page {steps-1}.7:')
    assert page.inner_text('#count').startswith('1 of ') and time.perf_counter()-t0 < LOAD
    items(page, 'sub').locator('> .head').click()
    t0 = time.perf_counter()
    items(page, 'sub').get_by_text('Show in the conversation').click()
    assert f'Count in page {steps-1}.7:' in page.locator('.item.flash').inner_text() and time.perf_counter()-t0 < LOAD
    assert page.evaluate("document.querySelectorAll('*').length") < 14_000
    page.evaluate('scrollTo(0, 0)')
    page.locator('.chip[data-kind="Sub-calls"]').click()
    n = page.locator('#talk .item').count()
    assert n < 400
    page.locator('#talk .more:visible').last.scroll_into_view_if_needed()
    page.wait_for_function('n => document.querySelectorAll("#talk .item").length > n', arg=n)

def test_an_output_of_a_megabyte_stays_quick(show):
    output = ''.join(f'line {i}: {"x"*60}\n' for i in range(14_000)) + 'y'*100_000 + ' the needle, at last'
    assert len(output) > 1e6
    page = show([dict(v=1, t=1., type='run', run='r', parent=None, query='?'), dict(v=1, t=2., type='cell', run='r', step=1, code='print(context)', output=output), dict(v=1, t=3., type='final', run='r', answer='needle')])
    assert page.seconds < 2*LOAD and page.locator('.place mark').inner_text() == 'needle' and len(page.inner_text('.place pre')) < 1500
    out, t0 = items(page, 'output'), time.perf_counter()
    unfold(out)
    assert out.locator('pre').inner_text().startswith('line 0:') and time.perf_counter()-t0 < LOAD
    size = lambda: out.locator('pre').evaluate('p => p.textContent.length')
    before = size()
    out.get_by_text('Show more').click()
    assert before < 20_000 < size() < 200_000 and f'of {len(output):,} characters' in out.inner_text()
    t0 = time.perf_counter()
    search(page, 'the needle, at last')
    unfold(items(page, 'output'))
    assert items(page, 'output').locator('pre mark').inner_text() == 'the needle, at last' and time.perf_counter()-t0 < 2*LOAD

def test_a_torn_trace(show, res, tmp_path):
    data = res.trace.save(tmp_path/'t.jsonl').read_bytes()
    (tmp_path/'torn.jsonl').write_bytes(data[:len(data)*2//3])
    page = show(save_html(tmp_path/'torn.jsonl', tmp_path/'torn.html'))
    assert 'not ended' in page.inner_text('.ended') and page.inner_text('.answer') == 'The run had not ended when this was written.'
    assert page.locator('#talk .turn').count() >= 3

def test_an_empty_trace(show):
    page = show(Trace())
    assert page.inner_text('.answer') == 'There is none in this trace.' and 'This trace has no events.' in page.inner_text('#talk') and page.title() == 'A run · rlm'
    for key in 'jke/': page.keyboard.press(key)

def test_events_and_fields_that_are_not_known_are_kept(show, res):
    page = show([*res.trace.events[:-1], dict(v=1, t=res.trace[-1]['t'], type='weather', run='root', depth=0, step=6, wind='from the north-east', sea=[1, 2]), res.trace[-1] | dict(mood='calm')])
    other = items(page, 'other')
    assert 'weather' in other.inner_text()
    unfold(other)
    assert '"wind": "from the north-east"' in other.locator('pre').inner_text()
    end = items(page, 'final').last
    unfold(end)
    end.get_by_text('As in the trace').click()
    assert '"mood": "calm"' in end.inner_text()
    search(page, 'north-east')
    assert page.inner_text('#count').startswith('1 of ')

def test_a_failed_run(show, tmp_path):
    m = ScriptedModel(repl_call('1+1'))
    with pytest.raises(RLMError) as e: RLM(m).completion('Q', 'text')
    page = show(save_html(e.value, tmp_path/'failed.html'))
    assert 'ScriptExhausted' in page.inner_text('.answer') and 'failed' in page.inner_text('.ended') and items(page, 'error').count() >= 1

def test_a_session_has_a_page_with_all_its_questions(show):
    m = ScriptedModel(repl_call('print(context)'), 'FINAL(one)', 'FINAL(two)')
    with RLM(m).session('one two') as s:
        s.completion('First?')
        s.completion('Second?')
    page = show(s.trace)
    assert (page.inner_text('.question'), page.inner_text('.answer')) == ('Second?', 'two')
    page.get_by_role('button', name='Question 1').click()
    assert (page.inner_text('.question'), page.inner_text('.answer')) == ('First?', 'one') and page.locator('.place mark').inner_text() == 'one'
    page.locator('.place button').click()
    assert page.locator('.item.flash pre').inner_text() == 'one two'
    assert page.locator('#talk .runhead').all_inner_texts()[1].startswith('Second?')

def test_a_run_taken_up_the_next_day_has_no_empty_timeline(show, res):
    half = len(res.trace)//2
    page = show([*res.trace.events[:half], *[e | dict(t=e['t']+90_000) for e in res.trace.events[half:]]])
    bars = page.locator('#timeline .bar-call').evaluate_all('bs => bs.map(b => +b.getAttribute("width")).sort((a, b) => b - a)')
    assert bars[0] > 8 and 'over 25 h' in page.locator('#timeline svg').get_attribute('aria-label')

# -- files

def test_what_a_page_can_be_made_of(res, tmp_path):
    path = res.trace.save(tmp_path/'run.jsonl')
    pages = [trace_html(o) for o in (res, res.trace, path, str(path), list(res.trace), read_trace(path))]
    assert len(set(pages)) == 1 and holes(pages[0])['events'] == res.trace.events
    made = res.trace.save_html(tmp_path/'deep'/'run.html')
    assert made == tmp_path/'deep'/'run.html' and made.read_text(encoding='utf-8') == pages[0] and [o.name for o in made.parent.iterdir()] == ['run.html']
    assert '<title>Tides &amp; &lt;b&gt;</title>' in save_html(path, str(made), title='Tides & <b>').read_text(encoding='utf-8')
    assert sum(b>127 for b in made.read_bytes()) and b'\r' not in made.read_bytes()

@pytest.mark.slow
def test_a_run_of_the_bundled_model(show):
    lines = list(LOG[:600])
    lines[333] = 'The secret number of the lighthouse is 48213.'
    page = show(RLM().completion('What is the secret number of the lighthouse?', '\n'.join(lines)))
    assert page.inner_text('.answer') == '48213' and page.locator('.place mark').first.inner_text() == '48213'
    page.locator('.place button').first.click()
    assert lines[333] in page.locator('.item.flash pre').inner_text()
    assert int(page.locator('#table tfoot td').nth(2).inner_text().replace(',', '')) > 200

# -- the pictures of the docs

@pytest.mark.skipif(not os.environ.get('RLM_PICTURES'), reason='RLM_PICTURES names the folder that pictures for the docs are written to')
def test_pictures(show, res):
    folder, kw = Path(os.environ['RLM_PICTURES']), dict(width=1180, device_scale_factor=1)
    show(res, height=1240, **kw).screenshot(path=folder/'page_light.png')
    page = show(res, height=1240, color_scheme='dark', **kw)
    for kind in ('code', 'output'): unfold(items(page, kind).nth(1))
    unfold(items(page, 'subs').first)
    page.locator('#tokens').evaluate('o => scrollTo(0, o.offsetTop - 70)')
    page.mouse.move(700, 180)
    page.screenshot(path=folder/'page_dark.png')
    assert all((folder/o).stat().st_size < 200_000 for o in ('page_light.png', 'page_dark.png'))
