"""From logits to tokens, for all rows of a batch together.

Random numbers come from a counter: the n-th token of a request uses a hash of (seed, n). So a
seeded request draws the same tokens whatever runs beside it, and after a preemption too.
Legend of shapes: R rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stallfree.core.counter_random import uniform
from stallfree.core.sampling_params import SamplingParams
from stallfree.errors import ExecutorError

_CUT_WIDTHS = (256, 4096)  # likeliest tokens to sort before sorting the whole vocabulary


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler needs to know about one row.

    Attributes:
        params: as the request gave them.
        seed: of the request's random numbers.
        prompt_token_ids, output_token_ids: what penalties look at.
        end_token_ids: forbidden while `min_tokens` is not reached.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    end_token_ids: frozenset[int]


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[int]:
    """One token for each row of `logits` float32 (R, V), which may be overwritten.

    Raises:
        ExecutorError: logits are not numbers, as with broken weights.
    """
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise ExecutorError("the model produced logits that are not finite numbers")
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    tokens = logits.argmax(dim=-1)
    random_rows = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if random_rows:
        chosen = torch.tensor(random_rows, device=logits.device)
        tokens[chosen] = _draw(logits[chosen], [rows[index] for index in random_rows])
    result: list[int] = tokens.tolist()
    return result


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of a row (V,) with their log probabilities."""
    if count == 0:
        return ()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _adjust(logits: torch.Tensor, row: SamplerRow) -> None:
    """Apply penalties, biases and `min_tokens` to the logits (V,) of one row, in place."""
    params = row.params
    output = row.output_token_ids
    if params.repetition_penalty != 1:
        seen = _index([*set(row.prompt_token_ids), *set(output)], logits)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = _index(output, logits).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), device=logits.device)
        logits[_index(params.logit_bias, logits)] += biases
    if len(output) < params.min_tokens:
        forbidden = [*params.stop_token_ids]
        if not params.ignore_eos:
            forbidden += row.end_token_ids
        logits[_index(forbidden, logits)] = -torch.inf


def _index(token_ids: Sequence[int] | Mapping[int, float], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)


def _draw(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Draw a token for each row of `logits` (R, V) at its temperature, within its cuts."""
    temperature = _column([row.params.temperature for row in rows], logits)
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(shifted / temperature, dim=-1)
    uniforms = _column(
        [uniform(row.seed, len(row.output_token_ids)) for row in rows], logits, torch.float64
    )
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    cut = torch.tensor([_cuts(row.params) for row in rows], device=logits.device)
    if not cut.all():
        tokens[~cut] = _invert(probs[~cut], uniforms[~cut])
    if cut.any():
        params = [row.params for row in rows if _cuts(row.params)]
        likeliest, ids = _cut(probs[cut], params)
        picked = _invert(likeliest, uniforms[cut])
        tokens[cut] = ids.gather(1, picked[:, None])[:, 0]
    return tokens


def _cuts(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _cut(
    probs: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of `probs` (R, V), likeliest first, the others set to zero.

    top_k first, then top_p of what is left, then min_p against the likeliest.
    """
    vocab = probs.shape[-1]
    top_k = _column([p.top_k if p.top_k > 0 else vocab for p in params], probs, torch.int64)
    top_p = _column([p.top_p for p in params], probs)
    min_p = _column([p.min_p for p in params], probs)
    for width in (*_CUT_WIDTHS, vocab):
        values, ids = probs.topk(min(width, vocab), dim=-1)
        enough = values.sum(dim=-1, keepdim=True) >= top_p
        enough |= values[:, -1:] < min_p * values[:, :1]
        if torch.where(top_k < vocab, top_k <= width, enough).all():
            break
    rank = torch.arange(values.shape[-1], device=probs.device)
    kept = torch.where(rank < top_k, values, 0)
    before = kept.cumsum(dim=-1) - kept
    total = torch.where(top_k < vocab, kept.sum(dim=-1, keepdim=True), 1)
    kept = torch.where((before < top_p * total) | (rank == 0), kept, 0)
    return torch.where(kept >= min_p * kept[:, :1], kept, 0), ids


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Columns of `weights` (R, n) drawn in proportion, by one number (R, 1) in [0, 1) each."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _column(
    values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
