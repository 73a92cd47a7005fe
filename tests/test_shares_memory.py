"""Processes that share layers, of which one finds no memory: its peers do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import GREEDY, tiny_settings
from poverty import LOAD, POISON, Poverty, answers, running
from test_distributed import workers

from stallfree import LLM
from stallfree.engine.settings import EngineSettings
from stallfree.errors import OutOfMemoryError
from stallfree.model.int8 import is_supported

INT8 = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return replace(tiny_settings(tmp_path_factory.mktemp("model")), prefix_caching=False)


def check(llm: LLM, poverty: Poverty, places: Sequence[str]) -> None:
    """Whatever batches fail, and wherever they do, answers are the same and nobody is lost."""
    processes = [each.pid for each in workers(llm)]
    expected = answers(llm.engine, LOAD)
    for place in places:
        poverty.set(most_tokens=3, place=place)
        assert answers(llm.engine, LOAD) == expected
        poverty.set(poison=POISON, place=place)
        found = answers(llm.engine, {**LOAD, "poisoned": ([1, 2, *[POISON] * 20], GREEDY)})
        *_, error = found.pop(("poisoned", 0))
        assert isinstance(error, OutOfMemoryError)
        assert found == expected
    assert [each.pid for each in workers(llm)] == processes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_without_memory_harms_only_what_cannot_run_alone(
    settings: EngineSettings, tmp_path: Path, rank: int
) -> None:
    with running(settings, tmp_path, rank, tensor_parallel_size=2) as (llm, poverty):
        check(llm, poverty, ["forward", "layer", "logits", "sampling"])


@INT8
def test_an_int8_share_that_finds_no_scratch_memory(
    settings: EngineSettings, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"dtype": "int8", "tensor_parallel_size": 2}
    with running(settings, tmp_path, 1, **sizes) as (llm, poverty):
        check(llm, poverty, ["forward", "scratch"])


@pytest.mark.parametrize(("rank", "place"), [(1, "layer"), (2, "logits")])
def test_a_share_of_a_stage_that_finds_none(
    settings: EngineSettings, tmp_path: Path, rank: int, place: str
) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with running(settings, tmp_path, rank, **sizes) as (llm, poverty):
        check(llm, poverty, [place])


def test_a_share_that_leaves_its_peers_waiting_is_started_anew_with_them(
    settings: EngineSettings, tmp_path: Path
) -> None:
    """It has no memory even for making up what they wait for."""
    sizes = {"tensor_parallel_size": 2, "restart_workers": True}
    with running(settings, tmp_path, 1, **sizes) as (llm, poverty):
        poverty.set(poison=POISON, place="making up")
        found = answers(llm.engine, {"poisoned": ([1, POISON, 2], GREEDY)})
        [error] = found["poisoned", 0]
        assert isinstance(error, OutOfMemoryError)
        assert "again and again" in str(error)
        assert llm.generate([[1, 2]], GREEDY)[0].outputs[0].finish_reason == "length"
