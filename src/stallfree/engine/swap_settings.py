"""The settings of what happens to the KV of requests that are preempted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stallfree.core.policies import POLICIES
from stallfree.engine.caching_settings import CachingSettings
from stallfree.engine.flags import Flag, check_choice, check_range, parse_bytes
from stallfree.errors import ConfigError

PREEMPTION_MODES = ("recompute", "swap")


@dataclass(frozen=True, slots=True)
class SwapSettings(CachingSettings):
    """The part of `EngineSettings` that says where preempted requests are kept, if anywhere.

    Raises:
        ConfigError: a value is out of range, or of no use with the others.
    """

    preemption_mode: Annotated[
        str,
        Flag(
            "What becomes of the KV of a request that is preempted for want of memory: "
            f"{', '.join(PREEMPTION_MODES)}. swap keeps what would be overwritten, where copying "
            "it is predicted to be faster than computing it again.",
            "MODE",
            panel="Memory",
        ),
    ] = "recompute"
    swap_space_bytes: Annotated[
        int | None,
        Flag(
            "Most KV of preempted requests that is kept: 2GiB, 512MiB, 1.5GB or plain bytes.",
            "BYTES",
            name="swap_space",
            unset="as much as the KV cache, but at most half of the memory that is left; copies "
            "of the model share that",
            parse=parse_bytes,
            panel="Memory",
        ),
    ] = None
    swap_dir: Annotated[
        Path | None,
        Flag(
            "Folder of a file that it is kept in. Its room is taken at the start, and nothing is "
            "left of it after the end.",
            "FOLDER",
            unset="host memory",
            panel="Memory",
        ),
    ] = None

    def __post_init__(self) -> None:
        CachingSettings.__post_init__(self)
        check_choice("preemption_mode", self.preemption_mode, PREEMPTION_MODES)
        check_range("swap_space_bytes", self.swap_space_bytes, 1)
        if not self.swaps:
            for name, value in (
                ("swap_space", self.swap_space_bytes),
                ("swap_dir", self.swap_dir),
            ):
                if value is not None:
                    raise ConfigError(
                        f"{name} is {value}, but nothing is swapped: give preemption_mode swap too"
                    )
            return
        if POLICIES[self.scheduler].reserves_context:
            raise ConfigError(
                f"preemption_mode swap is of no use with scheduler {self.scheduler!r}, which "
                "reserves memory for whole contexts and preempts nobody; use sarathi"
            )
        if self.swap_dir is not None and not hasattr(os, "posix_fallocate"):
            raise ConfigError("swap_dir is not possible on this system; leave it out")

    @property
    def swaps(self) -> bool:
        """Whether preempted requests may be kept."""
        return self.preemption_mode == "swap"
