"""How much memory is free, and how much of it the KV cache takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

# Of the memory that is free once the weights are loaded; a CPU's is for others too.
CPU_SHARE = 0.25
GPU_SHARE = 0.85

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Engines with the same settings that share the memory of this machine.

    Memory that is taken is not missed before it is written to: so who starts beside others counts
    what all of them take, and who starts later finds that theirs is missing.

    Attributes:
        num_engines: how many there are, this one included.
        num_starting: how many of them start now, this one included.
    """

    num_engines: int = 1
    num_starting: int = 1

    @property
    def in_each(self) -> str:
        """What is said after an amount that each of them takes."""
        if self.num_starting == 1:
            return ""
        return f" in each of {self.num_starting} copies of the model on this machine"


ALONE = Neighbours()


def default_share(device: torch.device) -> float:
    """The share of the free memory of `device` that the KV cache takes if nobody says."""
    return CPU_SHARE if device.type == "cpu" else GPU_SHARE


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`, within the limit of a container."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    free = _system_free_bytes()
    limit = _read_number(_CGROUP / "memory.max")
    used = _read_number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _system_free_bytes() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return None
