"""Prefix caching: what a key stands for, what is found, by whom, and who counts on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sharing_requests import ask, caching, serve, spans, step

from stallfree.core.admission import Admission
from stallfree.core.blocks import BlockPool
from stallfree.core.policies import POLICIES
from stallfree.core.prefix_cache import PrefixCache, Sharing
from stallfree.core.request import FinishReason
from stallfree.errors import OverloadedError

SALT = b"of this process"


def keys(
    prompt: Sequence[int], salt: bytes = SALT, sharing: Sharing = Sharing.ALL, **fields: Any
) -> list[bytes]:
    request = ask("any", prompt, **fields)
    PrefixCache(BlockPool(4, 4), sharing, salt).foresee(request)
    return request.block_keys


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block() -> None:
    own = keys(range(14))
    assert len(own) == len(set(own)) == 3  # full blocks alone
    assert keys(range(30))[:3] == own
    assert not set(keys([9, *range(1, 14)])) & set(own)  # the first token is in all of them
    assert keys([*range(11), 99, 12, 13])[:2] == own[:2]
    assert keys([*range(11), 99, 12, 13])[2] != own[2]
    assert keys([1, 2, 3, 4] * 2)[0] != keys([1, 2, 3, 4] * 2)[1]  # alike, but at another place


def test_nobody_shares_across_salts() -> None:
    own = set(keys(range(8)))
    others = [
        keys(range(8), cache_salt="a"),
        keys(range(8), cache_salt="all"),
        keys(range(8), b"of another process"),
        keys(range(8), sharing=Sharing.GROUPS, group="a"),
        keys(range(8), sharing=Sharing.GROUPS, group="b"),
    ]
    assert len(own.union(*others)) == 2 * 6
    assert keys(range(8), sharing=Sharing.GROUPS) == keys(range(8), sharing=Sharing.NOTHING) == []


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    own = caching()
    prompt = list(range(18))
    serve(own, ask("first", prompt))
    second = ask("second", prompt)
    batches = serve(own, second)
    assert spans(batches[0]) == {"second": (16, 18)}
    assert second.num_cached_tokens == 16
    assert (own.prefix_queries, own.prefix_hits) == (36, 16)


def test_one_token_at_least_is_computed() -> None:
    own = caching()
    serve(own, ask("first", range(16)))
    assert spans(serve(own, ask("second", range(16)))[0]) == {"second": (12, 16)}
    assert spans(serve(own, ask("third", range(17)))[0]) == {"third": (16, 17)}


def test_the_next_turn_finds_the_answer() -> None:
    own = caching()
    first = ask("first", range(10), max_tokens=8)
    serve(own, first)
    turn = [*range(10), *first.output_token_ids, 50, 51]
    # 18 tokens, but the last one was never run
    assert spans(serve(own, ask("second", turn))[0]) == {"second": (16, 20)}


def test_tenants_with_other_salts_find_nothing() -> None:
    own = caching()
    serve(own, ask("plain", range(18)))
    for salt in ("a", "b"):
        assert spans(serve(own, ask(salt, range(18), cache_salt=salt))[0]) == {salt: (0, 16)}
    again = ask("again", range(18), cache_salt="a")
    serve(own, again)
    assert again.num_cached_tokens == 16


def test_a_prompt_whose_log_probabilities_are_asked_for_is_read_whole() -> None:
    own = caching()
    serve(own, ask("first", range(18)))
    scored = ask("scored", range(18), prompt_logprobs=1)
    assert spans(serve(own, scored)[0]) == {"scored": (0, 16)}
    assert own.prefix_queries == 18  # it did not ask
    assert serve(own, ask("third", range(18)))[0].num_tokens == 2

    fresh = caching()
    serve(fresh, ask("scored", range(18), prompt_logprobs=1))
    assert serve(fresh, ask("second", range(18)))[0].num_tokens == 2  # others find it


def test_running_requests_share_what_they_find() -> None:
    own = caching(num_blocks=10)
    first = ask("first", range(18), max_tokens=20)
    own.add(first)
    step(own)
    step(own)
    second = ask("second", range(18), max_tokens=20)
    own.add(second)
    step(own)
    assert second.block_table[:4] == first.block_table[:4]
    assert own.pool.num_free == 10 - 6
    own.finish(first, FinishReason.ABORT)
    own.check_integrity()
    assert own.pool.num_free == 10 - 5


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items()])
def test_who_reserves_the_whole_context_shares_nothing(policy: str) -> None:
    own = caching(num_blocks=64, policy=policy)
    serve(own, *(ask(f"{i}", range(18), group="g") for i in range(2)))
    second = ask("second", range(18))
    serve(own, second)
    assert second.num_cached_tokens == (0 if POLICIES[policy].reserves_context else 16)


def test_admission_counts_what_has_to_be_computed() -> None:
    own = caching(budget=4)
    serve(own, ask("before", range(42)))
    admission = Admission(max_queued_tokens=30)
    own.add(ask("runs", range(200, 240)))
    step(own)
    own.add(ask("waits", range(100, 120)))
    assert own.waiting.num_tokens(1) == 20
    again = ask("again", range(42))
    assert admission.check(again, 1, own) is None  # 2 tokens
    assert (again.num_found_tokens, again.num_unread_tokens) == (40, 2)
    own.add(again)
    assert own.waiting.num_tokens(1) == 22
    twin = ask("twin", range(100, 122))
    admission.check(twin, 1, own)  # another one that waits computes 20 of its tokens
    assert (twin.num_found_tokens, twin.num_unread_tokens) == (0, 2)
    with pytest.raises(OverloadedError, match="has 10 tokens that are not cached, 22 wait"):
        admission.check(ask("half", [*range(32), *range(300, 310)]), 1, own)
    with pytest.raises(OverloadedError, match="has 20 tokens, 22 wait"):
        admission.check(ask("salted", range(100, 120), cache_salt="other"), 1, own)
    assert own.outlook.tokens_ahead(ask("late", range(300, 304)))[0] == 36 + 20 + 2


def test_shortest_first_looks_at_what_has_to_be_computed() -> None:
    own = caching(prefill_order="srpf")
    serve(own, ask("before", range(42)))
    own.add(ask("short", range(100, 110)))
    own.add(ask("long but known", range(42)))
    assert [each.request_id for each in own.waiting] == ["long but known", "short"]
