"""How long iterations take on this machine: measured once, fitted, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stallfree.cache import atomic_file, cache_folder
from stallfree.core.blocks import BlockPool
from stallfree.core.step_time import BatchShape, StepTimeModel, fit
from stallfree.engine.facts import EngineFacts
from stallfree.engine.profile_batches import Composition, grid, hybrid, measure
from stallfree.errors import ConfigError, ModelError
from stallfree.executor.output import Executor
from stallfree.kernels.jit import source_hash

_FORMAT = 2
ROUNDS = 2
_NUM_HYBRID, _HYBRID_SEED = 12, 0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of an engine's iterations.

    Attributes:
        times: seconds of a batch.
        tile_tokens: what matrix kernels were found to round rows up to; 1: nothing, or not looked
            for.
    """

    times: StepTimeModel
    tile_tokens: int = 1


def cached_profile(facts: EngineFacts) -> Profile | None:
    """The profile of such an engine that an earlier start measured."""
    return _read(_path(_identity(facts)))


def measure_profile(
    executor: Executor,
    pool: BlockPool,
    facts: EngineFacts,
    on_batch: Callable[[int, int], None] | None = None,
    rounds: int = ROUNDS,
    *,
    finds_tile: bool = False,
) -> Profile:
    """Measure how long iterations take here, now, and keep it for later starts.

    Args:
        executor: see `measure`.
        pool: see `measure`.
        facts: of the engine.
        on_batch: see `measure`.
        rounds: how often each batch runs.
        finds_tile: whether to look for the tile of the matrix kernels too.
    """
    compositions = grid(facts.max_model_len)
    compositions += hybrid(facts.max_model_len, _NUM_HYBRID, _HYBRID_SEED)
    times = fit(measure(executor, pool, facts.vocab_size, compositions, rounds, on_batch))
    tile = 1
    if finds_tile:
        sizes = [Composition(chunk_tokens=size) for size in tile_sizes(facts.tile_tokens)]
        tile = tile_of(measure(executor, pool, facts.vocab_size, sizes, rounds, on_batch))
    profile = Profile(times, tile)
    try:
        write_profile(_path(_identity(facts)), profile, facts)
    except ConfigError as error:
        _log.warning("the step times are not kept, so the next start measures anew: %s", error)
    return profile


def write_profile(path: Path, profile: Profile, facts: EngineFacts) -> None:
    """Write a profile of the engine with these facts as JSON, its tile being that of its chunks.

    Raises:
        ConfigError: the file cannot be written.
    """
    tile_tokens = max(profile.tile_tokens, facts.tile_tokens)
    content = {"identity": _identity(facts), **asdict(profile), "tile_tokens": tile_tokens}
    text = json.dumps(content, indent=1).encode()
    try:
        with atomic_file(path, len(text)) as file:
            file.write(text)
    except ModelError as error:
        raise ConfigError(f"the profile cannot be written to {path}: {error}") from error


def read_profile(path: Path) -> Profile:
    """Read what `write_profile` wrote.

    Raises:
        ConfigError: it is not there, or is something else.
    """
    profile = _read(path)
    if profile is None:
        raise ConfigError(
            f"{path} holds no profile; make one with `stallfree profile --output {path}`"
        )
    return profile


def tile_sizes(expected: int) -> range:
    """Chunks from which a tile about as large as `expected` can be told."""
    step = max(1, expected // 8)
    return range(2 * expected, 5 * expected + 1, step)


def tile_of(measured: Sequence[tuple[BatchShape, float]]) -> int:
    """What the tokens of a batch seem to be rounded up to: a power of two.

    Of lines over the rounded tokens, the one that is nearest to the least time of each size.
    """
    least: dict[int, float] = {}
    for shape, seconds in measured:
        least[shape.num_tokens] = min(seconds, least.get(shape.num_tokens, seconds))
    if len(least) < 3:
        return 1
    sizes = sorted(least)
    tiles = [1]
    while tiles[-1] * 2 <= sizes[0]:
        tiles.append(tiles[-1] * 2)
    return min(tiles, key=lambda tile: _distance([-(-n // tile) for n in sizes], least, sizes))


def _distance(rounded: Sequence[int], least: dict[int, float], sizes: Sequence[int]) -> float:
    """Sum of squares that the best line over `rounded` leaves."""
    times = [least[size] for size in sizes]
    x, y = sum(rounded) / len(rounded), sum(times) / len(times)
    spread = sum((each - x) ** 2 for each in rounded)
    slope = sum((a - x) * (b - y) for a, b in zip(rounded, times, strict=True)) / (spread or 1.0)
    return sum((b - y - slope * (a - x)) ** 2 for a, b in zip(rounded, times, strict=True))


def _identity(facts: EngineFacts) -> dict[str, object]:
    """All that the speed of an engine depends on."""
    return {
        "model": facts.model_name,
        "parameters": facts.num_parameters,
        "dtype": facts.dtype,
        "kv_bytes_per_token": facts.kv_cache_bytes // facts.kv_cache_tokens,
        "block_size": facts.block_size,
        "device": facts.device,
        "processor": _processor_name(facts.device),
        "threads": facts.threads,
        "tensor_parallel_size": facts.tensor_parallel_size,
        "pipeline_parallel_size": facts.pipeline_parallel_size,
        "version": version("stallfree"),
        "code": source_hash() if facts.dtype == "int8" else None,
    }


def _processor_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _path(identity: dict[str, object]) -> Path:
    """Where the profile of an engine is kept."""
    text = json.dumps([_FORMAT, identity], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_folder() / "profiles" / f"{name}.json"


def _read(path: Path) -> Profile | None:
    """The profile in a file; None if there is none, or none that makes sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content["times"].items()
        }
        return Profile(StepTimeModel(**fields), max(1, int(content["tile_tokens"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("measuring anew, for %s is damaged: %s", path, error)
        return None
