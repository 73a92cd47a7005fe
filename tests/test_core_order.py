"""Tiers, orders, fairness and admission, on a device whose step times are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slo_budget import MODEL, TILE, Device

from stallfree.core.admission import Admission, predict_first_token_s
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, StaticBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import StepTimePredictor
from stallfree.core.targets import Targets
from stallfree.core.waiting import WaitingQueue
from stallfree.errors import InvalidRequestError, OverloadedError

SLO_S = 0.2


class OrderedDevice(Device):
    """A device that notes when each request got its first token."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.first_token_at: dict[str, float] = {}
        self.requests: list[Request] = []

    def step(self) -> None:
        super().step()
        for request in self.requests:
            if request.output_token_ids:
                self.first_token_at.setdefault(request.request_id, self.now)

    def put(self, name: str, prompt: int, output: int, targets: Targets) -> Request:
        request = make_request(name, prompt, output, targets, self.now)
        self.scheduler.add(request)
        self.requests.append(request)
        return request


def make_request(
    name: str, prompt: int = 100, output: int = 4, targets: Targets | None = None, at: float = 0.0
) -> Request:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    return Request(
        name,
        [1] * prompt,
        params,
        max_tokens=output,
        arrived_at=at,
        targets=targets or Targets(),
    )


def make_device(
    order: str = "fcfs",
    *,
    is_fair: bool = False,
    places: int = 64,
    blocks: int = 20_000,
    slo_s: float = SLO_S,
) -> OrderedDevice:
    budget = SloBudget(slo_s, StepTimePredictor(MODEL), tile_tokens=TILE)
    config = SchedulerConfig("sarathi", places, 16_000, prefill_order=order, is_fair=is_fair)
    return OrderedDevice(Scheduler(config, BlockPool(blocks, 16), budget))


def names(queue: WaitingQueue) -> list[str]:
    return [request.request_id for request in queue]


def queue_of(order: str, *requests: Request) -> WaitingQueue:
    queue = WaitingQueue(order)
    for index, request in enumerate(requests):
        request.arrival = (request.arrived_at, index)
        queue.add(request)
    return queue


def test_orders_are_what_they_say() -> None:
    def made() -> list[Request]:
        return [
            make_request("long", 3000, at=0.0, targets=Targets(ttft_s=10)),
            make_request("late", 500, at=4.0, targets=Targets(ttft_s=2)),
            make_request("none", 100, at=1.0),
        ]

    assert names(queue_of("fcfs", *made())) == ["long", "none", "late"]
    assert names(queue_of("edf", *made())) == ["late", "long", "none"]
    assert names(queue_of("srpf", *made())) == ["none", "late", "long"]


def test_a_long_prompt_is_overtaken_for_so_long_only() -> None:
    """A second of waiting is worth 100 tokens: 2,000 more tokens cost 20 s at most."""
    long = make_request("long", 3000, at=0.0)
    assert names(queue_of("srpf", long, make_request("soon", 1000, at=19.0))) == ["soon", "long"]
    long = make_request("long", 3000, at=0.0)
    assert names(queue_of("srpf", long, make_request("later", 1000, at=21.0))) == ["long", "later"]


def test_tiers_go_first_whatever_the_order() -> None:
    for order in ("fcfs", "edf", "srpf"):
        queue = queue_of(
            order,
            make_request("flex", 10, targets=Targets("flex", ttft_s=0.1)),
            make_request("default", 10, at=1.0),
            make_request("priority", 9000, at=2.0, targets=Targets("priority")),
        )
        assert names(queue) == ["priority", "default", "flex"]
        assert [queue.num_tokens(rank) for rank in range(3)] == [9000, 9010, 9020]
        assert [queue.num_requests(rank) for rank in range(3)] == [1, 2, 3]
        assert queue.has_flex


def test_a_request_that_leaves_is_forgotten() -> None:
    requests = [make_request(str(i), 10 + i) for i in range(5)]
    queue = queue_of("srpf", *requests)
    queue.remove(requests[2])
    assert names(queue) == ["0", "1", "3", "4"]
    assert len(queue) == 4
    assert queue.num_tokens(1) == 10 + 11 + 13 + 14
    with pytest.raises(KeyError):
        queue.remove(requests[2])


def test_priority_overtakes_a_prompt_that_is_being_read() -> None:
    device = make_device()
    device.put("decode", 10, 400, Targets())
    device.step()
    device.put("default", 4000, 2, Targets())
    for _ in range(3):
        device.step()
    device.put("priority", 1000, 2, Targets("priority"))
    device.run()
    assert device.first_token_at["priority"] < device.first_token_at["default"]


def test_flex_pauses_while_prompts_of_others_are_read() -> None:
    device = make_device()
    flex = device.put("flex", 10, 60, Targets("flex"))
    device.put("answer", 10, 300, Targets())
    for _ in range(5):
        device.step()
    before = flex.num_output_tokens
    long = device.put("long", 3000, 2, Targets())
    device.step()
    device.step()
    assert flex.num_output_tokens == before
    while not long.output_token_ids:
        device.step()
    assert flex.num_output_tokens == before
    device.run()
    assert flex.num_output_tokens == 60


def test_flex_makes_room_for_others() -> None:
    for limits in ({"places": 4}, {"blocks": 45}):
        device = make_device(**limits)  # type: ignore[arg-type]
        flex = [device.put(f"flex{i}", 100, 50, Targets("flex")) for i in range(4)]
        for _ in range(8):
            device.step()
        wanted = device.put("default", 300, 5, Targets())
        device.step()
        device.step()
        assert wanted.block_table
        assert any(request.num_preemptions for request in flex)
        device.run()
        assert all(len(request.output_token_ids) == 50 for request in flex)


def test_the_tightest_target_of_the_answers_decides() -> None:
    device = make_device()
    device.put("tight", 10, 200, Targets(tbt_s=0.08))
    device.put("other", 10, 20, Targets())
    device.step()
    device.put("long", 4000, 2, Targets())
    for _ in range(10):
        device.step()
    assert all(seconds <= 0.08 * 1.05 for _, seconds in device.steps[-10:])
    assert max(seconds for _, seconds in device.steps[-10:]) > 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.sampled_from(["fcfs", "edf", "srpf"]))
def test_priority_keeps_its_targets_beside_whatever_else(seed: int, order: str) -> None:
    """Its first tokens wait for nothing but what already decodes; all requests end."""
    rng = random.Random(seed)
    device = make_device(order)
    for number in range(40):
        tier = rng.choice(["priority", "default", "default", "flex"])
        prompt = rng.randrange(20, 300 if tier == "priority" else 2000)
        device.put(f"{tier}{number}", prompt, rng.randrange(2, 30), Targets(tier))
        for _ in range(rng.randrange(6)):
            if device.scheduler.has_requests:
                device.step()
    device.run()
    for request in device.requests:
        assert request.num_output_tokens == request.max_tokens
        waited = device.first_token_at[request.request_id] - request.arrived_at
        ahead = sum(
            other.num_prompt_tokens
            for other in device.requests
            if other.targets.tier == "priority" and other.arrived_at <= request.arrived_at + waited
        )
        if request.targets.tier == "priority":
            assert waited <= 1.0 + ahead / 20  # 20 tokens a second at the least


@pytest.mark.parametrize("order", ["fcfs", "srpf"])
def test_a_user_with_many_prompts_does_not_delay_anothers_first(order: str) -> None:
    """Within what VTC promises: a prompt and an answer of each at most stand before it."""
    waits = {}
    for is_fair in (False, True):
        device = make_device(order, is_fair=is_fair)
        for number in range(100):
            device.put(f"greedy{number}", 1500, 8, Targets(user="greedy"))
        for _ in range(50):
            device.step()
        began = device.now
        device.put("modest", 1500, 8, Targets(user="modest"))
        while "modest" not in device.first_token_at:
            device.step()
        waits[is_fair] = device.first_token_at["modest"] - began
    alone_s = 1500 * 0.0025
    assert waits[True] < 3 * alone_s
    assert waits[False] > 20 * alone_s


def test_a_user_who_comes_back_has_saved_nothing_up() -> None:
    device = make_device(is_fair=True)
    for number in range(6):
        device.put(f"a{number}", 1000, 2, Targets(user="a"))
    while "a2" not in device.first_token_at:
        device.step()
    for number in range(6):
        device.put(f"b{number}", 1000, 2, Targets(user="b"))
    device.run()
    order = sorted(device.first_token_at, key=lambda name: device.first_token_at[name])
    late = [name[0] for name in order[order.index("a2") + 1 :]]
    assert set(late[:3]) == {"a", "b"}  # they take turns from then on


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


def test_flex_is_not_displaced_for_what_would_not_fit_anyway() -> None:
    """It keeps its blocks, and goes on, until there is enough for the other."""
    device = make_device(blocks=60)
    holder = device.put("holder", 16 * 35, 300, Targets())
    flex = device.put("flex", 100, 60, Targets("flex"))
    for _ in range(20):
        device.step()
    device.put("large", 16 * 30, 5, Targets())
    for _ in range(60):
        device.step()
    assert not holder.is_finished
    assert flex.num_preemptions == 0
    assert flex.num_output_tokens > 30
    device.run()


def test_waiting_flex_does_not_take_the_memory_that_another_waits_for() -> None:
    device = make_device(blocks=60)
    device.put("holder", 16 * 35, 200, Targets())
    device.step()
    large = device.put("large", 16 * 30, 5, Targets())
    small = device.put("small", 100, 5, Targets("flex"))
    for _ in range(30):
        device.step()
    assert not small.block_table
    device.run()
    assert large.num_output_tokens == small.num_output_tokens == 5


def test_flex_contexts_do_not_shorten_the_chunks_of_others() -> None:
    sizes = []
    for flex in (0, 30):
        device = make_device()
        for number in range(flex):
            device.put(f"flex{number}", 4000, 500, Targets("flex"))
        while any(not request.is_decode for request in device.requests):
            device.step()
        device.put("answer", 10, 300, Targets())
        device.step()
        device.put("long", 3000, 2, Targets())
        device.step()
        device.step()
        sizes.append(device.steps[-1][0].num_tokens)
    assert sizes[0] == sizes[1]


def test_flex_decodes_as_many_as_leave_the_others_their_target() -> None:
    device = make_device(slo_s=0.1)
    for number in range(30):
        device.put(f"flex{number}", 4000, 300, Targets("flex"))
    while any(not request.is_decode for request in device.requests):
        device.step()
    device.put("answer", 10, 100, Targets())
    device.step()
    for _ in range(20):
        device.step()
        batch, seconds = device.steps[-1]
        assert seconds <= 0.1 * 1.05
        assert 5 < batch.num_decodes < 31


def test_looser_targets_than_the_servers_count() -> None:
    device = make_device(slo_s=0.05)
    device.put("patient", 10, 200, Targets(tbt_s=0.3))
    device.step()
    device.put("long", 3000, 2, Targets())
    for _ in range(5):
        device.step()
    assert max(seconds for _, seconds in device.steps[-5:]) > 0.2


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


def test_without_a_place_the_prediction_waits_for_one() -> None:
    device = make_device(places=2)
    for number in range(2):
        device.put(f"answer{number}", 20, 100 + number, Targets())
    for _ in range(3):
        device.step()
    predicted_s = predict_first_token_s(make_request("own", 20), device.scheduler)
    assert predicted_s is not None
    assert predicted_s > 50 * 0.015


@pytest.mark.parametrize("fields", [{"tier": "gold"}, {"tbt_s": 0.0}, {"ttft_s": float("inf")}])
def test_targets_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Targets(**fields)  # type: ignore[arg-type]
