"""Requests that begin alike and come together: one computes, the others wait, but not in vain."""

from __future__ import annotations

from typing import Any

from schedulers import run_to_end, scheduler
from sharing_requests import ask, caching, serve, spans, step

from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler


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


def test_promises_end_with_those_who_made_them() -> None:
    own = caching()
    leader = ask("leader", range(26))
    own.add(leader)
    own.finish(leader, FinishReason.ABORT)
    follower = ask("follower", range(26))
    own.add(follower)
    assert follower.num_shared_tokens == 0
    own.check_integrity()
