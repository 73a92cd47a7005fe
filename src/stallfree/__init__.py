"""stallfree: an LLM server that never pauses a running answer (Sarathi-Serve, OSDI'24)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stallfree.core.sampling_params import SamplingParams
    from stallfree.engine.llm import LLM

# Idle threads of PyTorch's pool look for work for about 50 us, then sleep: looking on for
# milliseconds, as they otherwise do, takes a core from the server. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: the command line needs no torch."""
    if name == "LLM":
        from stallfree.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from stallfree.core.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
