"""Models in processes, one of which may find no memory for a batch, and what is asked of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import GREEDY

from stallfree import LLM, SamplingParams
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings
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


class Poverty:
    """The limits of the workers of one rank: see `poor_worker.py`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set()

    def set(self, most_tokens: int = 1 << 30, poison: int = -1, place: str = "forward") -> None:
        limits = {"most_tokens": most_tokens, "poison": poison, "place": place}
        self.file.write_text(json.dumps(limits))


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
