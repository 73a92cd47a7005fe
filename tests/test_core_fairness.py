"""Users who take turns: nobody waits for long because another asks for much."""

from __future__ import annotations

import pytest
from known_device import make_device

from stallfree.core.targets import Targets


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
