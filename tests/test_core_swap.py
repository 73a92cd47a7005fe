"""The swap space: what is kept of preempted requests, what is found of it, what a batch copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from schedulers import request, run_to_end

from stallfree.core.batch import NO_COPIES, Batch, Copies, CopyIn
from stallfree.core.blocks import BlockPool, IntegrityError
from stallfree.core.budget import SloBudget, StaticBudget
from stallfree.core.load import Load
from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import BatchShape, StepTimeModel, StepTimePredictor
from stallfree.core.swap import SwapCosts, SwapSpace

KEYS = [bytes([number]) * 32 for number in range(20)]


def costs(
    recompute_s: Callable[[int], float] = float, block_s: float = 1.0, most_s: float | None = None
) -> SwapCosts:
    """A token takes a second to compute, a block to copy, in each direction."""
    return SwapCosts(recompute_s, block_s, block_s, most_s)


def space(num_slots: int = 8, block_size: int = 4, **fields: Any) -> SwapSpace:
    return SwapSpace(num_slots, block_size, costs(**fields))


def waiting(name: str, keys: list[bytes]) -> Request:
    """A preempted request with these keys."""
    own = request(name)
    own.block_keys = keys
    return own


def swap_out(own: SwapSpace, keys: list[bytes], first_block: int = 0) -> Copies:
    """Overwrite blocks with these keys, the last one first; what the next batch copies."""
    for index in reversed(range(len(keys))):
        own.note_forgotten(first_block + index, keys[index])
    return own.next_copies([])


def test_a_request_is_kept_if_copying_it_is_faster_than_computing_it() -> None:
    for block_s, is_kept in ((1.9, True), (2.1, False)):  # 4 tokens take 4 s, a block twice block_s
        own = space(block_s=block_s)
        assert own.keep(waiting("a", KEYS[:3]), KEYS[:3]) is is_kept
        assert len(swap_out(own, KEYS[:3]).outs) == 3 * is_kept
    assert not space().keep(request("nothing"), [])


def test_as_much_is_kept_as_there_are_slots_for() -> None:
    own = space(num_slots=4)
    first, second, third = waiting("a", KEYS[:3]), waiting("b", KEYS[1:6]), waiting("c", KEYS[9:])
    assert own.keep(first, first.block_keys)
    assert own.keep(second, second.block_keys)  # two of its blocks are kept already, one more fits
    assert not own.keep(third, third.block_keys)
    own.check_integrity([first, second, third])
    copies = swap_out(own, KEYS)
    assert [out.key for out in copies.outs] == KEYS[:4]  # what went last goes first
    assert own.num_used == 4
    own.check_integrity([first, second, third])


def test_a_slot_is_found_once_its_batch_came_back_and_free_once_nobody_waits() -> None:
    own = space(num_slots=3)
    first, second = waiting("a", KEYS[:3]), waiting("b", KEYS[:2])
    for each in (first, second):
        assert own.keep(each, each.block_keys)
    copies = swap_out(own, KEYS[:3], first_block=7)
    assert {(out.block, out.key) for out in copies.outs} == {(7 + i, KEYS[i]) for i in range(3)}
    assert own.find(KEYS) == []
    own.note_done(copies)
    slots = {out.key: out.slot for out in copies.outs}
    assert own.find(KEYS) == [slots[key] for key in KEYS[:3]]
    assert own.find(KEYS[1:]) == [slots[KEYS[1]], slots[KEYS[2]]]
    assert own.find(KEYS[5:]) == []
    assert not swap_out(own, KEYS[:3])  # they are there already

    own.leave(first)
    assert own.find(KEYS) == [slots[KEYS[0]], slots[KEYS[1]]]  # the other one waits for them
    assert own.num_used == 2
    third = waiting("c", KEYS[9:])
    assert own.keep(third, third.block_keys)
    assert not swap_out(own, KEYS[9:])  # the free slot may be read by the batch that this is for
    assert len(swap_out(own, KEYS[9:]).outs) == 1
    own.check_integrity([second, third])


def test_what_a_failed_batch_was_to_copy_is_not_found() -> None:
    own = space(num_slots=2)
    first = waiting("a", KEYS[:2])
    own.keep(first, first.block_keys)
    failed = swap_out(own, KEYS[:2])
    own.note_failed(failed)
    assert own.find(KEYS) == []
    assert own.num_used == 0
    again = swap_out(own, KEYS[:2])
    own.note_failed(failed)  # says nothing of the later batch
    own.note_done(again)
    assert len(own.find(KEYS)) == 2
    own.check_integrity([first])


def test_a_batch_that_comes_back_late_says_nothing_of_a_later_one() -> None:
    own = space(num_slots=1)
    first = waiting("a", KEYS[:1])
    own.keep(first, first.block_keys)
    late = swap_out(own, KEYS[:1])
    own.leave(first)
    assert own.next_copies([]) is NO_COPIES
    own.keep(first, first.block_keys)
    newer = swap_out(own, KEYS[:1])
    assert newer.outs[0] == late.outs[0]  # the same block and slot
    own.note_done(late)
    assert own.find(KEYS) == []
    own.note_done(newer)
    assert own.find(KEYS) == [0]


def test_an_iteration_copies_no_more_than_it_may() -> None:
    own = space(most_s=3.5)
    assert own.keep(waiting("a", KEYS[:6]), KEYS[:6])
    assert own.most_s(may_admit=False) == 0
    assert own.most_s(may_admit=True) == 3.0  # three can come back, so no more are kept
    own.note_done(swap_out(own, KEYS[:6]))
    assert len(own.find(KEYS)) == 3
    own.keep(waiting("b", KEYS[9:]), KEYS[9:])
    for index, key in enumerate(KEYS[9:12]):
        own.note_forgotten(index, key)
    assert own.most_s(may_admit=False) == 3.0
    assert own.most_s(may_admit=True) == 3.5
    copies = own.next_copies([CopyIn(0, 5), CopyIn(1, 6)])
    assert (len(copies.outs), len(copies.ins), copies.seconds) == (1, 2, 3.0)
    assert not space(most_s=0.9).keep(waiting("a", KEYS), KEYS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own._free.append(0),
        lambda own: own._slots.clear(),
        lambda own: own._slots.update({KEYS[9]: own._free.pop()}),
        lambda own: own._wanted.clear(),
        lambda own: own._kept.update({"gone": []}),
        lambda own: own._kept["a"].reverse(),
    ],
)
def test_damage_is_found(damage: Callable[[Any], None]) -> None:
    own = space()
    first = waiting("a", KEYS[:2])
    own.keep(first, first.block_keys)
    own.note_done(swap_out(own, KEYS[:2]))
    own.check_integrity([first])
    damage(own)
    with pytest.raises(IntegrityError):
        own.check_integrity([first])


def test_a_space_has_slots() -> None:
    with pytest.raises(ValueError, match="0 slots"):
        space(num_slots=0)


def swapping(
    num_blocks: int, num_slots: int = 40, budget: int = 64, **settings: Any
) -> tuple[Scheduler, SwapSpace]:
    """A scheduler whose blocks have 4 tokens."""
    swap = space(num_slots)
    config = SchedulerConfig(max_num_seqs=8, max_model_len=64, watermark=0.0, **settings)
    own = Scheduler(config, BlockPool(num_blocks, 4), StaticBudget(budget), swap=swap)
    return own, swap


def ask(name: str, num_prompt: int, max_tokens: int, **fields: Any) -> Request:
    """With a prompt that no other begins with."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompt = [ord(name[0]), *range(1, num_prompt)]
    return Request(name, prompt, params, max_tokens=max_tokens, **fields)


def batches(own: Scheduler) -> Iterator[Batch]:
    while (batch := own.schedule()) is not None:
        yield batch
        own.complete(batch, [1] * len(batch.sampling))
        own.check_integrity()


@pytest.mark.parametrize("caches", [True, False])
def test_a_preempted_request_goes_on_where_it_was(caches: bool) -> None:
    own, swap = swapping(10, prefix_caching=caches)
    first, second = ask("first", 15, 20), ask("second", 15, 8)
    own.add(first)
    own.add(second)
    ran = list(batches(own))
    assert own.preemptions == {"memory": 1}
    assert own.swapped == {"memory": 1}
    assert second.num_preemptions == 1
    [back] = [batch for batch in ran if batch.copies.ins]
    [chunk] = [each for each in back.chunks if each.request is second]
    assert (chunk.start, chunk.num_tokens) == (20, 1)  # nothing is computed again
    assert swap.num_out == swap.num_in == len(back.copies.ins) == 4  # one block was left as it was
    outs = [len(batch.copies.outs) for batch in ran]
    assert max(outs) == 1  # as the other one grows
    assert swap.num_used == 0
    assert first.num_output_tokens == 20
    assert second.num_output_tokens == 8


def test_what_nobody_overwrites_is_not_copied() -> None:
    own, swap = swapping(10)
    first, second = ask("first", 15, 20), ask("second", 15, 8)
    own.add(first)
    own.add(second)
    for _ in batches(own):
        if second.num_preemptions and first.is_finished is False:
            own.finish(first, FinishReason.ABORT)
    assert second.num_output_tokens == 8
    assert own.swapped["memory"] == 1
    assert swap.num_in <= 1


def test_a_request_that_ends_while_it_waits_leaves_nothing() -> None:
    own, swap = swapping(10)
    first, second = ask("first", 15, 20), ask("second", 15, 8)
    own.add(first)
    own.add(second)
    for _ in batches(own):
        if swap.num_used == 2 and not second.is_finished:
            assert second.state is RequestState.WAITING
            own.finish(second, FinishReason.ABORT)
            assert swap.num_used == 0
    assert second.is_finished
    assert swap.num_in == 0


def test_lost_workers_take_the_swap_space_with_them() -> None:
    own, swap = swapping(10)
    first, second = ask("first", 15, 20), ask("second", 15, 8)
    own.add(first)
    own.add(second)
    has_lost = False
    for batch in batches(own):
        if swap.num_used and not has_lost:
            has_lost = True
            own.recompute([batch])
            own.check_integrity()
            assert swap.num_used == 0
            break
    assert has_lost
    run_to_end(own)
    assert second.num_output_tokens == 8
    assert swap.num_in == 0
    assert own.swapped["lost"] == 0


def test_log_probabilities_of_a_prompt_are_computed_again() -> None:
    own, swap = swapping(10, prefix_caching=True)
    first = ask("first", 15, 20)
    params = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=1)
    second = Request("second", range(15), params, max_tokens=8)
    own.add(first)
    own.add(second)
    run_to_end(own)
    assert own.preemptions["memory"] == 1
    assert own.swapped["memory"] == swap.num_out == 0


def test_copies_are_taken_off_the_target() -> None:
    model = StepTimeModel(0.0, (1, 1000), (1.0,), 0.0, 0.0, 0.0)
    budget = SloBudget(0.1, StepTimePredictor(model))
    decode = ask("first", 4, 8)
    decode.output_token_ids.append(1)
    decode.num_computed_tokens = 4
    load = Load([decode])
    tokens = budget.tokens(load)
    load.copy_s = 0.02
    assert tokens - budget.tokens(load) == pytest.approx(20, abs=1)
    assert budget.admissions(load, [10]) == budget.admissions(Load([decode]), [10])


def test_nothing_is_learned_from_copies() -> None:
    model = StepTimeModel(0.01, (1, 1000), (1.0,), 0.0, 0.0, 0.0)
    budget = SloBudget(0.1, StepTimePredictor(model))
    batch = Batch([])
    own, _ = swapping(10)
    own.add(ask("first", 15, 20))
    scheduled = own.schedule()
    assert scheduled is not None
    batch = scheduled
    alone_s = budget.predict(batch)
    batch.copies = Copies(ins=(CopyIn(0, 0),), seconds=0.5)
    assert budget.predict(batch) == pytest.approx(alone_s + 0.5)
    for _ in range(20):
        budget.observe(batch, alone_s + 0.5)
    assert budget.predictor.speed == pytest.approx(1.0)
    assert budget.predictor.seconds(BatchShape.of(batch)) == pytest.approx(alone_s)


def test_halves_of_a_batch_copy_nothing() -> None:
    own, _ = swapping(10)
    own.add(ask("first", 15, 20))
    batch = own.schedule()
    assert batch is not None
    batch.copies = Copies(ins=(CopyIn(0, 0),), seconds=0.5)
    assert [half.copies for half in batch.halves()] == [NO_COPIES] * 2
