"""The SLO-driven budget on a device whose step times are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_device import MODEL, TILE, Device
from test_step_time import device_seconds

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget
from stallfree.core.load import Load
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import BatchShape, StepTimeModel, StepTimePredictor


def make_device(slo_s: float, model: StepTimeModel = MODEL, places: int = 64) -> Device:
    budget = SloBudget(slo_s, StepTimePredictor(model), tile_tokens=TILE)
    pool = BlockPool(20_000, 16)
    config = SchedulerConfig("sarathi", places, 16_000, prefix_caching=True)
    return Device(Scheduler(config, pool, budget))


def over_target(device: Device, slo_s: float) -> list[Batch]:
    """Batches over the target although they held a decode, and more than a tile of prompts."""
    return [
        batch
        for batch, seconds in device.steps
        if batch.num_decodes
        and seconds > slo_s
        and batch.num_tokens - batch.num_decodes >= 2 * TILE
    ]


@settings(max_examples=30, deadline=None)
@given(
    slo_s=st.sampled_from([0.05, 0.1, 0.2, 0.5]),
    prompts=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 40)), min_size=1, max_size=15),
    seed=st.integers(0, 1000),
)
def test_deadlines_that_can_be_kept_are_kept(
    slo_s: float, prompts: list[tuple[int, int]], seed: int
) -> None:
    """Within 5 %, the error of the fitted model, and every request ends."""
    rng = random.Random(seed)
    device = make_device(slo_s)
    requests = []
    for index, (prompt, output) in enumerate(prompts):
        requests.append(device.add(str(index), prompt, output))
        for _ in range(rng.randrange(10)):
            if device.scheduler.has_requests:
                device.step()
    device.run()
    assert all(request.num_output_tokens == request.max_tokens for request in requests)
    assert not over_target(device, slo_s * 1.05)


def test_the_chunk_uses_what_the_target_leaves() -> None:
    device = make_device(0.2)
    for index in range(8):
        device.add(f"short{index}", 20, 100)
    device.step()
    device.add("long", 3000, 10)
    for _ in range(10):
        device.step()
    for batch, seconds in device.steps[1:]:
        if batch.num_tokens > batch.num_decodes:
            assert 0.15 < seconds <= 0.2
            assert batch.num_tokens % TILE == 0


@pytest.mark.parametrize("kind", ["scored", "tiny", "found"])
def test_what_newcomers_cost_beyond_their_tokens_is_within_the_target(kind: str) -> None:
    """Of those that join in the iteration itself: the limit on tokens knows nothing of them."""
    slo_s = 0.191  # of which 88 tokens leave next to nothing
    device = make_device(slo_s, places=128)
    kept = device.add("kept", 14_000, 1)  # what the beginnings of prompts are found in
    device.run()
    for index in range(8):
        device.add(f"short{index}", 20 + index, 100)
    device.step()
    num_steps = len(device.steps)
    newcomers = []
    for index in range(100):
        match kind:
            case "scored":
                newcomers.append(device.add(f"{kind}{index}", 100, 2, is_scored=True))
            case "tiny":
                newcomers.append(device.add(f"{kind}{index}", 3, 2))
            case _:
                newcomers.append(device.add(f"{kind}{index}", 14_100, 2))
    while any(not each.is_finished for each in newcomers):
        device.step()
    assert (newcomers[0].num_cached_tokens >= kept.num_prompt_tokens - 16) == (kind == "found")
    beside = [seconds for batch, seconds in device.steps[num_steps:] if batch.num_decodes]
    assert 0.16 < max(beside) <= slo_s


def test_longer_contexts_make_shorter_chunks() -> None:
    sizes = []
    for context in (100, 12_000):
        device = make_device(0.2)
        for index in range(8):
            device.add(f"first{index}", context, 400)
        while not all(r.is_decode for r in device.scheduler.running) or device.scheduler.waiting:
            device.step()
        device.add("long", 3000, 10)
        device.step()
        batch, seconds = device.steps[-1]
        assert seconds <= 0.2
        sizes.append(batch.num_tokens)
    assert sizes[1] < sizes[0] - TILE


def test_without_answers_to_hold_up_prompts_run_in_long_chunks() -> None:
    device = make_device(0.05)
    device.add("long", 3000, 2)
    device.step()
    assert device.steps[0][0].num_tokens > 200


def test_decodes_over_the_target_close_admission_but_starve_no_prompt() -> None:
    slo_s = 0.05
    device = make_device(slo_s)
    long = device.add("long", 2000, 5)
    device.step()
    for index in range(40):
        device.add(f"short{index}", 4, 60)
    for _ in range(30):
        device.step()
    decoding = len(device.scheduler.running)
    alone = BatchShape(decoding, 0, 64 * decoding, decoding)
    assert device_seconds(alone) < slo_s * 1.3  # fewer than 40 were admitted
    assert device.scheduler.waiting
    holds_long = [any(c.request is long for c in batch.chunks) for batch, _ in device.steps]
    assert all(holds_long[: sum(holds_long)])  # in every iteration until it ended
    assert sum(holds_long) > 5
    device.run()


def test_a_squeezed_prompt_gets_a_tile_an_iteration_and_is_counted() -> None:
    device = make_device(0.05)
    for index in range(4):
        device.add(f"short{index}", 4, 300)
    device.step()
    long = device.add("long", 400, 2)
    device.step()
    device.slowness = 4.0  # another process takes most of the machine: decodes alone are too slow
    for _ in range(30):
        device.step()
    budget = device.scheduler.budget
    assert isinstance(budget, SloBudget)
    assert long.num_output_tokens == 2 or budget.squeezed.iterations > 0
    sizes = [batch.num_tokens - batch.num_decodes for batch, _ in device.steps[-20:]]
    assert all(size in (0, *range(1, 2 * TILE)) for size in sizes)
    assert all(size >= TILE for size in sizes if size and long.num_output_tokens == 0)
    device.run()
    assert budget.squeezed.iterations > 0


def test_a_slower_machine_is_within_the_target_again() -> None:
    device = make_device(0.2)
    for index in range(4):
        device.add(f"short{index}", 20, 200)
    device.add("long", 12_000, 2)
    for _ in range(30):
        device.step()
    device.slowness = 1.7
    for _ in range(40):
        device.step()
    late = [seconds for _, seconds in device.steps[-34:]]
    assert max(late) <= 0.2 * 1.05
    assert max(late) > 0.15


def test_batches_in_flight_share_the_decodes_that_are_admitted() -> None:
    slo_s, sizes = 0.05, [64] * 200
    alone = SloBudget(slo_s, StepTimePredictor(MODEL), tile_tokens=TILE)
    pipeline = SloBudget(slo_s, StepTimePredictor(MODEL), tile_tokens=TILE, num_stages=3)
    count = alone.admissions(Load(()), sizes)
    assert 1 < count < len(sizes) / 3
    assert pipeline.admissions(Load(()), sizes) == 3 * count
    assert pipeline.pace(Load(()))[0] == pytest.approx(3 * alone.pace(Load(()))[0])


@pytest.mark.parametrize("slo_s", [0.0, -1.0, float("nan")])
def test_a_target_must_be_above_zero(slo_s: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        make_device(slo_s)
