"""Draws tokens from probabilities, all of them or only the likeliest, by a number in [0, 1) each.

Legend of shapes: R rows, V vocabulary, n likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from stallfree.core.sampling_params import SamplingParams

BLOCK = 128  # columns that are looked at together: most vocabularies are whole blocks
_CUT_WIDTHS = (256, 4096)  # likeliest tokens to sort before sorting the whole vocabulary
_PLACE_BITS = 19  # of a probability, left out where many are counted: 16 places for each power of 2


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw from all tokens of each row of `probs` (R, V), by `uniforms` (R, 1)."""
    return _invert(probs, uniforms)


def draw_cut(
    probs: torch.Tensor, uniforms: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Draw from the likeliest tokens of each row of `probs` (R, V), by `uniforms` (R, 1).

    As few tokens are sorted as the row's own cuts need, whatever the other rows need: how many
    are sorted decides the order of equals.
    """
    vocab = probs.shape[-1]
    top_k = column([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], probs)
    top_p = column([p.top_p for p in params], probs)
    min_p = column([p.min_p for p in params], probs)
    tokens = torch.empty(len(params), dtype=torch.int64, device=probs.device)
    todo = torch.ones(len(params), dtype=torch.bool, device=probs.device)
    for width in _CUT_WIDTHS:
        values, ids = probs.topk(min(width, vocab), dim=-1)
        enough = values.sum(dim=-1, keepdim=True) >= top_p
        enough |= values[:, -1:] < min_p * values[:, :1]
        sorted_far = torch.where(top_k < vocab, top_k <= width, enough)[:, 0]
        now = todo & (sorted_far | (width >= vocab))
        kept = _keep(values[now], top_k[now], top_p[now], min_p[now], vocab)
        picked = _invert(kept, uniforms[now])
        tokens[now] = ids[now].gather(1, picked[:, None])[:, 0]
        todo &= ~now
        if not todo.any():
            return tokens
    for index in todo.nonzero()[:, 0].tolist():
        one = slice(index, index + 1)
        tokens[one] = _draw_far(probs[one], uniforms[one], top_k[one], top_p[one], min_p[one])
    return tokens


def _draw_far(
    probs: torch.Tensor,
    uniforms: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Draw from a row of `probs` (1, V) whose cuts keep many tokens, as if all were sorted.

    What is sorted are probabilities alone, and only those that may be kept. The token is the one
    that has what was drawn; if several have, the order of all of them decides.
    """
    vocab = probs.shape[-1]
    if probs.device.type != "cpu" or int(top_k) < vocab:
        values, ids = probs.topk(vocab, dim=-1)
        picked = _invert(_keep(values, top_k, top_p, min_p, vocab), uniforms)
        return ids[0, picked]
    least = float(min_p * probs.max())
    for floor in (_lowest_kept(probs[0], float(top_p)), least):
        values = _descending(probs[probs >= max(floor, least)])[None]
        kept = _keep(values, top_k, top_p, min_p, vocab)
        if kept[0, -1] == 0 or floor <= least:  # else rounding has kept what is below, too
            break
    picked = _invert(kept, uniforms)
    holders = np.flatnonzero(probs[0].numpy() == values[0, picked].numpy())
    if len(holders) == 1:
        return torch.from_numpy(holders)
    return probs.topk(vocab, dim=-1).indices[0, picked]


def _lowest_kept(probs: torch.Tensor, top_p: float) -> float:
    """What no probability that top_p keeps of `probs` (V,) is below, but for rounding.

    Tokens are counted by the first bits of their probability, which are its size, roughly.
    """
    places = probs.view(torch.int32) >> _PLACE_BITS
    mass = torch.bincount(places, weights=probs.double()).flip(0).cumsum(0)
    place = len(mass) - 1 - int((mass < top_p).sum())
    return float(torch.tensor(max(0, place) << _PLACE_BITS, dtype=torch.int32).view(torch.float32))


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Values (n,), largest first: NumPy sorts numbers alone, several times as fast as PyTorch."""
    return torch.from_numpy(np.sort(values.numpy())).flip(0)


def _keep(
    values: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    vocab: int,
) -> torch.Tensor:
    """Probabilities (R, n), likeliest first, with those that are cut set to zero.

    top_k first, then top_p of what is left, then min_p against the likeliest.
    """
    rank = torch.arange(values.shape[-1], device=values.device)
    kept = torch.where(rank < top_k, values, 0)
    before = kept.cumsum(dim=-1) - kept
    total = torch.where(top_k < vocab, kept.sum(dim=-1, keepdim=True), 1)
    kept = torch.where((before < top_p * total) | (rank == 0), kept, 0)
    return torch.where(kept >= min_p * kept[:, :1], kept, 0)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Columns of `weights` (R, n) drawn in proportion, by one number (R, 1) in [0, 1) each.

    First a block of columns is drawn, then a column of it: sums of blocks are much faster than a
    running sum of all.
    """
    blocks = in_blocks(weights, 0.0)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    cumulative = sums.cumsum(dim=-1)
    targets = _below(uniforms * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, targets, right=True)
    own = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    rest = (targets - (cumulative - sums).gather(1, block)).clamp(min=0)
    rest = _below(rest, own[:, -1:])
    return (block * BLOCK + torch.searchsorted(own, rest, right=True))[:, 0]


def _below(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Values, cut to what is less than their limits."""
    return torch.minimum(values, limits.nextafter(torch.zeros_like(limits)))


def in_blocks(values: torch.Tensor, filler: float) -> torch.Tensor:
    """`values` (R, n) as (R, blocks, `BLOCK`), the last one filled up."""
    missing = -values.shape[-1] % BLOCK
    if missing:
        values = pad(values, (0, missing), value=filler)
    return values.unflatten(-1, (-1, BLOCK))


def column(
    values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A number for each row: (R, 1), where `like` is."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
