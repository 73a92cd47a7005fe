"""Measuring step times, keeping them, and serving from them, on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny import save_tiny_model
from typer.testing import CliRunner

from stallfree import LLM, SamplingParams
from stallfree.cli.app import app
from stallfree.cli.profile import largest_budget
from stallfree.core.budget import SloBudget
from stallfree.core.step_time import BatchShape, StepTimeModel
from stallfree.engine.flags import parse_duration
from stallfree.engine.profile import tile_of, tile_sizes
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError

KV_BYTES = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    return save_tiny_model(tmp_path / "model", "llama")


def budget_of(llm: LLM) -> SloBudget:
    budget = llm.engine.scheduler.budget
    assert isinstance(budget, SloBudget)
    return budget


def load(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", tbt_slo_s=0.2, kv_cache_memory_bytes=KV_BYTES)


def test_the_first_start_measures_and_later_ones_read(folder: Path, tmp_path: Path) -> None:
    first = budget_of(load(folder)).predictor.model
    [file] = (tmp_path / "cache" / "profiles").iterdir()
    assert first.seconds(BatchShape(1, 0, 1, 1)) > 0
    assert budget_of(load(folder)).predictor.model == first
    file.write_text('{"model": {"base_s": -1}}')
    made_anew = budget_of(load(folder)).predictor.model
    assert made_anew.seconds(BatchShape(1, 0, 1, 1)) > 0
    assert budget_of(load(folder)).predictor.model == made_anew


def test_answers_are_those_of_a_static_budget_and_teach_the_predictor(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [list(range(100, 100 + size)) for size in (3, 90, 40)]
    static = LLM(str(folder), dtype="float32", token_budget=16, kv_cache_memory_bytes=KV_BYTES)
    driven = load(folder)
    answers = [
        [output.outputs[0].token_ids for output in llm.generate(prompts, params, False)]
        for llm in (static, driven)
    ]
    assert answers[0] == answers[1]
    assert budget_of(driven).predictor.speed != 1.0


def test_profile_prints_its_tables(folder: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "profile",
            str(folder),
            "--dtype",
            "float32",
            "--rounds",
            "1",
            "--kv-cache-memory",
            "1MiB",
        ],
    )
    assert result.exit_code == 0, result.output
    for words in ("an iteration by its tokens", "median error", "tile", "static budgets"):
        assert words in result.output


def test_profile_writes_what_it_found_and_a_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made, picture = tmp_path / "made.json", tmp_path / "curve.png"
    arguments = ["profile", str(folder), "--dtype", "float32", "--rounds", "1"]
    arguments += ["--kv-cache-memory", "1MiB", "--output", str(made), "--picture", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(made.read_text())
    assert content["identity"]["dtype"] == "float32"
    assert StepTimeModel(**{**content["times"], "knots": tuple(content["times"]["knots"])})
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tile", [1, 4, 16])
def test_a_tile_is_found_in_times_that_rise_by_it(tile: int) -> None:
    rng = random.Random(tile)
    sizes = tile_sizes(8)
    measured = [
        (BatchShape(n), (0.01 + 0.002 * (-(-n // tile) * tile)) * rng.uniform(1, 1.01))
        for n in sizes
        for _ in range(3)
    ]
    assert tile_of(measured) == tile
    assert tile_of(measured[:2]) == 1


@pytest.mark.parametrize(
    ("target_s", "budget"), [(0.009, None), (0.05, 40), (0.0999, 88), (1000.0, 8184)]
)
def test_the_largest_budget_within_a_target(target_s: float, budget: int | None) -> None:
    model = StepTimeModel(0.01, (1, 2), (0.001,), 0, 0, 0)  # 9 + n milliseconds
    assert largest_budget(model, target_s, tile_tokens=8) == budget


def test_tiers_have_the_servers_targets_where_they_have_none_of_their_own() -> None:
    settings = EngineSettings(
        tbt_slo_s=0.2, ttft_slo_s=5.0, tier=("priority:tbt=100ms", "flex:ttft=60s")
    )
    made = {name: (targets.tbt_s, targets.ttft_s) for name, targets in settings.tiers.items()}
    assert made == {"priority": (0.1, 5.0), "default": (0.2, 5.0), "flex": (None, 60.0)}


@pytest.mark.parametrize(("text", "seconds"), [("200ms", 0.2), ("0.2s", 0.2), ("1.5", 1.5)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1s", "1h", "1 2"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="200ms"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tbt_slo_s": 0.2, "token_budget": 64}, "give one of them"),
        ({"tbt_slo_s": 0.0}, "at least 0.001"),
        ({"tbt_slo_s": 0.2, "scheduler": "orca"}, "use sarathi"),
        ({"tbt_slo_s": 0.2, "scheduler": "simple_chunking"}, "use sarathi"),
        ({"tier": ("gold:tbt=1s",)}, "begin with one of"),
        ({"tier": ("priority:speed=1s",)}, "write it as priority:tbt=100ms,ttft=2s"),
        ({"tier": ("flex",)}, "write it as flex:ttft=2s"),
        ({"tier": ("flex:tbt=1s",), "tbt_slo_s": 1.0}, "so it has no tbt"),
        ({"tier": ("priority:tbt=100ms",)}, "there is no tbt_slo"),
        ({"tier": ("priority:ttft=1s", "priority:tbt=1s"), "tbt_slo_s": 1.0}, "given twice"),
        ({"admit_within_slo": 1.5}, "without tbt_slo"),
        ({"max_queued_requests": 0}, "at least 1"),
        ({"prefill_order": "lifo"}, "one of fcfs, edf, srpf"),
    ],
)
def test_targets_that_cannot_be_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineSettings(**settings)  # type: ignore[arg-type]
