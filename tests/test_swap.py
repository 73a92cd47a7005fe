"""Preemption by swapping on tiny real models: no token changes, and less is computed again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Failing, tiny_settings
from swap_fixtures import add_all, answers, small

from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.meter import Meter
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError, CopyError
from stallfree.executor.swap_store import CopyTimes, SwapStore


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying is taken to be faster than anything that a tiny model does."""
    monkeypatch.setattr(SwapStore, "measure", lambda self: CopyTimes(1e-12, 1e-12))


def measured(settings: EngineSettings) -> tuple[dict[str, list[int]], Engine, int]:
    """The answers of an engine, it, and how many tokens it read."""
    engine = build_engine(settings, show_progress=False)
    meter = Meter()
    engine.observers.add(meter)
    return answers(engine), engine, meter.counts.num_prompt_tokens


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_preemptions_and_aborts_change_no_token(tmp_path: Path, dtype: str, caches: bool) -> None:
    settings = small(tmp_path / "model", dtype, prefix_caching=caches)
    roomy = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    again, recomputing, num_read = measured(settings)
    assert again == roomy
    assert recomputing.scheduler.preemptions["memory"] > 0
    assert not recomputing.scheduler.swapped.total()
    for folder in (None, tmp_path):
        given, engine, num_read_here = measured(
            replace(settings, preemption_mode="swap", swap_space_bytes=1 << 20, swap_dir=folder)
        )
        assert given == roomy
        scheduler = engine.scheduler
        assert 0 < scheduler.swapped["memory"] <= scheduler.preemptions["memory"]
        assert scheduler.swap is not None
        assert scheduler.swap.num_in > 0
        assert scheduler.swap.num_out > 0
        assert scheduler.swap.num_used == 0
        assert num_read_here < num_read


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("fails_at", ["out", "in"])
def test_a_swap_space_that_fails_costs_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    settings = small(tmp_path / "model")
    roomy = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    true_copy, failures = SwapStore.copy, []

    def copy(
        self: SwapStore, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]
    ) -> None:
        if ins if fails_at == "in" else outs:
            failures.append((outs, ins))
            raise CopyError("the disk is gone")
        true_copy(self, outs, ins)

    monkeypatch.setattr(SwapStore, "copy", copy)
    given, engine, _ = measured(replace(settings, preemption_mode="swap", swap_space_bytes=1 << 20))
    assert given == roomy
    assert len(failures) == 1  # nothing is copied after that
    assert engine.scheduler.preemptions["lost"] > 0
    assert engine.scheduler.swap is not None
    assert engine.scheduler.swap.num_used == 0


def test_nothing_is_kept_that_is_computed_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SwapStore, "measure", lambda self: CopyTimes(1e3, 1e3))
    with caplog.at_level(logging.INFO):
        _, engine, _ = measured(small(tmp_path, preemption_mode="swap", swap_space_bytes=1 << 20))
    assert "one is copied out in 1000000.000 ms and in in 1000000.000 ms" in caplog.text
    scheduler = engine.scheduler
    assert scheduler.preemptions["memory"] > 0
    assert scheduler.swapped["memory"] == 0
    assert scheduler.swap is not None
    assert scheduler.swap.num_out == scheduler.swap.num_in == 0


@pytest.mark.usefixtures("cheap")
def test_a_target_is_kept_beside_copies(tmp_path: Path) -> None:
    settings = replace(small(tmp_path), token_budget=None, tbt_slo_s=0.5)
    expected, recomputing, _ = measured(settings)
    given, engine, _ = measured(replace(settings, preemption_mode="swap"))
    assert given == expected
    assert recomputing.scheduler.preemptions["memory"] > 0
    assert engine.scheduler.swapped["memory"] > 0


@pytest.mark.usefixtures("cheap")
def test_a_batch_that_fails_loses_nothing_of_others(tmp_path: Path) -> None:
    """As it runs, once and for all: whatever was copied before is right in what goes on."""
    settings = small(tmp_path, preemption_mode="swap")
    expected = answers(build_engine(settings))
    engine = build_engine(settings)
    failing = engine.executor = Failing(engine)
    add_all(engine)
    given: dict[str, list[int]] = {}
    failed = set()
    steps = 0
    while engine.has_requests:
        failing.fails = steps in (25, 60, 61, 90)
        for delta in engine.step():
            if delta.error is not None:
                failed.add(delta.request_id)
            if delta.index == 0:
                given.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.scheduler.check_integrity()
        steps += 1
    assert failed
    assert engine.scheduler.swap is not None
    assert engine.scheduler.swap.num_in > 0
    assert engine.scheduler.swap.num_used == 0
    whole = [name for name in expected if name not in failed]
    assert whole
    for name in whole:
        assert given[name] == expected[name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preemption_mode": "keep"}, "preemption_mode is 'keep'; it must be one of recompute, s"),
        ({"swap_space_bytes": 1 << 30}, "swap_space is 1073741824, but nothing is swapped: give"),
        ({"swap_dir": Path("x")}, "swap_dir is x, but nothing is swapped: give preemption_mode"),
        ({"preemption_mode": "swap", "swap_space_bytes": 0}, "swap_space_bytes is 0; it must be"),
        ({"preemption_mode": "swap", "scheduler": "orca"}, "preemption_mode swap is of no use wi"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineSettings(**fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("size", "message"),
    [(1 << 50, "free beside the KV cache: lower it"), (100, "one block of 16 tokens takes")],
)
def test_a_swap_space_that_does_not_fit_is_refused(tmp_path: Path, size: int, message: str) -> None:
    settings = replace(tiny_settings(tmp_path), preemption_mode="swap", swap_space_bytes=size)
    with pytest.raises(ConfigError, match=message):
        build_engine(settings, show_progress=False)


def test_the_swap_space_is_as_large_as_the_kv_cache(tmp_path: Path) -> None:
    settings = replace(tiny_settings(tmp_path / "model"), preemption_mode="swap")
    for folder in (None, tmp_path):
        engine = build_engine(replace(settings, swap_dir=folder), show_progress=False)
        assert engine.scheduler.swap is not None
        assert engine.scheduler.swap.num_slots == engine.scheduler.pool.num_blocks
