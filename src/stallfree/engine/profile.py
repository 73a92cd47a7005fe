"""Measuring how long iterations take on this machine, and keeping the result on disk.

The batches are made up: random tokens at chosen contexts, in the blocks of a cache that nobody
uses yet. What a policy would have chosen plays no part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stallfree.cache import atomic_file, cache_folder
from stallfree.core.batch import Batch, Chunk
from stallfree.core.blocks import BlockPool
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.step_time import BatchShape, StepTimeModel, fit
from stallfree.engine.facts import EngineFacts
from stallfree.errors import ModelError
from stallfree.executor.output import Executor

_FORMAT = 1
ROUNDS = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Composition:
    """A batch to measure.

    Attributes:
        decodes: the context of each decode, its new token included.
        chunk_start, chunk_tokens: a chunk beside them; 0 tokens for none.
    """

    decodes: tuple[int, ...] = ()
    chunk_start: int = 0
    chunk_tokens: int = 0


def cached_times(facts: EngineFacts) -> StepTimeModel | None:
    """How long iterations of such an engine take, as an earlier start measured it."""
    return _read(_path(_identity(facts)))


def measure_times(
    executor: Executor,
    pool: BlockPool,
    facts: EngineFacts,
    on_batch: Callable[[int, int], None] | None = None,
    rounds: int = ROUNDS,
) -> StepTimeModel:
    """How long iterations take here, measured now and kept for later starts.

    Args:
        executor: see `measure`.
        pool: see `measure`.
        facts: of the engine.
        on_batch: see `measure`.
        rounds: how often each batch runs.
    """
    compositions = grid(facts.max_model_len)
    model = fit(measure(executor, pool, facts.vocab_size, compositions, rounds, on_batch))
    identity = _identity(facts)
    _write(_path(identity), model, identity)
    return model


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
        "version": version("stallfree"),
    }


def _processor_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def grid(max_context: int) -> list[Composition]:
    """Batches from which the costs of tokens, contexts and samples can be told apart."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    made = [Composition(decodes=(64,) * size) for size in sizes]
    made += [Composition(chunk_tokens=size) for size in (8, 16, 32, 64, 96, 128, 256)]
    made += [
        Composition(decodes=(context,) * size)
        for size, context in ((1, 2000), (8, 1000), (8, 3000), (16, 500))
    ]
    made += [
        Composition(chunk_start=start, chunk_tokens=size)
        for start, size in ((1000, 32), (1000, 96), (3000, 32), (3000, 96), (3000, 256))
    ]
    made += [
        Composition((200,) * size, start, chunk)
        for size, start, chunk in ((4, 500, 28), (8, 0, 40), (8, 2000, 56), (16, 1000, 80))
    ]
    longest = max_context - 1
    fitting = [
        each
        for each in made
        if max((each.chunk_start + each.chunk_tokens, *each.decodes)) <= longest
    ]
    return fitting or [Composition(decodes=(1,)), Composition(chunk_tokens=longest)]


def measure(
    executor: Executor,
    pool: BlockPool,
    vocab_size: int,
    compositions: Sequence[Composition],
    repeats: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[tuple[BatchShape, float]]:
    """Run batches in rounds, so that a change of the machine's speed meets them all alike.

    Args:
        executor: its cache is overwritten.
        pool: says how many blocks there are; nothing is allocated from it.
        vocab_size: of the random tokens.
        compositions: those that do not fit into the cache are left out.
        repeats: rounds; one more comes first and does not count.
        on_batch: called with how many batches of how many have run.

    Returns:
        Each batch's shape and the seconds that it took, once for each round.
    """
    batches = [batch for each in compositions if (batch := _batch(each, pool, vocab_size))]
    measured = []
    total = len(batches) * (repeats + 1)
    for run in range(total):
        batch = batches[run % len(batches)]
        started = time.perf_counter()
        executor.execute(batch)
        seconds = time.perf_counter() - started
        if run >= len(batches):
            measured.append((BatchShape.of(batch), seconds))
        if on_batch is not None:
            on_batch(run + 1, total)
    return measured


def _batch(composition: Composition, pool: BlockPool, vocab_size: int) -> Batch | None:
    """The batch, each of its requests in blocks of its own; None if there are not enough."""
    rng = random.Random(0)
    chunks: list[Chunk] = []
    next_block = 0
    parts = [(context - 1, 1, True) for context in composition.decodes]
    if composition.chunk_tokens:
        parts.append((composition.chunk_start, composition.chunk_tokens, False))
    for start, num_tokens, is_decode in parts:
        stop = start + num_tokens
        tokens = rng.choices(range(vocab_size), k=max(1, stop - is_decode))
        params = SamplingParams(temperature=0, max_tokens=2)
        request = Request(f"profile-{len(chunks)}", tokens, params, max_tokens=2)
        if is_decode:
            request.output_token_ids.append(rng.randrange(vocab_size))
        blocks = pool.blocks_for(request.num_tokens)
        request.block_table = list(range(next_block, next_block + blocks))
        request.num_computed_tokens = request.num_tokens - num_tokens
        next_block += blocks
        chunks.append(
            Chunk(
                request, request.num_computed_tokens, num_tokens, samples=True, is_decode=is_decode
            )
        )
    return Batch(tuple(chunks)) if next_block <= pool.num_blocks else None


def _path(identity: dict[str, object]) -> Path:
    """Where the profile of an engine is kept."""
    text = json.dumps([_FORMAT, identity], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_folder() / "profiles" / f"{name}.json"


def _read(path: Path) -> StepTimeModel | None:
    """The model in a file; None if there is none, or none that makes sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["model"]
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return StepTimeModel(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("measuring anew, for %s is damaged: %s", path, error)
        return None


def _write(path: Path, model: StepTimeModel, identity: dict[str, object]) -> None:
    """Keep a profile, if the cache folder can be written."""
    content = json.dumps({"identity": identity, "model": asdict(model)}, indent=1).encode()
    try:
        with atomic_file(path, len(content)) as file:
            file.write(content)
    except ModelError as error:
        _log.warning("the step times are not kept, so the next start measures them anew: %s", error)
