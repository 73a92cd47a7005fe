"""Tiers and their targets while requests run: who overtakes, who pauses, who is displaced."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_device import make_device

from stallfree.core.targets import Targets


@pytest.mark.parametrize("fields", [{"tier": "gold"}, {"tbt_s": 0.0}, {"ttft_s": float("inf")}])
def test_targets_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Targets(**fields)  # type: ignore[arg-type]


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


def test_looser_targets_than_the_servers_count() -> None:
    device = make_device(slo_s=0.05)
    device.put("patient", 10, 200, Targets(tbt_s=0.3))
    device.step()
    device.put("long", 3000, 2, Targets())
    for _ in range(5):
        device.step()
    assert max(seconds for _, seconds in device.steps[-5:]) > 0.2


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
