"""Prefix caching: what is found, by whom, what is forgotten first, and who waits for whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from schedulers import run_to_end, scheduler

from stallfree.core.admission import Admission
from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool, IntegrityError
from stallfree.core.policies import POLICIES
from stallfree.core.prefix_cache import PrefixCache, Sharing
from stallfree.core.request import FinishReason, Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.errors import OverloadedError

SALT = b"of this process"


def caching(num_blocks: int = 40, **settings: Any) -> Scheduler:
    """A scheduler whose blocks have 4 tokens, and whose iterations 16."""
    return scheduler(num_blocks, prefix_caching=True, **settings)


def ask(
    name: str, prompt: Sequence[int], max_tokens: int = 2, tier: str = "default", **fields: Any
) -> Request:
    scored = fields.pop("prompt_logprobs", None)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=scored)
    targets = Targets(tier)
    return Request(name, prompt, params, max_tokens=max_tokens, targets=targets, **fields)


def serve(own: Scheduler, *requests: Request) -> list[Batch]:
    for each in requests:
        own.add(each)
    return run_to_end(own)


def step(own: Scheduler) -> dict[str, tuple[int, int]]:
    """Run an iteration; where each request's chunk starts, and where it stops."""
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1] * len(batch.sampling))
    own.check_integrity()
    return spans(batch)


def spans(batch: Batch) -> dict[str, tuple[int, int]]:
    return {chunk.request.request_id: (chunk.start, chunk.stop) for chunk in batch.chunks}


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


def test_what_was_let_go_first_is_forgotten_first_and_leaves_before_their_parents() -> None:
    pool = BlockPool(6, 4)
    old, new = pool.allocate(3), pool.allocate(2)
    for block in (*old, *new):
        pool.keep(block, bytes([block]))
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 6
    forgotten: list[int] = []
    held = pool.allocate(1)  # the one that was never used
    for _ in range(5):
        before = {block for block in range(6) if pool.key_of(block) is not None}
        held += pool.allocate(1)
        after = {block for block in range(6) if pool.key_of(block) is not None}
        forgotten += before - after
        pool.check_integrity([held])
    assert forgotten == [*reversed(old), *reversed(new)]
    assert pool.num_findable == 0


def test_what_is_used_again_is_kept_longer() -> None:
    own = caching(num_blocks=8)
    serve(own, ask("old", range(13)))  # three full blocks
    serve(own, ask("new", range(100, 109)))
    serve(own, ask("old again", range(13)))
    serve(own, ask("large", range(200, 217)))  # five blocks: three were free, two of `new`
    assert serve(own, ask("old third", range(13)))[0].num_tokens == 1


def test_a_block_that_was_computed_twice_is_found_once() -> None:
    own = caching()
    first, scored = ask("first", range(10)), ask("scored", range(10), 8, prompt_logprobs=0)
    for each in (first, scored):
        own.add(each)
    step(own)
    assert own.pool.num_findable == 2
    assert not set(first.block_table) & set(scored.block_table)
    run_to_end(own)
    assert own.pool.num_findable == 4  # two of the prompt, two of the longer answer


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


def test_those_that_come_together_compute_their_beginning_once() -> None:
    own = caching()
    beginning = list(range(24))
    together = [ask(name, [*beginning, 50 + i], 2) for i, name in enumerate("abc")]
    for each in together:
        own.add(each)
    own.add(ask("other", range(100, 110)))
    assert step(own) == {"a": (0, 16)}
    assert step(own) == {"a": (16, 25), "other": (0, 7)}  # it passes those who wait
    later = step(own)
    assert later["b"] == later["c"] == (24, 25)
    batches = run_to_end(own)
    assert all(chunk.is_decode for batch in batches for chunk in batch.chunks)
    assert [each.num_cached_tokens for each in together] == [0, 24, 24]


def test_completions_of_one_prompt_are_computed_once_without_caching_too() -> None:
    own = scheduler(num_blocks=40)
    for group in "ab":
        for index in range(3):
            own.add(ask(f"{group}{index}", range(18), 4, group=group))
    batches = run_to_end(own)
    prefilled = [c.num_tokens for batch in batches for c in batch.chunks if not c.is_decode]
    assert sum(prefilled) == 2 * (18 + 2 + 2)  # each group its own


def leader_and_follower(own: Scheduler, **fields: Any) -> tuple[Request, Request]:
    """Two requests that begin alike, the first of which has read 16 of 26 tokens."""
    leader, follower = ask("leader", range(26), 12), ask("follower", [*range(25), 99], **fields)
    own.add(leader)
    own.add(follower)
    assert step(own) == {"leader": (0, 16)}
    return leader, follower


def test_nobody_waits_for_one_that_was_aborted() -> None:
    own = caching()
    leader, follower = leader_and_follower(own)
    own.finish(leader, FinishReason.ABORT)
    assert step(own) == {"follower": (16, 26)}
    run_to_end(own)
    assert follower.finish_reason is FinishReason.LENGTH


def test_nobody_waits_for_one_that_is_about_to_end() -> None:
    own = caching()
    leader, follower = leader_and_follower(own)
    batch = own.schedule()
    assert batch is not None
    assert spans(batch) == {"leader": (16, 26)}
    own.finish(leader, FinishReason.ABORT)
    ahead = own.schedule()
    assert ahead is not None
    assert spans(ahead) == {"follower": (16, 26)}
    own.complete(batch, [1])
    own.complete(ahead, [1])
    assert run_to_end(own)
    assert follower.finish_reason is FinishReason.LENGTH


def test_what_a_failed_batch_computed_is_never_found() -> None:
    own = caching()
    _, follower = leader_and_follower(own)
    batch = own.schedule()
    assert batch is not None
    own.fail(batch)
    own.check_integrity()
    assert step(own) == {"follower": (16, 26)}  # of the batch before
    run_to_end(own)
    assert follower.finish_reason is FinishReason.LENGTH


def test_what_lost_workers_held_is_forgotten() -> None:
    own = caching()
    serve(own, ask("before", range(100, 118)))
    leader_and_follower(own)
    batch = own.schedule()
    assert batch is not None
    own.recompute([batch])
    own.check_integrity()
    assert own.pool.num_findable == 0
    assert step(own) == {"leader": (0, 16)}
    batches = run_to_end(own)
    assert sum(batch.num_tokens for batch in batches if "follower" in spans(batch)) > 0
    assert serve(own, ask("after", range(100, 118)))[0].num_tokens == 16


def test_nobody_waits_for_one_of_a_lower_tier() -> None:
    own = caching(budget=20)
    own.add(ask("flex", range(30), tier="flex"))
    assert step(own) == {"flex": (0, 20)}
    own.add(ask("urgent", range(30), tier="priority"))
    assert step(own)["urgent"] == (20, 30)  # it finds what is there, and goes on itself


def test_a_preempted_request_finds_what_it_held() -> None:
    own = caching(num_blocks=8)
    first, second = ask("first", range(10), 12), ask("second", range(100, 110), 20)
    batches = serve(own, first, second)
    assert second.num_preemptions >= 1
    back = next(
        chunk
        for before, batch in pairwise(batches)
        for chunk in batch.chunks
        if chunk.request is second and chunk.start != 0 and "second" not in spans(before)
    )
    assert back.start == 8  # its end was forgotten, as `first` grew; its prompt was not
    assert (len(first.output_token_ids), len(second.output_token_ids)) == (12, 20)
    assert second.num_cached_tokens == 0  # what it found of its own is no hit


def test_what_one_finds_is_not_allocated_to_another_in_the_same_iteration() -> None:
    own = caching(num_blocks=8, budget=64)
    serve(own, ask("kept", range(17)))  # four blocks can be found, four are blank
    assert own.pool.num_findable == 4
    large, again = ask("large", range(100, 113), 2), ask("again", range(17), 2)
    own.add(large)
    own.add(again)
    step(own)  # `large` takes the four blank ones; nothing else is left but what is found
    assert large.block_table
    assert again.state.value == "waiting"
    run_to_end(own)
    assert again.num_cached_tokens == 16


def test_both_that_are_admitted_together_get_what_was_promised() -> None:
    own = caching(num_blocks=9, budget=64)
    serve(own, ask("kept", range(17)))
    serve(own, ask("newer", range(200, 217)))  # one block is blank; the oldest are of `kept`
    large, again = ask("large", range(100, 112), 2), ask("again", range(17), 2)
    own.add(large)
    own.add(again)
    assert step(own) == {"large": (0, 12), "again": (16, 17)}


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items()])
def test_who_reserves_the_whole_context_shares_nothing(policy: str) -> None:
    own = caching(num_blocks=64, policy=policy)
    serve(own, *(ask(f"{i}", range(18), group="g") for i in range(2)))
    second = ask("second", range(18))
    serve(own, second)
    assert second.num_cached_tokens == (0 if POLICIES[policy].reserves_context else 16)


def test_flex_makes_room_for_one_that_shares_its_blocks() -> None:
    """What the victims hold and the candidate finds is freed, and taken again."""
    own = caching(num_blocks=8, budget=64)
    flex = ask("flex", range(24), 4, tier="flex")
    own.add(flex)
    step(own)
    assert own.pool.num_free == 2
    urgent = ask("urgent", [*range(20), *range(50, 59)], tier="priority")  # eight blocks
    own.add(urgent)
    assert step(own) == {"urgent": (20, 29)}
    assert flex.num_preemptions == 1
    run_to_end(own)
    assert len(flex.output_token_ids) == 4


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


def test_promises_end_with_those_who_made_them() -> None:
    own = caching()
    leader = ask("leader", range(26))
    own.add(leader)
    own.finish(leader, FinishReason.ABORT)
    follower = ask("follower", range(26))
    own.add(follower)
    assert follower.num_shared_tokens == 0
    own.check_integrity()


def test_the_check_finds_a_key_of_something_else() -> None:
    own = caching()
    request = ask("one", range(10), 8)
    own.add(request)
    step(own)
    request.block_table.reverse()
    with pytest.raises(IntegrityError, match="found as what it does not hold"):
        own.check_integrity()
    request.block_table.reverse()
    own.check_integrity()
    with pytest.raises(IntegrityError, match="is free"):
        own.pool.keep(7, b"free")
    with pytest.raises(IntegrityError, match="has a key already"):
        own.pool.keep(request.block_table[0], b"another")


def storm(growth_blocks: int, caches: bool, seed: int) -> int:
    """Preemptions of 60 requests of random lengths whose answers outgrow a small pool."""
    rng = random.Random(seed)
    own = scheduler(
        40, growth_blocks=growth_blocks, watermark=0.0, budget=64, prefix_caching=caches
    )
    requests = [
        ask(
            str(number),
            rng.choices(range(1000), k=rng.randint(2, 20)),
            min(40, 1 + int(rng.expovariate(1 / 12))),
        )
        for number in range(60)
    ]
    serve(own, *requests)
    assert all(len(each.output_token_ids) == each.max_tokens for each in requests)
    assert own.preemptions["memory"] == sum(each.num_preemptions for each in requests)
    return own.preemptions["memory"]


@pytest.mark.parametrize("caches", [False, True])
def test_storms_of_preemptions_are_damped(caches: bool) -> None:
    stormy, damped = (sum(storm(growth, caches, seed) for seed in range(3)) for growth in (0, 1))
    assert stormy > 50
    assert damped < stormy / 4


@pytest.mark.parametrize(("growth_blocks", "num_preemptions"), [(0, 2), (1, 1)])
def test_the_room_to_grow_is_left_until_nobody_waits(
    growth_blocks: int, num_preemptions: int
) -> None:
    """The last of three gives way; when the second ends, four of five free blocks would do."""
    own = scheduler(10, watermark=0.0, budget=64, growth_blocks=growth_blocks)
    last = ask("last", range(12), 20)
    serve(own, ask("first", range(12), 20), ask("second", range(12), 6), last)
    assert last.num_preemptions == num_preemptions
    own.add(ask("long", range(32)))
    own.add(ask("beside", range(8)))
    assert len(step(own)) == 2  # all ten blocks: nothing is spared any more


def test_many_tokens_that_may_come_reserve_nothing() -> None:
    """64 tokens of memory, four requests that may have 50 each: all run at once."""
    own = scheduler(num_blocks=16, budget=64)
    requests = [
        Request(
            f"{i}",
            range(8),
            SamplingParams(max_tokens=50),
            max_tokens=50,
            end_token_ids=frozenset({0}),
        )
        for i in range(4)
    ]
    for each in requests:
        own.add(each)
    step(own)
    assert len(own.running) == 4
    assert own.pool.num_free == 16 - 4 * 2
    for _ in range(3):
        step(own)
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [0] * 4)  # they end long before
    assert not own.has_requests
    assert not own.preemptions
