"""Iterations that the paper names, against the roofline that the simulations run on."""

from __future__ import annotations

from dataclasses import dataclass

from systems import SYSTEMS

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams

STRICT = 5  # decode iterations are in a strict target
DECODES, CONTEXT = 32, 4096
PROMPT = 4096
FALCON = "Falcon-180B"
# A stage's: at the peaks of four A100 both stages together take longer than the published prompt.
FALCON_PROMPT_S, FALCON_DECODE_S = 1.15, 0.2


@dataclass(frozen=True, slots=True)
class Iteration:
    """One that the paper tells of, and ours; in ms."""

    name: str
    published_ms: float
    roofline_ms: float


def compare() -> list[Iteration]:
    """A batch of decodes of each system, and a prompt of Falcon."""
    request = Request("published", (0,), SamplingParams(), max_tokens=1)
    decode = Chunk(request, CONTEXT, 1, samples=True, is_decode=True)
    prompt = Chunk(request, 0, PROMPT, samples=True, is_decode=False)
    own = {name: paper.times() for name, paper in SYSTEMS.items()}
    compared = [
        Iteration(
            f"{name}: {DECODES} decodes at {CONTEXT:,}",
            1e3 * paper.strict_s / STRICT,
            1e3 * sum(own[name].seconds(Batch([decode] * DECODES))),
        )
        for name, paper in SYSTEMS.items()
    ]
    prompt_s = max(own[FALCON].seconds(Batch([prompt])))
    decode_s = max(own[FALCON].seconds(Batch([decode] * DECODES)))
    published_s = (FALCON_PROMPT_S, FALCON_PROMPT_S - FALCON_DECODE_S)
    names = (f"a prompt of {PROMPT:,}, a stage", "the bubble beside a batch of decodes")
    return compared + [
        Iteration(f"{FALCON}: {name}", 1e3 * published, 1e3 * ours)
        for name, published, ours in zip(
            names, published_s, (prompt_s, prompt_s - decode_s), strict=True
        )
    ]
