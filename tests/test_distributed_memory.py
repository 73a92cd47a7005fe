"""Processes of a model that find no memory for a batch: it is run in parts, or starts them anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import GREEDY, tiny_settings
from server_fixtures import serve

from stallfree import LLM, SamplingParams
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings
from stallfree.errors import OutOfMemoryError
from stallfree.executor.launch import LocalLauncher, LocalProcess
from stallfree.executor.messages import WorkerSpec

SCRIPT = Path(__file__).with_name("poor_worker.py")
POISON = 77
LOAD: dict[str, tuple[list[int], SamplingParams]] = {
    "short": ([1, 2, 3], GREEDY),
    "long": ([5, 6, 7, 8, 9] * 20, replace(GREEDY, prompt_logprobs=0, logprobs=1)),
    "drawn": ([4, 4], SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)),
    "several": ([9] * 20, SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9)),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"))


class Poverty:
    """The limits of the workers of one rank."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set()

    def set(self, most_tokens: int = 1 << 30, poison: int = -1) -> None:
        self.file.write_text(json.dumps({"most_tokens": most_tokens, "poison": poison}))


@contextmanager
def running(
    settings: EngineSettings, folder: Path, rank: int, **changes: Any
) -> Iterator[tuple[LLM, Poverty]]:
    """A model in processes, one of which may be poor."""
    poverty = Poverty(folder / "limits.json")
    prefix = (sys.executable, str(SCRIPT), str(poverty.file))

    def start(_: LocalLauncher, spec: WorkerSpec) -> LocalProcess:
        return LocalProcess(spec, prefix if spec.rank == rank else ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLauncher, "start", start)
        llm = LLM.from_settings(replace(settings, **changes))
        try:
            yield llm, poverty
        finally:
            llm.close()


def answers(engine: Engine, load: dict[str, tuple[list[int], SamplingParams]]) -> Any:
    """All tokens and log probabilities of requests that run together, or why they failed."""
    for name, (prompt, params) in load.items():
        engine.add(name, prompt, params)
    found: dict[tuple[str, int], list[Any]] = {}
    while engine.has_requests:
        for delta in engine.step():
            own = found.setdefault((delta.request_id, delta.index), [])
            positions = [*(delta.prompt_logprobs or ()), *(delta.logprobs or ())]
            logprobs = [None if each is None else round(each.logprob, 3) for each in positions]
            own.append(delta.error or (delta.token_ids, delta.text, logprobs))
            engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return found


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


def test_shares_of_layers_start_anew_and_a_request_that_always_fails_finds_no_memory(
    settings: EngineSettings, tmp_path: Path
) -> None:
    sizes = {"tensor_parallel_size": 2, "restart_workers": True}
    with running(settings, tmp_path, 1, **sizes) as (llm, poverty):
        poverty.set(poison=POISON)
        found = answers(llm.engine, {"poisoned": ([1, POISON, 2], GREEDY)})
        [error] = found["poisoned", 0]
        assert isinstance(error, OutOfMemoryError)
        assert "again and again" in str(error)
        assert llm.generate([[1, 2]], GREEDY)[0].outputs[0].finish_reason == "length"
