"""What the engine benchmark promises, from times, costs and bounds made by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from engine_promises import (
    CHUNK,
    HYBRID,
    LITTLE_CONTEXT,
    LONG_CONTEXT,
    ONE,
    PROMPT,
    SOME_CONTEXT,
    Promise,
    promises_of_engine,
    promises_of_steps,
)
from steps import Bounds, Case, Costs


def test_promises_compare_with_their_limits() -> None:
    assert Promise("most", 1.0, 1.0).is_met
    assert not Promise("most", 1.1, 1.0).is_met
    assert Promise("least", 1.1, 1.0, at_least=True).is_met
    assert not Promise("least", 0.9, 1.0, at_least=True).is_met
    start = {
        "first_token_s": 3.0,
        "resident_bytes": 30,
        "weight_bytes": 10,
        "kv_cache_bytes": 5,
        "overhead_bytes": 15,
    }
    loop, first_token, memory = promises_of_engine({"share_outside": 0.01}, start)
    assert (loop.value, first_token.value, memory.value) == (0.01, 3.0, 2.0)
    assert [loop.is_met, first_token.is_met, memory.is_met] == [True, True, False]


class HandMadeCosts(Costs):
    """Round numbers for the cases that promises are made of."""

    def __init__(self) -> None:
        pass

    def bytes(self, case: Case) -> float:
        return {ONE: 100.0}[case]

    def kv_bytes(self, case: Case) -> float:
        return {LITTLE_CONTEXT: 10.0, LONG_CONTEXT: 110.0}[case]

    def operations(self, case: Case) -> float:
        return {PROMPT: 1000.0}[case]


def hand_made_bounds() -> Bounds:
    bounds = Bounds()
    bounds.read, bounds.rate = 50.0, 100.0
    return bounds


AT_LIMITS = {  # seconds; each promise is just kept
    ONE: 2.8,  # 2 s of reading, times 1.4
    PROMPT: 10 / 0.6,
    SOME_CONTEXT: 5.6,
    CHUNK: 4.0,
    HYBRID: 4.6,
    LITTLE_CONTEXT: 3.0,
    LONG_CONTEXT: 7.0,  # 4 s for 100 bytes: 25 a second, half of 50
}
LIMITS = [1.4, 0.6, 2.0, 1.15, 0.5]


@pytest.mark.parametrize(("factor", "is_met"), [(0.999, True), (1.001, False)])
def test_promises_of_steps_are_those_counted_by_hand(factor: float, is_met: bool) -> None:
    """Each is judged with its own time just within and just beyond the limit."""
    own = [ONE, PROMPT, SOME_CONTEXT, HYBRID, LONG_CONTEXT]
    for index, case in enumerate(own):
        times = {**AT_LIMITS, case: AT_LIMITS[case] * factor}
        promise = promises_of_steps(times, AT_LIMITS, HandMadeCosts(), hand_made_bounds())[index]
        assert promise.is_met is is_met, promise.name
        assert promise.limit == LIMITS[index]
        assert promise.of_medians == pytest.approx(LIMITS[index])
        expected = promise.value / LIMITS[index]
        if case == LONG_CONTEXT:
            assert promise.value == pytest.approx(100 / (7 * factor - 3) / 50)
        else:
            assert expected == pytest.approx(1 / factor if promise.at_least else factor)


def test_promises_of_steps_have_these_values() -> None:
    times = {**AT_LIMITS, ONE: 4.0, PROMPT: 20.0, HYBRID: 5.0, LONG_CONTEXT: 8.0}
    made = promises_of_steps(times, AT_LIMITS, HandMadeCosts(), hand_made_bounds())
    assert [promise.value for promise in made] == pytest.approx([2.0, 0.5, 1.4, 1.25, 0.4])
    assert [promise.is_met for promise in made] == [False, False, True, False, False]


def test_a_floor_is_the_longer_of_reading_and_computing() -> None:
    bounds = hand_made_bounds()
    assert bounds.floor_s(100, 100) == 2.0
    assert bounds.floor_s(100, 300) == 3.0
    assert "FBGEMM int8 (reference)" in str(bounds)
    assert Bounds("float32").reference == "oneDNN float32"
