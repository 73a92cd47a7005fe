"""The sampler: cuts, penalties, and random numbers that no neighbour changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.core.counter_random import uniform
from stallfree.core.sampling_params import SamplingParams
from stallfree.model.sampler import SamplerRow, likeliest, sample

VOCAB = 40


def row(
    seed: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    end: frozenset[int] = frozenset(),
    **params: Any,
) -> SamplerRow:
    return SamplerRow(SamplingParams(**params), seed, len(output), prompt, output, end)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draws(logits: torch.Tensor, count: int, **params: Any) -> Counter[int]:
    rows = [row(seed=seed, **params) for seed in range(count)]
    return Counter(token for token in sample(logits.repeat(count, 1), rows) if token is not None)


def test_temperature_zero_is_greedy() -> None:
    logits = logits_of(0, rows=5)
    rows = [row(temperature=0, top_p=0.5, seed=seed) for seed in range(5)]
    assert sample(logits.clone(), rows) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": VOCAB - 1, "min_p": 0.0}])
def test_draws_follow_the_distribution(temperature: float, cut: dict[str, Any]) -> None:
    logits = logits_of(1)
    count = 20_000
    expected = torch.softmax(logits[0] / temperature, dim=-1)
    actual = draws(logits, count, temperature=temperature, **cut)
    for token in range(VOCAB):
        deviation = (float(expected[token]) * (1 - float(expected[token])) / count) ** 0.5
        assert abs(actual[token] / count - float(expected[token])) < 5 * deviation + 1e-4


@pytest.mark.parametrize("vocab", [127, 128, 129, 1000])
def test_a_draw_is_where_a_running_sum_over_the_vocabulary_reaches_its_number(vocab: int) -> None:
    logits = logits_of(2, vocab=vocab)
    logits[0, torch.arange(0, vocab, 3)] = -torch.inf
    sums = torch.softmax(logits[0], dim=-1).double().cumsum(dim=-1)
    rows = [row(seed=seed, temperature=1.0) for seed in range(500)]
    for one, token in zip(rows, sample(logits.repeat(500, 1), rows), strict=True):
        assert token == int((sums <= uniform(one.seed, 0) * sums[-1]).sum())


@pytest.mark.parametrize("place", [0, 100, 127, 128, 299])
def test_of_equal_logits_the_first_is_greedy(place: int) -> None:
    logits = logits_of(3, vocab=300)
    logits[0, place:] = 1e4
    assert sample(logits, [row(temperature=0)]) == [place]


def kept_tokens(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn, one by one, by the definition."""
    probs = torch.softmax(logits.double(), dim=-1)
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    total = float(sum(probs[token] for token in order))
    kept, mass = set(), 0.0
    for token in order:
        if mass >= top_p * total or probs[token] < min_p * probs[order[0]]:
            break
        kept.add(token)
        mass += float(probs[token])
    return kept


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.03, 0.2]),
    vocab=st.sampled_from([40, 5000]),
)
def test_cuts_keep_what_they_say(
    seed: int, top_k: int, top_p: float, min_p: float, vocab: int
) -> None:
    logits = logits_of(seed, vocab=vocab)
    allowed = kept_tokens(logits[0], top_k, top_p, min_p)
    drawn = draws(logits, 200, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(drawn) <= allowed
    if len(allowed) <= 3:
        assert int(logits.argmax()) in drawn


def test_a_top_k_beyond_the_first_sort_width_still_cuts_by_top_p_of_its_mass() -> None:
    logits = -1e-4 * torch.arange(6000, dtype=torch.float32)[None]
    drawn = draws(logits, 1000, top_k=1000, top_p=0.5)
    allowed = kept_tokens(logits[0], 1000, 0.5, 0)
    assert 450 < len(allowed) < 500
    assert set(drawn) <= allowed
    assert max(drawn) > 400  # and not only the tokens of the first sort


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=6), st.integers(0, 5))
def test_a_seed_draws_the_same_beside_any_neighbours(seeds: list[int], position: int) -> None:
    logits = logits_of(3)
    own = row(seed=42, output=(1,) * position, top_p=0.9)
    alone = sample(logits.clone(), [own])
    others = [row(seed=seed, temperature=1.5, top_k=seed % 7) for seed in seeds]
    together = sample(
        torch.cat([logits_of(seed % 99) for seed in seeds] + [logits]), [*others, own]
    )
    assert together[-1:] == alone


def test_successive_tokens_use_new_numbers() -> None:
    flat = torch.zeros(1, VOCAB)
    tokens = [sample(flat.clone(), [row(seed=1, output=(0,) * n)])[0] for n in range(50)]
    assert len(set(tokens)) > 20


def test_penalties() -> None:
    def adjusted(**given: Any) -> torch.Tensor:
        logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
        sample(logits, [row(temperature=0, **given)])
        return logits[0]

    seen = {"prompt": (0,), "output": (1, 1, 2)}
    assert adjusted(repetition_penalty=2.0, **seen).tolist() == [0.5, 1.0, -2.0, 0.5]
    assert adjusted(presence_penalty=0.5, **seen).tolist() == [1.0, 1.5, -1.5, 0.5]
    assert adjusted(frequency_penalty=0.5, **seen).tolist() == [1.0, 1.0, -1.5, 0.5]
    assert adjusted(logit_bias={3: 10.0, 0: -1.0}).tolist() == [0.0, 2.0, -1.0, 10.5]


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    given: dict[str, Any] = {
        "end": frozenset({1}),
        "stop_token_ids": (2,),
        "temperature": 0,
        "max_tokens": 9,
    }
    assert sample(logits.clone(), [row(min_tokens=2, output=(0,), **given)]) == [3]
    assert sample(logits.clone(), [row(min_tokens=1, output=(0,), **given)]) == [1]
    ignoring = row(min_tokens=2, output=(0,), ignore_eos=True, **given)
    assert sample(logits.clone(), [ignoring]) == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_no_token_and_harm_no_other(bad: float, temperature: float) -> None:
    logits = logits_of(0, rows=3)
    rows = [row(temperature=temperature, seed=seed) for seed in range(3)]
    whole = sample(logits.clone(), rows)
    logits[1, 3] = bad
    assert sample(logits, rows) == [whole[0], None, whole[2]]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-46},
        {"temperature": 1e-4},
        {"temperature": 100.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"top_k": 2**70},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100.0)},
        {"stop_token_ids": tuple(range(VOCAB - 1)), "min_tokens": 2},
    ],
)
def test_extreme_parameters_give_tokens(params: dict[str, Any]) -> None:
    own = row(
        prompt=tuple(range(20)), output=(1, 2, 3)[: 1 if "min_tokens" in params else 3], **params
    )
    [alone] = sample(logits_of(5), [own])
    assert alone is not None
    assert 0 <= alone < VOCAB
    assert sample(logits_of(5).repeat(3, 1), [row(), own, row(top_k=3)])[1] == alone


def test_a_row_that_may_say_nothing_gets_no_token() -> None:
    own = row(stop_token_ids=tuple(range(VOCAB)), min_tokens=2)
    assert sample(logits_of(5).repeat(2, 1), [own, row(temperature=0)])[0] is None


def test_equal_logits_are_drawn_alike_beside_wider_cuts() -> None:
    logits = torch.zeros(1, 6000)
    logits[0, ::3] = 1.0
    for seed in range(30):
        own = row(seed=seed, top_k=50)
        [alone] = sample(logits.clone(), [own])
        wide = [row(seed=1, top_p=0.999), row(seed=2, top_k=5000)]
        assert sample(logits.repeat(3, 1), [*wide, own])[2] == alone


def test_likeliest() -> None:
    values = torch.tensor([-3.0, -1.0, -2.0])
    assert likeliest(values, 2) == ((1, -1.0), (2, -2.0))
    assert likeliest(values, 0) == ()
    assert len(likeliest(values, 20)) == 3
