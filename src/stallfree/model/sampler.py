"""From logits to tokens, for all rows of a batch together.

Random numbers come from a counter: the n-th token of a request uses a hash of (seed, n). So a
seeded request draws the same tokens whatever runs beside it, and after a preemption too.
Legend of shapes: R rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from stallfree.core.counter_random import uniform
from stallfree.core.sampling_params import SamplingParams
from stallfree.model.draw import BLOCK, column, draw, draw_cut, in_blocks

_DRAWN_AT_ONCE = 8  # rows whose probabilities are held: more is slower, and memory goes up and down


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know about one row.

    Attributes:
        params: as the request gave them.
        seed: of the request's random numbers.
        num_output_tokens: how many were sampled before.
        prompt_token_ids, output_token_ids: for penalties; empty where none looks at them.
        end_token_ids: forbidden while `min_tokens` is not reached.
    """

    params: SamplingParams
    seed: int
    num_output_tokens: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    end_token_ids: frozenset[int]


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[int | None]:
    """One token for each row of `logits` float32 (R, V), which may be overwritten.

    A row whose logits are not finite numbers, as with broken weights, gets None; the others are
    not affected.
    """
    _adjust(logits, rows)
    tokens, tops = _likeliest_each(logits)
    broken = ~torch.isfinite(tops)
    drawn: dict[bool, list[int]] = {False: [], True: []}  # by whether cuts are asked for
    for index, (row, is_broken) in enumerate(zip(rows, broken.tolist(), strict=True)):
        if not (row.params.is_greedy or is_broken):
            drawn[_cuts(row.params)].append(index)
    for cuts, indices in drawn.items():
        for first in range(0, len(indices), _DRAWN_AT_ONCE):
            some = indices[first : first + _DRAWN_AT_ONCE]
            chosen, own = torch.tensor(some, device=logits.device), [rows[index] for index in some]
            probs = _probabilities(logits[chosen], tops[chosen], own)
            uniforms = _uniforms(own, probs)
            params = [row.params for row in own]
            tokens[chosen] = draw_cut(probs, uniforms, params) if cuts else draw(probs, uniforms)
    tokens[broken] = -1
    return [token if token >= 0 else None for token in tokens.tolist()]


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of a row (V,) with their log probabilities."""
    if count == 0:
        return ()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _adjust(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    """Apply penalties, biases and `min_tokens` to `logits` (R, V), in place."""
    _penalize_repetition(logits, rows)
    _penalize_output(logits, rows)
    biased = _pairs({index: list(row.params.logit_bias) for index, row in enumerate(rows)}, logits)
    if biased is not None:
        values = [bias for row in rows for bias in row.params.logit_bias.values()]
        logits[biased] += torch.tensor(values, device=logits.device)
    forbidden = _pairs({index: _forbidden(row) for index, row in enumerate(rows)}, logits)
    if forbidden is not None:
        logits[forbidden] = -torch.inf


def _penalize_repetition(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    penalized = {i: row for i, row in enumerate(rows) if row.params.repetition_penalty != 1}
    if not penalized:
        return
    seen = torch.zeros(len(penalized), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for index, row in enumerate(penalized.values()):
        seen[index, _distinct(tuple(row.prompt_token_ids)).to(logits.device)] = True
        seen[index, torch.tensor(row.output_token_ids, dtype=torch.int64)] = True
    own = torch.tensor(list(penalized), device=logits.device)
    penalty = column([row.params.repetition_penalty for row in penalized.values()], logits)
    values = logits[own]
    changed = torch.where(values > 0, values / penalty, values * penalty)
    logits[own] = torch.where(seen, changed, values)


def _penalize_output(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    """Take the presence and frequency penalties from the tokens of each output."""
    pairs = _pairs(
        {
            index: row.output_token_ids
            for index, row in enumerate(rows)
            if row.params.presence_penalty or row.params.frequency_penalty
        },
        logits,
    )
    if pairs is None:
        return
    vocab = logits.shape[-1]
    keys, counts = (pairs[0] * vocab + pairs[1]).unique(return_counts=True)
    own = keys // vocab
    presence = column([row.params.presence_penalty for row in rows], logits)[:, 0]
    frequency = column([row.params.frequency_penalty for row in rows], logits)[:, 0]
    logits[own, keys % vocab] -= presence[own] + frequency[own] * counts


def _forbidden(row: SamplerRow) -> list[int]:
    """Tokens that would end the output too early."""
    if row.num_output_tokens >= row.params.min_tokens:
        return []
    ends = () if row.params.ignore_eos else row.end_token_ids
    return [*row.params.stop_token_ids, *ends]


def _pairs(
    token_ids: Mapping[int, Sequence[int]], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and columns of `logits` for the tokens of each row, or None if there are none."""
    columns = [token for ids in token_ids.values() for token in ids]
    if not columns:
        return None
    own = [index for index, ids in token_ids.items() for _ in ids]
    return torch.tensor(own, device=logits.device), torch.tensor(columns, device=logits.device)


@lru_cache(maxsize=256)
def _distinct(prompt_token_ids: tuple[int, ...]) -> torch.Tensor:
    """The different tokens of a prompt, which does not change while its output grows."""
    return torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64)


def _likeliest_each(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the largest of each row of `logits` (R, V), and how large it is.

    By blocks: `argmax` alone reads at a sixth of the speed.
    """
    blocks = in_blocks(logits, -torch.inf)
    block = blocks.amax(dim=-1).argmax(dim=-1)
    own = blocks[torch.arange(len(logits), device=logits.device), block]
    tops, columns = own.max(dim=-1)
    return block * BLOCK + columns, tops


def _probabilities(
    logits: torch.Tensor, tops: torch.Tensor, rows: Sequence[SamplerRow]
) -> torch.Tensor:
    """Of tokens (R, V) at each row's temperature, from logits and the largest of each row."""
    temperature = column([row.params.temperature for row in rows], logits)
    return torch.softmax((logits - tops[:, None]) / temperature, dim=-1)


def _cuts(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _uniforms(rows: Sequence[SamplerRow], like: torch.Tensor) -> torch.Tensor:
    """A number (R, 1) in [0, 1) for the next token of each row."""
    numbers = [uniform(row.seed, row.num_output_tokens) for row in rows]
    return column(numbers, like, torch.float64)
