"""Published step times of Yi-34B on two A100, against a fit to part of them and the roofline.

The Sarathi-Serve artifact holds four files: prefills, batches of decodes, one hybrid batch, and the
time of prompts cut into chunks. A model is fitted to three and predicts the fourth. What attention
costs cannot be told from prefills alone, each of which has one context; it is the roofline's.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from systems import ARTIFACT, SYSTEMS

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.step_time import BatchShape, StepTimeModel, chunk_context, fit
from stallfree.sim.roofline import Roofline

FILES = ("prefill", "decode", "hybrid", "chunking_overhead")
OUTLIER_TOKENS = 256  # the artifact's time for it is above that of 512 tokens
_DECODE_CONTEXT = 1024  # is not published


@dataclass(frozen=True, slots=True)
class Point:
    """One published time.

    Attributes:
        file: where from, of `FILES`.
        name: what ran, for people.
        chunks: tokens of each iteration's chunk, one after the other through a prompt.
        decodes: beside each of them.
        seconds: of all iterations together.
    """

    file: str
    name: str
    chunks: tuple[int, ...]
    decodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published time, and what was predicted; in ms."""

    file: str
    name: str
    published_ms: float
    held_out_ms: float
    roofline_ms: float


def read_points(folder: Path) -> list[Point]:
    """All published times, without the outlier."""
    points = []
    for row in _rows(folder, "prefill"):
        tokens = int(row["batch_num_tokens"])
        if tokens != OUTLIER_TOKENS:
            seconds = float(row["batch_execution_time"])
            points.append(Point("prefill", f"prefill of {tokens:,}", (tokens,), 0, seconds))
    for row in _rows(folder, "decode"):
        count = int(row["batch_num_tokens"])
        seconds = float(row["batch_execution_time"])
        points.append(Point("decode", f"{count} decodes", (), count, seconds))
    for row in _rows(folder, "hybrid"):
        prefill, decodes = int(row["batch_num_prefill_tokens"]), int(row["batch_num_decode_tokens"])
        name = f"{prefill:,} tokens beside {decodes} decodes"
        chunks: tuple[int, ...] = (prefill,) if prefill else ()
        points.append(
            Point("hybrid", name, chunks, decodes, float(row["batch_execution_time"]) / 1e3)
        )
    for row in _rows(folder, "chunking_overhead"):
        length, size = int(row["prefill_length"]) + 1, int(row["chunk_size"])
        chunks = tuple(min(size, length - start) for start in range(0, length, size))
        seconds = float(row["prefill_execution_time"]) / 1e3
        name = f"{length:,} in chunks of {size:,}" if size < length else f"{length:,} at once"
        points.append(Point("chunking_overhead", name, chunks, 0, seconds))
    return points


def _rows(folder: Path, name: str) -> Sequence[Mapping[str, str]]:
    with (folder / f"yi34b_2xa100_{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def compare(points: Sequence[Point]) -> list[Comparison]:
    """Each point against a fit to the other three files, and the roofline with the overhead."""
    roofline = SYSTEMS["Yi-34B"].times(ARTIFACT)
    fits = {file: fit_times([p for p in points if p.file != file], roofline) for file in FILES}
    return [
        Comparison(
            point.file,
            point.name,
            point.seconds * 1e3,
            1e3 * sum(fits[point.file].seconds(shape) for shape in _shapes(point)),
            1e3 * sum(sum(roofline.seconds(batch)) for batch in _batches(point)),
        )
        for point in points
    ]


def fit_times(points: Sequence[Point], roofline: Roofline) -> StepTimeModel:
    """A step-time model of published times, with the roofline's cost of attention."""
    attention_s = _attention_s(roofline)
    samples = []
    for point in points:
        shapes = _shapes(point)
        known_s = attention_s * sum(shape.prefill_context for shape in shapes)
        each_s = max(1e-4, (point.seconds - known_s) / len(shapes))
        samples += [(replace(shape, prefill_context=0), each_s) for shape in shapes]
    return replace(fit(samples), prefill_context_s=attention_s)


def _attention_s(roofline: Roofline) -> float:
    """Seconds for a token of a chunk to attend to one token."""
    model, own = roofline.model, roofline.efficiency
    operations = 4 * model.heads * model.head_dim * model.layers
    return operations / (roofline.tensor_parallel * roofline.device.flops_per_s * own.attention)


def _shapes(point: Point) -> list[BatchShape]:
    starts = [sum(point.chunks[:place]) for place in range(len(point.chunks))]
    chunks = list(zip(starts, point.chunks, strict=True)) or [(0, 0)]
    return [
        BatchShape(tokens + point.decodes, chunk_context(start, tokens), 0, point.decodes)
        for start, tokens in chunks
    ]


def _batches(point: Point) -> list[Batch]:
    request = Request("published", (0,), SamplingParams(), max_tokens=1)
    decodes = [Chunk(request, _DECODE_CONTEXT, 1, samples=True, is_decode=True)] * point.decodes
    starts = [sum(point.chunks[:place]) for place in range(len(point.chunks))]
    return [
        Batch([*decodes, Chunk(request, start, tokens, samples=False, is_decode=False)])
        for start, tokens in zip(starts, point.chunks, strict=True)
    ] or [Batch(decodes)]
