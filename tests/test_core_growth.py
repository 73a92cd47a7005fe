"""Room for what runs to grow: how storms of preemptions are damped, and what is never reserved."""

from __future__ import annotations

import random

import pytest
from schedulers import scheduler
from sharing_requests import ask, serve, step

from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams


def storm(growth_blocks: int, caches: bool, seed: int) -> int:
    """Preemptions of 60 requests of random lengths whose answers outgrow a small pool."""
    rng = random.Random(seed)
    own = scheduler(
        40, growth_blocks=growth_blocks, watermark=0.0, budget=64, prefix_caching=caches
    )
    requests = [
        ask(
            str(number),
            rng.choices(range(1000), k=rng.randint(2, 20)),
            min(40, 1 + int(rng.expovariate(1 / 12))),
        )
        for number in range(60)
    ]
    serve(own, *requests)
    assert all(len(each.output_token_ids) == each.max_tokens for each in requests)
    assert own.preemptions["memory"] == sum(each.num_preemptions for each in requests)
    return own.preemptions["memory"]


@pytest.mark.parametrize("caches", [False, True])
def test_storms_of_preemptions_are_damped(caches: bool) -> None:
    stormy, damped = (sum(storm(growth, caches, seed) for seed in range(3)) for growth in (0, 1))
    assert stormy > 50
    assert damped < stormy / 4


@pytest.mark.parametrize(("growth_blocks", "num_preemptions"), [(0, 2), (1, 1)])
def test_the_room_to_grow_is_left_until_nobody_waits(
    growth_blocks: int, num_preemptions: int
) -> None:
    """The last of three gives way; when the second ends, four of five free blocks would do."""
    own = scheduler(10, watermark=0.0, budget=64, growth_blocks=growth_blocks)
    last = ask("last", range(12), 20)
    serve(own, ask("first", range(12), 20), ask("second", range(12), 6), last)
    assert last.num_preemptions == num_preemptions
    own.add(ask("long", range(32)))
    own.add(ask("beside", range(8)))
    assert len(step(own)) == 2  # all ten blocks: nothing is spared any more


def test_many_tokens_that_may_come_reserve_nothing() -> None:
    """64 tokens of memory, four requests that may have 50 each: all run at once."""
    own = scheduler(num_blocks=16, budget=64)
    requests = [
        Request(
            f"{i}",
            range(8),
            SamplingParams(max_tokens=50),
            max_tokens=50,
            end_token_ids=frozenset({0}),
        )
        for i in range(4)
    ]
    for each in requests:
        own.add(each)
    step(own)
    assert len(own.running) == 4
    assert own.pool.num_free == 16 - 4 * 2
    for _ in range(3):
        step(own)
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [0] * 4)  # they end long before
    assert not own.has_requests
    assert not own.preemptions
