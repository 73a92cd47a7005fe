"""Stages of a model that find no memory for a batch: it is run in parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_fixtures import GREEDY, tiny_settings
from poverty import LOAD, POISON, answers, running
from server_fixtures import serve

from stallfree.engine.settings import EngineSettings
from stallfree.errors import OutOfMemoryError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_without_memory_harms_only_what_cannot_run_alone(
    settings: EngineSettings, tmp_path: Path, rank: int
) -> None:
    settings = replace(settings, prefix_caching=False)
    with running(settings, tmp_path, rank, pipeline_parallel_size=2) as (llm, poverty):
        expected = answers(llm.engine, LOAD)
        for most_tokens in (10, 3, 1):
            poverty.set(most_tokens)
            assert answers(llm.engine, LOAD) == expected
        poverty.set(poison=POISON)
        found = answers(llm.engine, {**LOAD, "poisoned": ([1, 2, *[POISON] * 50], GREEDY)})
        [error] = found.pop(("poisoned", 0))
        assert isinstance(error, OutOfMemoryError)
        assert found == expected
        with serve(llm.engine) as server:
            body = {"model": llm.engine.model_name, "prompt": [5, POISON, 6], "max_tokens": 3}
            answer = server.post("/v1/completions", body)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "no memory" in answer.json()["error"]["message"]
            body["prompt"] = [5, 6]
            assert server.post("/v1/completions", body).status_code == 200
