"""Random schedules: requests arrive, end, fail and are lost at random, checked at every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from exact_model import END_TOKEN, VOCABULARY, ExactModel, answer
from hypothesis import strategies as st

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import Squeezed
from stallfree.core.load import Load
from stallfree.core.policies import POLICIES
from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.targets import RANKS, Targets
from stallfree.core.token_costs import TokenCosts
from stallfree.core.waiting import PREFILL_ORDERS
from stallfree.errors import ConfigError

MAX_MODEL_LEN = 48


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

    def costs(self, load: Load, num_tokens: int) -> TokenCosts:
        row, attended = self._random.choice([(0.0, 0.0), (0.4, 0.01), (3.0, 0.0), (50.0, 2.0)])
        return TokenCosts(row, self._random.randint(0, 20), attended)

    def scheduled(self, load: Load, batch: Batch) -> None:
        pass

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
    copies_blocks: bool
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
    copies_blocks=st.booleans(),
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
            copies_blocks=setup.copies_blocks,
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
