"""Random schedules with a swap space, on a stand-in for a model that keeps what its slots hold.

Content that is copied too late, to the wrong place, or found for others than those who may share
it shows as a wrong answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from exact_model import ExactModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schedules import RestlessBudget, Run, Setup, fits, run_through, setups

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.load import Load
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.swap import SwapCosts, SwapSpace


@dataclass
class SwapModel(ExactModel):
    """Remembers what the slots of the swap space hold, too."""

    held: dict[int, list[tuple[int, int, object]]] = field(default_factory=dict)
    whose: dict[int, str] = field(default_factory=dict)

    def run(self, batch: Batch) -> list[int]:
        size = self.pool.block_size
        for block, slot, _ in batch.copies.outs:
            self.held[slot] = [self.slots[block * size + place] for place in range(size)]
            self.whose[slot] = self.users[block]
        self.copy_within(batch)
        for slot, block in batch.copies.ins:
            assert self.pool.num_holders(block) == 1
            assert self.pool.key_of(block) is None
            for place, what in enumerate(self.held[slot]):
                self.slots[block * size + place] = what
            self.users[block] = self.whose[slot]
        return self.run_chunks(batch)


class WatchedBudget(RestlessBudget):
    """Remembers what it was told of copies."""

    copy_s = 0.0

    def tokens(self, load: Load) -> int:
        self.copy_s = load.copy_s
        return super().tokens(load)


class SwapRun(Run):
    """Random schedules with a swap space."""

    def __init__(self, setup: Setup, num_slots: int, most_copies: int | None, share: float) -> None:
        super().__init__(setup)
        self.most_copies = most_copies
        self.num_ins = 0
        self.watched = WatchedBudget(setup.budget, setup.tile, self.random)
        self.budget = self.watched
        draw = random.Random(setup.seed)

        def recompute_s(num_tokens: int) -> float:
            return float("inf") if draw.random() < share else 0.0

        own = SwapCosts(recompute_s, 1.0, 0.5, most_copies)
        swap = SwapSpace(num_slots, setup.block_size, own)
        pool = BlockPool(setup.num_blocks, setup.block_size)
        self.scheduler = Scheduler(self.scheduler.config, pool, self.watched, swap=swap)
        self.model: SwapModel = SwapModel(pool, self.circle)

    def disturb(self) -> None:
        super().disturb()
        if not self.model.slots:  # they were lost
            self.model.held.clear()

    def check_batch(self, batch: Batch, waited: list[Request]) -> None:
        super().check_batch(batch, waited)
        copies = batch.copies
        self.num_ins += len(copies.ins)
        assert copies.seconds == len(copies.outs) + 0.5 * len(copies.ins)
        if self.most_copies is not None:
            assert len(copies.outs) + len(copies.ins) <= self.most_copies
        if POLICIES[self.setup.policy].keeps_budget:
            assert copies.seconds <= self.watched.copy_s
        entered = [block for _, block in copies.ins]
        tables = [c.request.block_table for c in batch.chunks if c.request in waited]
        assert sum(any(block in table for block in entered) for table in tables) <= 1

    def check_end(self) -> None:
        super().check_end()
        assert self.scheduler.swap is not None
        assert self.scheduler.swap.num_used == 0


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    setup=setups,
    arrivals=st.integers(1, 14),
    num_slots=st.integers(1, 40),
    most_copies=st.sampled_from([None, None, 0, 1, 2, 5]),
    share=st.sampled_from([0.5, 1.0]),
)
def test_invariants_hold_over_random_schedules(
    setup: Setup, arrivals: int, num_slots: int, most_copies: int | None, share: float
) -> None:
    if fits(setup):
        run_through(SwapRun(setup, num_slots, most_copies, share), arrivals)


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_random_schedules_do_swap(caches: bool, depth: int) -> None:
    """That the test above is of something."""
    setup = Setup(
        *("sarathi", 40, 1, 12, 4, 8, depth, depth, True, 0.0, "fcfs", False, True),
        prefix_caching=caches,
        growth_blocks=0,
        copies_blocks=True,
        seed=0,
    )
    num_ins = 0
    for seed in range(30):
        run = SwapRun(replace(setup, seed=seed), 40, None, 1.0)
        run_through(run, 12)
        num_ins += run.num_ins
    assert num_ins > 60
