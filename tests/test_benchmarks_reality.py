"""The comparisons with reality and with another client, on runs that are known to be right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import load_generators
import reality

from stallfree.bench.workloads import Recipe
from stallfree.core.batch import Batch
from stallfree.core.step_time import BatchShape, StepTimeModel
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System
from stallfree.sim.times import ProfiledTimes

TIMES = StepTimeModel(0.02, (1, 64, 600), (0.1, 1.2), 1e-8, 1e-7, 1e-3)
KV_TOKENS = 100_000


class Noted(ProfiledTimes):
    """Keeps what it was asked, as a server's file of iterations does."""

    def __init__(self, model: StepTimeModel) -> None:
        super().__init__(model)
        self.iterations: list[tuple[BatchShape, float]] = []

    def seconds(self, batch: Batch) -> Sequence[float]:
        (seconds,) = super().seconds(batch)
        self.iterations.append((BatchShape.of(batch), seconds))
        return (seconds,)


def run_of(name: str, slower: float) -> reality.LiveRun:
    """A run on a machine that is so much slower than `TIMES`."""
    times = Noted(reality.slower(TIMES, slower))
    system = System(
        lambda _: times, reality.SCHEDULERS[name], KV_TOKENS, reality.CONTEXT, tile_tokens=8
    )
    recipe = Recipe("openchat_sharegpt4", requests_per_s=0.8, max_total_tokens=reality.LONGEST)
    results = simulate(recipe.make(), [system.replica()], LeastWork()).results
    return reality.LiveRun(results, times.iterations)


@pytest.mark.parametrize("name", reality.SCHEDULERS)
def test_a_slower_machine_is_told_from_wrong_times(name: str) -> None:
    speeds = {each: 1.3 if each == name else 1.0 for each in reality.SCHEDULERS}
    live = {each: run_of(each, slower) for each, slower in speeds.items()}
    run = reality.compare(live, name, TIMES, KV_TOKENS, 8)
    assert run["slower than the profile"] == pytest.approx(1.3)
    assert run["slower than the others"] == pytest.approx(1.3, rel=0.03)
    for number in reality.NUMBERS:
        assert run["speed"][number] == pytest.approx(run["live"][number], rel=0.1), number
    assert run["others"]["TBT P99"] < 0.9 * run["live"]["TBT P99"]
    console = Console(record=True, width=120)
    console.print(reality.table({name: run}))
    lines = console.export_text().splitlines()
    assert "!" in next(line for line in lines if "others" in line)
    assert "!" not in next(line for line in lines if "speed" in line)


def test_clients_are_compared_by_the_medians_of_their_rounds() -> None:
    def rounds(*ttfts: float) -> list[dict[str, float]]:
        return [dict.fromkeys(load_generators.NUMBERS, 10.0) | {"TTFT P50 ms": t} for t in ttfts]

    runs = {load_generators.OURS: rounds(9, 10, 90), load_generators.THEIRS: rounds(8, 9, 9.1)}
    found = load_generators.ratios(runs)
    assert found == dict.fromkeys(load_generators.NUMBERS, 1.0) | {"TTFT P50 ms": 10 / 9}
    console = Console(record=True, width=120)
    console.print(load_generators.table(runs))
    last = console.export_text().rstrip().splitlines()[-1]
    assert "1.111 !" in last
    assert last.count("!") == 1
