"""What prefix caching keeps in the blocks that nobody holds, and what it forgets first."""

from __future__ import annotations

from itertools import pairwise

import pytest
from schedulers import run_to_end
from sharing_requests import ask, caching, serve, spans, step

from stallfree.core.blocks import BlockPool, IntegrityError


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
