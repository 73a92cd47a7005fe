"""What is counted of an engine: every request once, every gap, whatever happens to them."""

from __future__ import annotations

import pytest
from engine_fixtures import GREEDY, Failing, tiny_settings
from known_device import make_request

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import FinishReason, Request
from stallfree.core.targets import Targets
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.histogram import Histogram
from stallfree.engine.meter import Meter
from stallfree.engine.observer import IterationRecord


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    settings = tiny_settings(tmp_path_factory.mktemp("model"))
    return build_engine(settings, show_progress=False)


@pytest.fixture
def meter(engine: Engine) -> Meter:
    meter = Meter()
    engine.observers.add(meter)
    return meter


def run(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def count(histogram: Histogram) -> int:
    return histogram.cumulative()[-1]


def token(meter: Meter, engine: Engine, request: Request, at_s: float, *, first: bool) -> None:
    """Tell `meter` of an iteration that gave `request` a token."""
    size = request.num_prompt_tokens if first else 1
    start = 0 if first else request.num_tokens - 1
    batch = Batch([Chunk(request, start, size, True, not first)], token_limit=64)
    if request.first_scheduled_at is None:
        request.first_scheduled_at = at_s - 0.5
    request.output_token_ids.append(1)
    record = IterationRecord(batch, at_s - 0.25, at_s, predicted_s=0.125, is_failed=False)
    meter.iterated(record, engine.scheduler)


def test_a_value_is_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        histogram.add(value)
    assert histogram.cumulative() == [2, 4, 5]
    assert histogram.total == 104.0


def test_times_of_a_request_are_told_apart(engine: Engine) -> None:
    meter = Meter()
    request = make_request("one", 6, 3, Targets("priority", tbt_s=0.5), at=10.0)
    meter.added(request)
    token(meter, engine, request, 12.0, first=True)
    token(meter, engine, request, 12.5, first=False)
    token(meter, engine, request, 14.0, first=False)
    meter.ended(request, FinishReason.LENGTH, 14.5)
    tier = meter.counts.tiers["priority"]
    totals = [each.total for each in (tier.delay_s, tier.ttft_s, tier.tbt_s, tier.tpot_s)]
    assert totals == [1.5, 2.0, 2.0, 1.0]
    assert tier.end_to_end_s.total == 4.5
    assert (count(tier.delay_s), count(tier.ttft_s), count(tier.tbt_s)) == (1, 1, 2)
    assert tier.num_stalls == 1  # a gap of exactly the target is none
    assert tier.num_ended[FinishReason.LENGTH] == 1
    assert (meter.counts.num_prompt_tokens, meter.counts.num_output_tokens) == (6, 3)
    assert (meter.counts.token_limit, count(meter.counts.iteration_s)) == (64, 3)
    assert meter.counts.prediction_ratio.total == 6.0
    assert count(meter.counts.tiers["default"].ttft_s) == 0


def test_without_a_target_nothing_is_a_stall(engine: Engine) -> None:
    meter = Meter()
    request = make_request("one", 6, 3)
    meter.added(request)
    token(meter, engine, request, 1.0, first=True)
    token(meter, engine, request, 100.0, first=False)
    assert meter.counts.tiers["default"].num_stalls == 0


def test_an_engine_is_counted_to_the_token(engine: Engine, meter: Meter) -> None:
    engine.add("one", [1] * 40, GREEDY)  # of several chunks
    engine.add("two", [2] * 5, GREEDY, Targets("flex"))
    run(engine)
    assert meter.counts.num_prompt_tokens == 45
    assert meter.counts.num_output_tokens == 24
    for tier in ("default", "flex"):
        counted = meter.counts.tiers[tier]
        assert count(counted.delay_s) == count(counted.ttft_s) == count(counted.tpot_s) == 1
        assert count(counted.tbt_s) == 11
        assert counted.num_ended[FinishReason.LENGTH] == 1
    assert meter.counts.token_limit == 16


def test_what_a_preemption_runs_again_is_counted_again(engine: Engine, meter: Meter) -> None:
    engine.add("one", [1] * 4, GREEDY)
    for _ in range(3):
        engine.step()
    engine.scheduler.recompute([])
    run(engine)
    assert engine.scheduler.preemptions["lost"] == 1
    assert meter.counts.num_prompt_tokens == 4 + 7
    assert meter.counts.num_output_tokens == 12
    assert count(meter.counts.tiers["default"].delay_s) == 1


def test_a_request_without_an_answer_has_no_latency_of_one(engine: Engine, meter: Meter) -> None:
    engine.add("left", [1, 2, 3], GREEDY)
    engine.step()
    engine.abort("left")
    engine.add("failed", [1, 2, 3], GREEDY)
    failing = Failing(engine)
    failing.fails = True
    engine.executor = failing
    engine.step()
    tier = meter.counts.tiers["default"]
    assert tier.num_ended[FinishReason.ABORT] == tier.num_ended[FinishReason.ERROR] == 1
    assert meter.counts.num_failed_iterations == 1
    assert count(tier.end_to_end_s) == count(tier.tpot_s) == 0
    assert count(tier.ttft_s) == 1
    assert meter.counts.num_output_tokens == 1


def test_an_end_of_a_request_from_before_is_ignored(engine: Engine) -> None:
    engine.add("early", [1, 2, 3], GREEDY)
    meter = Meter()
    engine.observers.add(meter)
    engine.add("late", [1, 2, 3], GREEDY)
    run(engine)
    assert meter.counts.tiers["default"].num_ended[FinishReason.LENGTH] == 1
    assert meter.counts.num_output_tokens == 12
