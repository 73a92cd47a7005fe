"""Who is refused at once, and whether what was predicted of first tokens comes true."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_device import make_device, make_request

from stallfree.core.admission import Admission, predict_first_token_s
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.targets import Targets
from stallfree.errors import InvalidRequestError, OverloadedError


def test_queue_limits_refuse() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=1), BlockPool(100, 16), StaticBudget(16))
    scheduler.add(make_request("runs"))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.complete(batch, [1] * len(batch.sampling))
    admission = Admission(max_queued_requests=2, max_queued_tokens=250)
    assert admission.check(make_request("huge", 900), 1, scheduler) is None  # nothing waits yet
    scheduler.add(make_request("a"))
    with pytest.raises(OverloadedError, match=r"has 200 tokens, 100 wait, .* no more than 250"):
        admission.check(make_request("b", 200), 1, scheduler)
    scheduler.add(make_request("b"))
    with pytest.raises(OverloadedError, match="2 requests wait, and no more than 2") as refused:
        admission.check(make_request("c", 10), 1, scheduler)
    assert refused.value.retry_after_s == 5
    with pytest.raises(OverloadedError, match="2 requests wait"):
        admission.check(make_request("twice", 10), 2, scheduler)
    urgent = make_request("urgent", targets=Targets("priority"))
    assert admission.check(urgent, 8, scheduler) is None  # nobody waits before it


def test_those_who_need_not_wait_are_not_refused() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=20), BlockPool(400, 16), StaticBudget(16))
    admission = Admission(max_queued_requests=2)
    for number in range(22):
        request = make_request(str(number), 10)
        admission.check(request, 1, scheduler)
        scheduler.add(request)
    with pytest.raises(OverloadedError, match="22 requests wait, and no more than 22"):
        admission.check(make_request("more", 10), 1, scheduler)
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.num_left_waiting[1] > 2  # a place is no use: they wait for the budget
    with pytest.raises(OverloadedError, match="requests wait, and no more than 2 may"):
        admission.check(make_request("late", 10), 1, scheduler)


def test_an_idle_server_reads_a_short_prompt_at_once() -> None:
    device = make_device(slo_s=0.1)
    request = make_request("short", 2, targets=Targets(ttft_s=0.3))
    predicted_s = Admission(slo_factor=1.0).check(request, 1, device.scheduler)
    assert predicted_s is not None
    assert predicted_s < 0.05


def test_a_first_token_that_would_come_too_late_is_refused_with_the_time_to_come_back() -> None:
    device = make_device()
    admission = Admission(slo_factor=1.5)
    target = Targets(ttft_s=4.0)
    for number in range(8):
        device.put(f"answer{number}", 20, 600, Targets())
    device.step()
    assert admission.check(make_request("first", 1000, targets=target), 1, device.scheduler)
    for number in range(10):
        device.put(f"long{number}", 1000, 2, Targets())
    late = make_request("late", 1000, targets=target, at=device.now)
    with pytest.raises(OverloadedError, match="predicted to come after") as refused:
        admission.check(late, 1, device.scheduler)
    predicted_s = predict_first_token_s(late, device.scheduler)
    assert predicted_s is not None
    assert refused.value.retry_after_s == pytest.approx(predicted_s - 6.0)
    urgent = make_request("urgent", 1000, targets=Targets("priority", ttft_s=4.0))
    assert admission.check(urgent, 1, device.scheduler)  # nobody stands before it


def test_a_prompt_that_no_server_reads_in_time_is_a_bad_request() -> None:
    device = make_device()
    device.put("answer", 20, 600, Targets())
    device.step()
    hopeless = make_request("hopeless", 9000, targets=Targets(ttft_s=1.0), at=device.now)
    with pytest.raises(InvalidRequestError, match="9000 tokens takes"):
        Admission(slo_factor=1.5).check(hopeless, 1, device.scheduler)


def test_predictions_know_how_long_answers_are() -> None:
    """One place, and answers that end long before they must."""
    device = make_device(places=1)
    for number in range(5):
        ended = device.put(f"ended{number}", 10, 6, Targets())
        ended.params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    device.run()
    device.put("running", 10, 8000, Targets())
    for _ in range(3):
        device.step()
    predicted_s = predict_first_token_s(make_request("own", 10, at=device.now), device.scheduler)
    assert predicted_s is not None
    assert predicted_s < 10


def test_without_a_place_the_prediction_waits_for_one() -> None:
    device = make_device(places=2)
    for number in range(2):
        device.put(f"answer{number}", 20, 100 + number, Targets())
    for _ in range(3):
        device.step()
    predicted_s = predict_first_token_s(make_request("own", 20), device.scheduler)
    assert predicted_s is not None
    assert predicted_s > 50 * 0.015


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_predictions_come_true(seed: int) -> None:
    """Within a third and half a second, on a device that is not overloaded with decodes."""
    rng = random.Random(seed)
    device = make_device()
    for number in range(rng.randrange(1, 9)):
        device.put(f"answer{number}", 20, 4000, Targets())
    for _ in range(5):
        device.step()
    for number in range(rng.randrange(6)):
        device.put(f"long{number}", rng.randrange(100, 3000), 2, Targets())
    request = make_request("own", rng.randrange(100, 3000), 2, Targets(), device.now)
    predicted_s = predict_first_token_s(request, device.scheduler)
    assert predicted_s is not None
    began = device.now
    device.scheduler.add(request)
    device.requests.append(request)
    while not request.output_token_ids:
        device.step()
    came_s = device.first_token_at["own"] - began
    assert abs(came_s - predicted_s) <= 0.33 * came_s + 0.5
