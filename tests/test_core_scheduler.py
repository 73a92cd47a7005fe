"""The scheduler's invariants, over random schedules.

The stand-in for a model is exact: it keeps what each KV slot holds, checks that a chunk finds its
whole context there, and samples a token that depends on every token before it. So a block table
that is wrong, a block shared too early or a token run twice shows as a wrong answer. It also keeps
for whom a slot was computed: nobody reads what was computed for others than those he shares with.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedulers import request, run_to_end, scheduler

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import Squeezed, StaticBudget
from stallfree.core.load import Load
from stallfree.core.policies import POLICIES, Candidate, Policy, Proposal, View
from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import PolicyError, Scheduler, SchedulerConfig
from stallfree.core.targets import RANKS, Targets
from stallfree.core.waiting import PREFILL_ORDERS
from stallfree.errors import ConfigError, ContextLengthError, InvalidRequestError

VOCABULARY = 50
END_TOKEN = 0
MAX_MODEL_LEN = 48


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def answer(prompt: Sequence[int], max_tokens: int, min_tokens: int = 0) -> list[int]:
    """What a request must answer, however it is scheduled."""
    tokens = list(prompt)
    for count in range(1, max_tokens + 1):
        tokens.append(next_token(tokens))
        if tokens[-1] == END_TOKEN and count >= min_tokens:
            break
    return tokens[len(prompt) :]


@dataclass
class ExactModel:
    """Remembers the token and the position that each slot holds, and for whom.

    `circle` says with whom a request may share.
    """

    pool: BlockPool
    circle: Callable[[Request], object]
    slots: dict[int, tuple[int, int, object]] = field(default_factory=dict)

    def run(self, batch: Batch) -> list[int]:
        for chunk in batch.chunks:
            request, circle = chunk.request, self.circle(chunk.request)
            tokens = list(request.tokens(0, chunk.stop))
            for position in range(chunk.start, chunk.stop):
                block = request.block_table[position // self.pool.block_size]
                assert self.pool.num_holders(block) == 1, "others read what is written"
                assert self.pool.key_of(block) is None, "what can be found is written"
                self.slots[self._slot(request, position)] = (tokens[position], position, circle)
            if request.pending_finish is not None:
                continue  # nothing of it is used; a batch before this one may have failed
            for position, token in enumerate(tokens):
                assert self.slots[self._slot(request, position)] == (token, position, circle)
        return [next_token(chunk.request.tokens(0, chunk.stop)) for chunk in batch.sampling]

    def _slot(self, request: Request, position: int) -> int:
        block_size = self.pool.block_size
        return request.block_table[position // block_size] * block_size + position % block_size


class RestlessBudget:
    """A budget that changes in every iteration, below zero too."""

    def __init__(self, max_tokens: int, tile_tokens: int, rng: random.Random) -> None:
        self.tile_tokens = tile_tokens
        self.squeezed = Squeezed()
        self.last = self.last_flex = 0
        self._max_tokens = max_tokens
        self._random = rng

    def tokens(self, load: Load) -> int:
        self.last_flex = 0
        self.last = self._random.choice([self._max_tokens, self._random.randint(-5, 40), 0])
        return self.last

    def flex(self, load: Load) -> tuple[int, int]:
        count = self._random.randint(0 if load.decodes else 1, 4)
        self.last_flex = max(self.last, len(load.decodes) + count)
        return count, self.last_flex

    def admissions(self, load: Load, sizes: Sequence[int]) -> int | None:
        return self._random.choice([None, 0, 1]) if load.decodes or load.prefills else None

    def pace(self, load: Load) -> None:
        pass

    def predict(self, batch: Batch) -> None:
        pass

    def observe(self, batch: Batch, seconds: float) -> None:
        pass


@dataclass(frozen=True)
class Setup:
    policy: str
    budget: int
    tile: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    depth: int  # batches in flight at once
    num_stages: int  # what the scheduler is told of that
    sequence_pipelining: bool
    watermark: float
    prefill_order: str
    is_fair: bool
    has_tiers: bool
    prefix_caching: bool
    growth_blocks: int
    seed: int


setups = st.builds(
    Setup,
    policy=st.sampled_from(sorted(POLICIES)),
    budget=st.integers(1, 40),
    tile=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(12, 60),
    block_size=st.sampled_from([4, 5, 8]),
    max_num_seqs=st.integers(1, 12),
    depth=st.integers(1, 4),
    num_stages=st.integers(1, 4),
    sequence_pipelining=st.booleans(),
    watermark=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    prefill_order=st.sampled_from(sorted(PREFILL_ORDERS)),
    is_fair=st.booleans(),
    has_tiers=st.booleans(),
    prefix_caching=st.booleans(),
    growth_blocks=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)


class Run:
    """A scheduler under random arrivals, aborts and failures, checked at every step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.random = random.Random(setup.seed)
        pool = BlockPool(setup.num_blocks, setup.block_size)
        config = SchedulerConfig(
            setup.policy,
            setup.max_num_seqs,
            MAX_MODEL_LEN,
            watermark=setup.watermark,
            num_stages=setup.num_stages,
            sequence_pipelining=setup.sequence_pipelining,
            prefill_order=setup.prefill_order,
            is_fair=setup.is_fair,
            prefix_caching=setup.prefix_caching,
            growth_blocks=setup.growth_blocks,
        )
        self.budget = RestlessBudget(setup.budget, setup.tile, self.random)
        self.scheduler = Scheduler(config, pool, self.budget)
        self.model = ExactModel(pool, self.circle)
        self.beginnings = [self.tokens(self.random.randint(8, 28)) for _ in range(3)]
        self.in_flight: list[Batch] = []
        self.requests: list[Request] = []
        self.failed: set[str] = set()
        self.has_lost = False
        self.passed_over: dict[str, int] = {}  # batches without a decode that was ready

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(count)]

    def circle(self, request: Request) -> object:
        """What is the same for those who share with `request`."""
        if POLICIES[self.setup.policy].reserves_context:
            return request.request_id
        if self.setup.prefix_caching:
            return request.cache_salt
        return request.group or request.request_id

    def prompt(self) -> list[int]:
        """Random; or it begins as others do, perhaps like an answer that goes on."""
        random = self.random
        if random.random() < 0.4:
            return self.tokens(random.randint(1, 30))
        old = [[*each.prompt_token_ids, *each.output_token_ids] for each in self.requests[-5:]]
        beginning = random.choice([*self.beginnings, *old])
        length = random.randint(1, len(beginning))
        return (beginning[:length] + self.tokens(random.randint(0, 8)))[:30] or [1]

    def arrive(self) -> None:
        random = self.random
        max_tokens = random.randint(1, 12)
        prompt = self.prompt()
        cache_salt = random.choice([None, None, "a", "b"])
        scored = random.choice([None, None, None, 0])
        size = random.choice([1, 1, 1, 3])
        targets = Targets(
            random.choice(sorted(RANKS)) if self.setup.has_tiers else "default",
            ttft_s=random.choice([None, 1.0, 5.0]),
            user=random.choice(["", "a", "b"]),
        )
        for index in range(size):
            name = f"{len(self.requests)}"
            request = Request(
                name,
                prompt,
                SamplingParams(
                    max_tokens=max_tokens,
                    min_tokens=random.randint(0, max_tokens),
                    prompt_logprobs=scored if index == 0 else None,
                ),
                max_tokens=max_tokens,
                end_token_ids=frozenset({END_TOKEN}),
                arrived_at=float(len(self.requests)),
                group=f"group {len(self.requests) - index}" if size > 1 else None,
                cache_salt=cache_salt,
                targets=targets,
            )
            if request.max_kv_tokens <= self.scheduler.pool.num_tokens:
                self.scheduler.add(request)
                self.requests.append(request)

    def disturb(self) -> None:
        """Abort a request, fail the oldest batch, or lose all that is in flight, now and then."""
        alive = [request for request in self.requests if not request.is_finished]
        if alive and self.random.random() < 0.08:
            self.scheduler.finish(self.random.choice(alive), FinishReason.ABORT)
        if self.in_flight and self.random.random() < 0.04:
            batch = self.in_flight.pop(0)
            left = [chunk.request for chunk in batch.chunks if not chunk.request.pending_finish]
            self.failed |= {request.request_id for request in left}
            self.scheduler.fail(batch)
        if self.random.random() < 0.02:
            self.scheduler.recompute(self.in_flight)
            self.model.slots.clear()
            self.in_flight, self.has_lost = [], True

    def step(self) -> None:
        if len(self.in_flight) < self.setup.depth:
            waited = list(self.scheduler.waiting)
            batch = self.scheduler.schedule()
            if batch is not None:
                self.check_batch(batch, waited)
                self.in_flight.append(batch)
            else:
                assert self.in_flight or not self.scheduler.has_requests, "live-lock"
        if self.in_flight and (
            len(self.in_flight) == self.setup.depth or self.random.random() < 0.5
        ):
            batch = self.in_flight.pop(0)
            self.scheduler.complete(batch, self.model.run(batch))
        self.scheduler.check_integrity()

    def check_batch(self, batch: Batch, waited: list[Request]) -> None:
        busy = [chunk.request for other in self.in_flight for chunk in other.chunks]
        for chunk in batch.chunks:
            if chunk.request in busy:
                assert self.setup.sequence_pipelining
                last = [c for other in self.in_flight for c in other.chunks][::-1]
                before = next(each for each in last if each.request is chunk.request)
                assert (before.stop, before.samples) == (chunk.start, False)
            elif chunk.request in waited and chunk.request.params.prompt_logprobs is not None:
                assert chunk.start == 0
        self.check_nobody_waits_for_ever(batch, busy)
        assert all(chunk.request.state is RequestState.RUNNING for chunk in batch.chunks)
        assert len(self.scheduler.running) <= self.setup.max_num_seqs
        policy = POLICIES[self.setup.policy]
        if policy.keeps_budget:
            limit = max(self.budget.last, self.budget.last_flex, batch.num_decodes)
            decodes = [c.request for c in batch.chunks if c.is_decode and c.request not in waited]
            held_up = [request for request in decodes if not request.is_flex]
            has_flex = any(chunk.request.is_flex for chunk in batch.chunks)
            if not held_up and (self.budget.last <= 0 or has_flex):
                limit = max(self.setup.tile, limit)  # nobody is held up
            assert batch.num_tokens <= limit
        if policy.reserves_context and not self.has_lost:
            assert all(request.num_preemptions == 0 for request in self.requests)
        is_whole = self.setup.depth == self.setup.num_stages == 1
        if self.setup.policy in ("sarathi", "hybrid_only", "orca") and is_whole:
            own = [chunk.request for chunk in batch.chunks]
            left_out = [r for r in self.scheduler.running if r.is_decode and r not in own]
            assert all(request.is_flex for request in left_out)

    def check_nobody_waits_for_ever(self, batch: Batch, busy: list[Request]) -> None:
        """Of decodes, where a policy runs all that it is shown."""
        if self.setup.policy in ("vllm", "simple_chunking"):
            return
        own = [chunk.request for chunk in batch.chunks]
        left_out = [
            each.request_id
            for each in self.scheduler.running
            if each.is_decode and not each.is_flex and each not in busy and each not in own
        ]
        self.passed_over = {name: self.passed_over.get(name, 0) + 1 for name in left_out}
        # as many batches as stages, and a few if those ahead end, which makes the share smaller
        most = 2 * self.setup.num_stages if self.setup.num_stages > 1 else 0
        assert max(self.passed_over.values(), default=0) <= most

    def check_end(self) -> None:
        assert self.scheduler.pool.num_free == self.setup.num_blocks
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        for each in self.requests:
            expected = answer(each.prompt_token_ids, each.max_tokens, each.params.min_tokens)
            if each.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert each.output_token_ids == expected[: each.num_output_tokens]
            else:
                assert each.output_token_ids == expected
            assert (each.finish_reason is FinishReason.ERROR) == (each.request_id in self.failed)


@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=setups, arrivals=st.integers(1, 14))
def test_invariants_hold_over_random_schedules(setup: Setup, arrivals: int) -> None:
    if fits(setup):
        run_through(Run(setup), arrivals)


def run_through(run: Run, arrivals: int) -> None:
    """A whole run: requests arrive at random, and all of them end."""
    for _ in range(arrivals):
        run.arrive()
        for _ in range(run.random.randint(0, 6)):
            run.disturb()
            run.step()
    for _ in range(20_000):
        if not run.scheduler.has_requests:
            break
        run.step()
    run.check_end()


def fits(setup: Setup) -> bool:
    """Whether the pool holds what the policy reserves; if not, it is refused at the start."""
    tokens = setup.num_blocks * setup.block_size
    if POLICIES[setup.policy].reserves_context and tokens < MAX_MODEL_LEN:
        with pytest.raises(ConfigError, match="full context"):
            Run(setup)
        return False
    return True


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    own = scheduler(num_blocks=4)
    first, second, third = request("first", 7), request("second", 7), request("third", 4)
    for each in (first, second, third):
        own.add(each)
    batches = run_to_end(own)
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert [len(each.output_token_ids) for each in (first, second, third)] == [8, 8, 8]
    order = [chunk.request.request_id for batch in batches for chunk in batch.chunks]
    assert order.index("third") > max(i for i, name in enumerate(order) if name == "first")


def test_completions_of_one_prompt_share_its_blocks() -> None:
    own = scheduler(num_blocks=40)
    group = [
        Request(f"{i}", range(18), SamplingParams(max_tokens=4), max_tokens=4, group="g")
        for i in range(3)
    ]
    for each in group:
        own.add(each)
    batches = run_to_end(own)
    prefilled = [c.num_tokens for batch in batches for c in batch.chunks if not c.is_decode]
    assert sum(prefilled) == 18 + 2 + 2  # the whole prompt once, then the part-filled block


def test_a_request_that_can_never_fit_is_refused() -> None:
    own = scheduler(num_blocks=4, block_size=4)
    own.add(request("fits", num_prompt=9, max_tokens=8))
    with pytest.raises(ContextLengthError, match="KV cache of 16 tokens"):
        own.add(request("too long", num_prompt=10, max_tokens=8))
    with pytest.raises(ContextLengthError, match="context of 64 tokens"):
        own.add(request("past the context", num_prompt=60, max_tokens=8))
    with pytest.raises(InvalidRequestError, match="empty"):
        own.add(request("empty", num_prompt=0))
    with pytest.raises(InvalidRequestError, match="in use"):
        own.add(request("fits"))
    run_to_end(own)


def test_abort_frees_everything_at_any_moment() -> None:
    own = scheduler()
    waiting, running, flying = request("waiting", 25), request("running"), request("flying")
    own.add(running)
    first = own.schedule()
    assert first is not None
    own.complete(first, [1])
    own.finish(running, FinishReason.ABORT)
    assert own.pool.num_free == 8
    own.add(flying)
    batch = own.schedule()
    assert batch is not None
    own.add(waiting)
    own.finish(waiting, FinishReason.ABORT)
    own.finish(flying, FinishReason.ABORT)
    assert own.pool.num_free == 7  # the iteration under way still writes there
    own.complete(batch, [1])
    assert own.pool.num_free == 8
    assert not own.has_requests
    assert flying.finish_reason is FinishReason.ABORT
    own.finish(flying, FinishReason.STOP)
    assert flying.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize(
    "propose",
    [
        lambda view: [Proposal(r, 99) for r in view.decodes],
        lambda view: [Proposal(r, 0) for r in view.decodes],
        lambda view: [Proposal(r, 1) for r in (*view.decodes, *view.decodes)],
        lambda view: [Proposal(c.request, 17) for c in view.prefills if c.is_waiting],
    ],
)
def test_a_policy_that_breaks_the_rules_changes_nothing(
    propose: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = scheduler()
    own.add(request("running"))
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1])
    own.add(request("waiting", 20))
    own.policy = Policy(propose, keeps_budget=True)  # type: ignore[arg-type]
    with pytest.raises(PolicyError):
        own.schedule()
    own.check_integrity()
    assert not any(each.in_flight for each in own.running)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'fifo'"):
        SchedulerConfig("fifo")
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="max_model_len is 1"):
        SchedulerConfig(max_model_len=1)


def test_a_policy_changes_nothing() -> None:
    """Every policy leaves what it sees as it was, and repeats its answer."""
    own = scheduler(num_blocks=40)
    for index in range(3):
        own.add(request(f"{index}", 10))
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1] * len(batch.sampling))
    own.add(request("waiting", 10))
    before = [repr(each) for each in (*own.running, *own.waiting)]
    for policy in POLICIES.values():
        state = View(
            decodes=list(own.running),
            flex_decodes=[],
            under_way=[],
            prefills=[Candidate(next(iter(own.waiting)), 10, 3, is_waiting=True)],
            flex_prefills=[],
            num_running=len(own.running),
            free_blocks=5,
            watermark_blocks=0,
            growth_blocks=0,
            max_num_seqs=8,
            max_admissions=None,
            token_limit=16,
            flex_limit=16,
            tile_tokens=1,
            decodes_ran_last=False,
        )
        assert policy.propose(state) == policy.propose(state) != []
    assert [repr(each) for each in (*own.running, *own.waiting)] == before


def test_policies_that_reserve_use_every_block() -> None:
    for policy in ("orca", "faster_transformer"):
        own = Scheduler(SchedulerConfig(policy, 4, 64), BlockPool(400, 4), StaticBudget(1))
        assert own.config.watermark * 400 == 4
        pool = own.pool.allocate(400 - 4 * 16)  # leaves four contexts of 64 tokens
        for index in range(4):
            own.add(request(f"{index}", 10))
        batch = own.schedule()
        assert batch is not None
        assert len(batch.chunks) == 4
        own.pool.release(pool)
