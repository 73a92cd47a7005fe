"""The setting of what is kept of requests that have ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stallfree.engine.flags import Flag
from stallfree.engine.parallel_settings import ParallelSettings


@dataclass(frozen=True, slots=True)
class CachingSettings(ParallelSettings):
    """The part of `EngineSettings` that says what is computed once; it follows that of processes.

    Raises:
        ConfigError: see `ParallelSettings`.
    """

    prefix_caching: Annotated[
        bool,
        Flag(
            "Keep the KV of prompts and answers while nobody needs the memory, and read what a "
            "later prompt begins with from there. orca and faster_transformer never do.",
            "",
            panel="Memory",
        ),
    ] = True
