"""The step-time model and what follows the machine, on devices whose times are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallfree.core.step_time import (
    BatchShape,
    StepTimeModel,
    StepTimePredictor,
    chunk_context,
    fit,
)

FIELDS = ("num_tokens", "prefill_context", "decode_context", "num_sampled")
costs = st.floats(0, 1, allow_nan=False)
shapes = st.builds(
    BatchShape,
    num_tokens=st.integers(1, 5000),
    prefill_context=st.integers(0, 10**7),
    decode_context=st.integers(0, 10**6),
    num_sampled=st.integers(0, 500),
)


def device_seconds(shape: BatchShape) -> float:
    """A device that reads its weights in 15 ms and computes 2 ms a token, whichever is longer."""
    return (
        0.004
        + max(0.015, 0.002 * shape.num_tokens)
        + 1e-8 * shape.prefill_context
        + 1e-6 * shape.decode_context
        + 0.0005 * shape.num_sampled
    )


def random_shape(rng: random.Random, most_tokens: int = 256) -> BatchShape:
    decodes = rng.randrange(0, 17)
    chunk = rng.randrange(0 if decodes else 1, most_tokens - decodes)
    start = rng.choice([0, rng.randrange(8000)])
    return BatchShape(
        num_tokens=decodes + chunk,
        prefill_context=chunk_context(start, chunk),
        decode_context=sum(rng.randrange(1, 8000) for _ in range(decodes)),
        num_sampled=decodes + (chunk > 0),
    )


def measured(seed: int, count: int, noise: float = 0.0) -> list[tuple[BatchShape, float]]:
    rng = random.Random(seed)
    drawn = [random_shape(rng) for _ in range(count)]
    return [(shape, device_seconds(shape) * rng.uniform(1 - noise, 1 + noise)) for shape in drawn]


@given(
    base=st.floats(0.001, 1),
    rises=st.lists(costs, min_size=1, max_size=5),
    slopes=st.tuples(costs, costs, costs),
    shape=shapes,
    field=st.sampled_from(FIELDS),
    more=st.integers(1, 1000),
)
def test_more_of_anything_never_takes_less(
    base: float,
    rises: list[float],
    slopes: tuple[float, float, float],
    shape: BatchShape,
    field: str,
    more: int,
) -> None:
    knots = tuple(2**n for n in range(len(rises) + 1))
    model = StepTimeModel(base, knots, tuple(rises), *slopes)
    values = {name: getattr(shape, name) for name in FIELDS}
    larger = BatchShape(**{**values, field: values[field] + more})
    assert 0 < model.seconds(shape) <= model.seconds(larger) * (1 + 1e-12)


def test_a_batch_of_nothing_takes_no_time() -> None:
    assert fit(measured(0, 50)).seconds(BatchShape(0)) == 0


def test_held_out_batches_are_predicted() -> None:
    model = fit(measured(1, 150, noise=0.03))
    errors = sorted(abs(model.seconds(shape) / seconds - 1) for shape, seconds in measured(2, 300))
    assert errors[150] < 0.02
    assert errors[285] < 0.06


def test_beyond_the_largest_batch_the_line_goes_on() -> None:
    model = fit(measured(3, 150))
    shape = BatchShape(2000, chunk_context(0, 2000), 0, 1)
    assert model.seconds(shape) == pytest.approx(device_seconds(shape), rel=0.1)


@pytest.mark.parametrize(
    "samples",
    [[], [(BatchShape(1), 0.1)], [(BatchShape(1), 0.1), (BatchShape(2), 0.0)]],
)
def test_too_little_to_fit_is_refused(samples: list[tuple[BatchShape, float]]) -> None:
    with pytest.raises(ValueError, match="step times need"):
        fit(samples)


@pytest.mark.parametrize("costs", [(-1.0, 0.1), (float("nan"), 0.1), (0.0, 0.0)])
def test_costs_below_zero_are_refused(costs: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        StepTimeModel(costs[0], (1, 2), (costs[1],), 0, 0, 0)


def run(predictor: StepTimePredictor, slowness: list[float], seed: int = 0) -> list[float]:
    """Observe a batch for each entry, so much slower than the device; gives the speeds."""
    rng = random.Random(seed)
    speeds = []
    for factor in slowness:
        shape = random_shape(rng)
        predictor.observe(shape, factor * device_seconds(shape))
        speeds.append(predictor.speed)
    return speeds


def test_a_slow_iteration_does_not_move_the_prediction() -> None:
    predictor = StepTimePredictor(fit(measured(4, 150)))
    speeds = run(predictor, [1.0] * 20 + [10.0] + [1.0] * 20)
    assert all(0.9 < speed < 1.1 for speed in speeds)
    assert predictor.margin < 1.15


def test_a_lasting_change_is_followed_within_five_iterations() -> None:
    predictor = StepTimePredictor(fit(measured(5, 150)))
    speeds = run(predictor, [1.0] * 20 + [2.0] * 20 + [1.0] * 20)
    assert speeds[24] == pytest.approx(2, rel=0.1)
    assert speeds[44] == pytest.approx(1, rel=0.1)
    assert predictor.margin < 1.25  # a change is no scatter


def test_costs_that_were_profiled_wrong_are_learned() -> None:
    """Contexts cost twice what the profile says: errors halve, and stay that way."""
    predictor = StepTimePredictor(fit(measured(9, 150)))
    rng = random.Random(10)
    errors = []
    for _ in range(1500):
        shape = random_shape(rng)
        contexts = 1e-8 * shape.prefill_context + 1e-6 * shape.decode_context
        seconds = device_seconds(shape) + contexts
        errors.append(abs(predictor.seconds(shape) / seconds - 1))
        predictor.observe(shape, seconds)
    assert sum(errors[-300:]) < 0.5 * sum(errors[:300])


def test_what_is_learned_has_limits() -> None:
    model = fit(measured(11, 50))
    predictor = StepTimePredictor(model)
    rng = random.Random(12)
    for _ in range(3000):  # nonsense: times that have nothing to do with the batches
        predictor.observe(random_shape(rng), rng.uniform(0.01, 10))
    for cost, first in zip(predictor.model.costs, model.costs, strict=True):
        assert 0.5 * first <= cost <= 1.5 * first


@pytest.mark.parametrize("quantile", [0.8, 0.9, 0.95, 0.99])
def test_so_many_iterations_are_within_the_margin(quantile: float) -> None:
    predictor = StepTimePredictor(fit(measured(6, 150, noise=0.1)), quantile)
    rng = random.Random(7)
    within = 0
    for index in range(3000):
        shape = random_shape(rng)
        seconds = (
            device_seconds(shape) * rng.uniform(0.9, 1.1) * (1.5 if rng.random() < 0.02 else 1)
        )
        if index >= 1000:
            within += seconds <= predictor.seconds(shape) * predictor.margin
        predictor.observe(shape, seconds)
    assert quantile - 0.02 <= within / 2000 <= quantile + 0.06


def test_two_slow_iterations_are_believed_and_one_is_not() -> None:
    predictor = StepTimePredictor(fit(measured(6, 150)))
    shape = BatchShape(64, 0, 4000, 8)

    def bound_s() -> float:
        return predictor.seconds(shape) * predictor.margin

    for _ in range(50):
        predictor.observe(shape, device_seconds(shape))
    steady_s, slow_s = bound_s(), 1.4 * device_seconds(shape)
    predictor.observe(shape, slow_s)
    assert bound_s() < 1.05 * steady_s
    predictor.observe(shape, slow_s)
    assert 0.95 * slow_s < bound_s() < 1.1 * slow_s


def test_times_that_make_no_sense_teach_nothing() -> None:
    predictor = StepTimePredictor(fit(measured(8, 50)))
    predictor.observe(BatchShape(0), 1.0)
    predictor.observe(BatchShape(1), 0.0)
    assert predictor.speed == 1.0
