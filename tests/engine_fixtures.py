"""What the tests of the engine and of its two faces share: a tiny model, and one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import save_tiny_model

from stallfree import SamplingParams
from stallfree.core.batch import Batch
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings
from stallfree.executor.output import ExecutorOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The quick brown fox", "Die Würde", "alpha beta gamma delta river", "x"]


def tiny_settings(folder: Path, architecture: str = "qwen2", **config: Any) -> EngineSettings:
    """Settings of an engine with a tiny model, which is saved to `folder`."""
    save_tiny_model(folder, architecture, initializer_range=0.2, **config)
    return EngineSettings(
        model=str(folder),
        dtype="float32",
        token_budget=16,
        kv_cache_memory_bytes=1 << 20,
        threads=1,
    )


class Failing:
    """An executor whose iterations fail while `fails` says so."""

    def __init__(self, engine: Engine, error: BaseException | None = None) -> None:
        self.executor = engine.executor
        self.error = error or MemoryError("no memory for this batch")
        self.fails = False

    def execute(self, batch: Batch) -> ExecutorOutput:
        if self.fails:
            raise self.error
        return self.executor.execute(batch)
