"""Cuts that keep many tokens: what is drawn is what a sort of the whole vocabulary gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.core.sampling_params import SamplingParams
from stallfree.model import draw as module
from stallfree.model.draw import draw_cut

VOCAB = 20_000
COUNT = 4  # numbers that are drawn by

# Logits by what is hard about them.
KINDS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "flat": lambda rng: torch.randn(VOCAB, generator=rng) / 3,
    "normal": lambda rng: 3 * torch.randn(VOCAB, generator=rng),
    "one is likely": lambda rng: torch.randn(VOCAB, generator=rng).index_fill(
        0, torch.tensor([7]), 9.0
    ),
    "all are equal": lambda _: torch.zeros(VOCAB),
    "two values": lambda rng: (torch.rand(VOCAB, generator=rng) < 0.5).float(),
    "many equals": lambda rng: (16 * torch.randn(VOCAB, generator=rng)).round() / 16,
    "pairs": lambda rng: torch.randn(VOCAB // 2, generator=rng).repeat(2),
    "in order": lambda _: -1e-4 * torch.arange(VOCAB),
    "nearly equal": lambda rng: 1e-6 * torch.randn(VOCAB, generator=rng),
    "most are forbidden": lambda rng: torch.randn(VOCAB, generator=rng).masked_fill(
        torch.rand(VOCAB, generator=rng) < 0.7, -torch.inf
    ),
}


def sort_all(
    probs: torch.Tensor,
    uniforms: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """As `_draw_far` says."""
    values, ids = probs.topk(probs.shape[-1], dim=-1)
    kept = module._keep(values, top_k, top_p, min_p, probs.shape[-1])
    return ids[0, module._invert(kept, uniforms)]


def both(logits: torch.Tensor, params: SamplingParams, seed: int) -> tuple[list[int], list[int]]:
    """What is drawn, and what a sort of everything gives."""
    rng = torch.Generator().manual_seed(seed)
    probs = torch.softmax(logits / params.temperature, dim=-1).repeat(COUNT, 1)
    uniforms = torch.rand(COUNT, 1, generator=rng, dtype=torch.float64)
    drawn = draw_cut(probs, uniforms, [params] * COUNT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_draw_far", sort_all)
        return drawn.tolist(), draw_cut(probs, uniforms, [params] * COUNT).tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.7, 1.0, 1.5, 3.0, 100.0]),
    top_p=st.one_of(st.sampled_from([1.0, 0.999999, 0.99, 0.9, 0.5]), st.floats(0.01, 1.0)),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05]),
    top_k=st.sampled_from([0, 0, 0, 5000, VOCAB - 1]),
)
def test_what_is_drawn_is_what_a_sort_of_all_gives(
    kind: str, seed: int, temperature: float, top_p: float, min_p: float, top_k: int
) -> None:
    logits = KINDS[kind](torch.Generator().manual_seed(seed))
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    drawn, expected = both(logits, params, seed)
    assert drawn == expected


@pytest.mark.parametrize("kind", ["flat", "many equals"])
@pytest.mark.parametrize("floor", [1e-4, 6e-5])
def test_what_is_taken_to_be_cut_and_is_not_is_sorted_after_all(
    monkeypatch: pytest.MonkeyPatch, kind: str, floor: float
) -> None:
    monkeypatch.setattr(module, "_lowest_kept", lambda *_: floor)
    logits = KINDS[kind](torch.Generator().manual_seed(0))
    drawn, expected = both(logits, SamplingParams(top_p=0.9), 0)
    assert drawn == expected


def test_only_what_may_be_kept_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    true = module._descending

    def descending(values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(values))
        return true(values)

    monkeypatch.setattr(module, "_descending", descending)
    logits = KINDS["flat"](torch.Generator().manual_seed(0))
    probs = torch.softmax(logits, dim=-1)
    largest = probs.sort(descending=True).values
    num_kept = int((largest.cumsum(0) - largest < 0.5).sum())
    both(logits, SamplingParams(top_p=0.5), 0)
    assert len(sizes) == COUNT
    assert all(num_kept < size < 1.2 * num_kept for size in sizes)
