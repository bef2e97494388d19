"One ledger for a whole tree: what is spent never passes the limits by more than the calls in flight came back larger than they had said"
import random, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from hypothesis import given, settings, strategies as st
from rlm.usage import Budget, BudgetExceeded, Ledger, RLMError, TreeUsage, Usage

KINDS = 'calls', 'tokens', 'cost'
# Dollars in 64ths add up exactly, so the bounds below need no tolerance
dollars = st.integers(0, 640).map(lambda n: n/64)
budgets = st.builds(Budget, tokens=st.none()|st.integers(0, 5000), cost=st.none()|dollars, calls=st.none()|st.integers(0, 20))
sizes = st.tuples(st.integers(0, 1000), dollars)
steps = st.lists(st.one_of(
    st.tuples(st.just('reserve'), sizes),
    st.tuples(st.just('close'), sizes),
    st.tuples(st.just('hold'), sizes),
    st.tuples(st.just('settle'), st.integers(0, 99), st.none()|sizes)), max_size=60)

def spent(ledger):
    u = ledger.usage
    return dict(calls=u.sent, tokens=u.total_tokens, cost=u.cost)

def promised(r): return dict(calls=1, tokens=r.tokens, cost=r.cost)
def usage(tokens, cost): return Usage(1, tokens - tokens//3, tokens//3, cost=cost)

class Model:
    "The ledger, driven step by step, and what must be true of it after each"
    def __init__(self, budget):
        self.ledger, self.budget, self.open = Ledger(budget), budget, []
        self.admitted, self.over = set(), {} # in flight when the last call was let out; by how much a call came back larger

    def reserve(self, size, closing=False):
        try: r = self.ledger.reserve(*size, closing=closing)
        except BudgetExceeded as e:
            assert e.limit in KINDS and getattr(self.budget, e.limit) is not None
            return
        if closing: self.admitted |= {*self.open, r}
        else: self.admitted = {*self.open, r}
        self.open.append(r)

    def settle(self, i, used):
        if not self.open: return
        r = self.open.pop(i % len(self.open))
        self.ledger.settle(r, usage(*used) if used else None, 'm', i % 3)
        before = spent(self.ledger)
        self.ledger.settle(r, usage(999, 99.), 'm')
        assert spent(self.ledger) == before
        tokens, cost = used or (0, 0)
        self.over[r] = dict(calls=0, tokens=max(0, tokens-r.tokens), cost=max(0, cost-r.cost))

    def step(self, what, *args):
        if what=='reserve': self.reserve(*args)
        elif what=='close': self.reserve(*args, closing=True)
        elif what=='hold': self.ledger.hold(*args[0])
        else: self.settle(*args)
        self.check()

    def check(self):
        now, left = spent(self.ledger), self.ledger.left()
        for k in KINDS:
            limit = getattr(self.budget, k)
            assert self.ledger._open[k] == sum(promised(r)[k] for r in self.open)
            if limit is None: continue
            assert now[k] <= limit + sum(self.over[r][k] for r in self.admitted if r in self.over)
            assert 0 <= left[k] <= max(0, limit - now[k])

@settings(max_examples=200, deadline=None)
@given(budgets, steps)
def test_spent_stays_within_the_limit_and_the_calls_in_flight(budget, steps):
    m = Model(budget)
    for s in steps: m.step(*s)
    while m.open: m.step('settle', 0, (10, .5))
    assert set(m.ledger._open.values()) == {0}

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 800), st.lists(st.tuples(sizes, sizes), max_size=30))
def test_what_is_held_fits_whatever_came_back(limit, held, calls):
    "If the hold found room once, the closing turn goes out, however far the other calls went over"
    ledger = Ledger(Budget(tokens=limit, calls=len(calls)+1))
    ledger.hold(held)
    for (tokens, cost), used in calls:
        try: r = ledger.reserve(tokens, cost)
        except BudgetExceeded: continue
        ledger.settle(r, usage(*used))
    ledger.reserve(min(held, limit), closing=True)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 3), st.none()|sizes), max_size=30))
def test_the_parts_add_up(calls):
    ledger, again = Ledger(), Ledger()
    for model, depth, used in calls:
        u = usage(*used) if used else None
        ledger.settle(ledger.reserve(5), u, model, depth)
        again.replay(u, model, depth)
    tree = ledger.usage
    assert tree == again.usage and tree.sent == len(calls) and ledger.failed == tree.failed
    for parts in tree.by_model, tree.by_depth:
        total = sum(parts.values(), Usage())
        assert (total.calls, total.total_tokens, total.cost) == (tree.calls, tree.total_tokens, tree.cost)
    assert tree - tree.copy() + tree == tree

def run_tree(ledger, rng, depth, seen, fan=4, levels=3):
    "A run with its sub-calls in threads, and child runs below it, as an RLM opens them"
    def call(seed):
        r = random.Random(seed)
        try: held = ledger.reserve(want := r.randrange(100), want/64)
        except BudgetExceeded: return seen['refused'].append(1)
        over = r.randrange(-want, 20) if want else 0
        with seen['lock']:
            seen['now'] += 1
            seen['most'] = max(seen['most'], seen['now'])
        time.sleep(r.random()/2000)
        with seen['lock']: seen['now'] -= 1
        ledger.settle(held, None if r.random()<.1 else Usage(1, want+over, 0, cost=(want+over)/64), 'm', depth)
    def child(seed): run_tree(ledger, random.Random(seed), depth+1, seen, fan, levels)
    seeds = [rng.random() for _ in range(fan*2)]
    with ThreadPoolExecutor(fan*2) as pool:
        jobs = [pool.submit(call, s) for s in seeds]
        if depth<levels: jobs += [pool.submit(child, s) for s in seeds[:2]]
        for j in jobs: j.result()

@pytest.mark.parametrize('seed', range(6))
def test_trees_of_threads(seed):
    rng = random.Random(seed)
    budget = Budget(tokens=rng.randrange(500, 4000), cost=rng.randrange(500, 4000)/64, calls=rng.randrange(10, 100))
    ledger, seen = Ledger(budget), dict(lock=threading.Lock(), now=0, most=0, refused=[])
    ledger.hold(100, 100/64)
    run_tree(ledger, rng, 0, seen)
    now = spent(ledger)
    assert seen['refused'] and seen['most'] > 1
    assert now['calls'] <= budget.calls - 1
    assert now['tokens'] <= budget.tokens - 100 + 20*seen['most']
    assert now['cost'] <= budget.cost - 100/64 + 20/64*seen['most']
    assert set(ledger._open.values()) == {0}
    ledger.settle(ledger.reserve(100, 100/64, closing=True), Usage(1, 100, 0), 'm')
    assert ledger.usage.sent <= budget.calls

def test_many_threads_share_the_last_call():
    for _ in range(50):
        ledger, start, got = Ledger(Budget(calls=1)), threading.Barrier(8), []
        def ask():
            start.wait()
            try: got.append(ledger.reserve(1))
            except BudgetExceeded as e: assert e.limit=='calls'
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(got)==1

def test_cancel_is_seen_by_every_thread():
    ledger, ended, end = Ledger(), [], time.monotonic() + 10
    def spend():
        while time.monotonic() < end:
            try: ledger.settle(ledger.reserve(1), Usage(1, 1, 0))
            except BudgetExceeded as e: return ended.append(e.limit)
    threads = [threading.Thread(target=spend) for _ in range(4)]
    for t in threads: t.start()
    ledger.cancel()
    for t in threads: t.join()
    assert ended == ['cancelled']*4
    n = ledger.usage.sent
    with pytest.raises(BudgetExceeded): ledger.reserve(0, closing=True)
    assert ledger.usage.sent == n

def test_a_snapshot_does_not_move():
    ledger = Ledger()
    ledger.settle(ledger.reserve(1), Usage(1, 5, 5), 'm', 0)
    before = ledger.usage
    ledger.settle(ledger.reserve(1), u := Usage(1, 5, 5), 'm', 0)
    u.calls = 99
    assert before == TreeUsage(1, 5, 5, by_model=dict(m=Usage(1, 5, 5)), by_depth={0: Usage(1, 5, 5)})
    assert ledger.usage.by_model['m'].calls == 2

def test_the_error_is_one_of_the_package_and_names_the_fix():
    ledger = Ledger(Budget(tokens=10))
    with pytest.raises(RLMError, match=r'0 of 10 tokens spent.*asks for 11.*Allow more with Budget\(tokens=\.\.\.\)') as e: ledger.reserve(11)
    assert (e.value.limit, e.value.in_flight, e.value.trace) == ('tokens', False, None)

def test_a_tree_usage_adds_up_from_many_threads():
    total, one = TreeUsage(), TreeUsage(1, 5, 5, by_model=dict(m=Usage(1, 5, 5)), by_depth={1: Usage(1, 5, 5)})
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool: list(pool.map(lambda _: total.add(one), range(400)))
    finally: sys.setswitchinterval(before)
    assert total.calls == total.by_model['m'].calls == total.by_depth[1].calls == 400
