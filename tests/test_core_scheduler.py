"""The scheduler: its invariants over random schedules, and what it does where one expects it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_schedules import Run, Setup, fits, run_through, setups
from schedulers import request, run_to_end, scheduler

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.policies import POLICIES, Candidate, Policy, Proposal, View
from stallfree.core.request import FinishReason, Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import PolicyError, Scheduler, SchedulerConfig
from stallfree.core.token_costs import TokenCosts
from stallfree.errors import ConfigError, ContextLengthError, InvalidRequestError


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=setups, arrivals=st.integers(1, 14))
def test_invariants_hold_over_random_schedules(setup: Setup, arrivals: int) -> None:
    if fits(setup):
        run_through(Run(setup), arrivals)


def test_random_schedules_do_copy_blocks() -> None:
    """That the test above is of something."""
    num_copied = 0
    for seed in range(30):
        setup = Setup(
            *("sarathi", 40, 1, 40, 8, 8, 2, 2, True, 0.0, "fcfs", False, True, True, 0),
            copies_blocks=True,
            seed=seed,
        )
        run = Run(setup)
        run_through(run, 12)
        num_copied += run.model.num_copied
    assert num_copied > 20


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    own = scheduler(num_blocks=4)
    first, second, third = request("first", 7), request("second", 7), request("third", 4)
    for each in (first, second, third):
        own.add(each)
    batches = run_to_end(own)
    assert first.num_preemptions == 0
    assert second.num_preemptions >= 1
    assert [len(each.output_token_ids) for each in (first, second, third)] == [8, 8, 8]
    order = [chunk.request.request_id for batch in batches for chunk in batch.chunks]
    assert order.index("third") > max(i for i, name in enumerate(order) if name == "first")


def test_completions_of_one_prompt_share_its_blocks() -> None:
    own = scheduler(num_blocks=40)
    group = [
        Request(f"{i}", range(18), SamplingParams(max_tokens=4), max_tokens=4, group="g")
        for i in range(3)
    ]
    for each in group:
        own.add(each)
    batches = run_to_end(own)
    prefilled = [c.num_tokens for batch in batches for c in batch.chunks if not c.is_decode]
    assert sum(prefilled) == 18 + 2 + 2  # the whole prompt once, then the part-filled block


def test_a_request_that_can_never_fit_is_refused() -> None:
    own = scheduler(num_blocks=4, block_size=4)
    own.add(request("fits", num_prompt=9, max_tokens=8))
    with pytest.raises(ContextLengthError, match="KV cache of 16 tokens"):
        own.add(request("too long", num_prompt=10, max_tokens=8))
    with pytest.raises(ContextLengthError, match="context of 64 tokens"):
        own.add(request("past the context", num_prompt=60, max_tokens=8))
    with pytest.raises(InvalidRequestError, match="empty"):
        own.add(request("empty", num_prompt=0))
    with pytest.raises(InvalidRequestError, match="in use"):
        own.add(request("fits"))
    run_to_end(own)


def test_abort_frees_everything_at_any_moment() -> None:
    own = scheduler()
    waiting, running, flying = request("waiting", 25), request("running"), request("flying")
    own.add(running)
    first = own.schedule()
    assert first is not None
    own.complete(first, [1])
    own.finish(running, FinishReason.ABORT)
    assert own.pool.num_free == 8
    own.add(flying)
    batch = own.schedule()
    assert batch is not None
    own.add(waiting)
    own.finish(waiting, FinishReason.ABORT)
    own.finish(flying, FinishReason.ABORT)
    assert own.pool.num_free == 7  # the iteration under way still writes there
    own.complete(batch, [1])
    assert own.pool.num_free == 8
    assert not own.has_requests
    assert flying.finish_reason is FinishReason.ABORT
    own.finish(flying, FinishReason.STOP)
    assert flying.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize(
    "propose",
    [
        lambda view: [Proposal(r, 99) for r in view.decodes],
        lambda view: [Proposal(r, 0) for r in view.decodes],
        lambda view: [Proposal(r, 1) for r in (*view.decodes, *view.decodes)],
        lambda view: [Proposal(c.request, 17) for c in view.prefills if c.is_waiting],
    ],
)
def test_a_policy_that_breaks_the_rules_changes_nothing(
    propose: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = scheduler()
    own.add(request("running"))
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1])
    own.add(request("waiting", 20))
    own.policy = Policy(propose, keeps_budget=True)  # type: ignore[arg-type]
    with pytest.raises(PolicyError):
        own.schedule()
    own.check_integrity()
    assert not any(each.in_flight for each in own.running)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'fifo'"):
        SchedulerConfig("fifo")
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="max_model_len is 1"):
        SchedulerConfig(max_model_len=1)


def test_a_policy_changes_nothing() -> None:
    """Every policy leaves what it sees as it was, and repeats its answer."""
    own = scheduler(num_blocks=40)
    for index in range(3):
        own.add(request(f"{index}", 10))
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1] * len(batch.sampling))
    own.add(request("waiting", 10))
    before = [repr(each) for each in (*own.running, *own.waiting)]
    for policy in POLICIES.values():
        state = View(
            decodes=list(own.running),
            flex_decodes=[],
            under_way=[],
            prefills=[Candidate(next(iter(own.waiting)), 0, 10, 3, is_waiting=True)],
            flex_prefills=[],
            num_running=len(own.running),
            free_blocks=5,
            watermark_blocks=0,
            growth_blocks=0,
            max_num_seqs=8,
            max_admissions=None,
            token_limit=16,
            flex_limit=16,
            costs=TokenCosts(),
            tile_tokens=1,
            decodes_ran_last=False,
        )
        assert policy.propose(state) == policy.propose(state) != []
    assert [repr(each) for each in (*own.running, *own.waiting)] == before


def test_policies_that_reserve_use_every_block() -> None:
    for policy in ("orca", "faster_transformer"):
        own = Scheduler(SchedulerConfig(policy, 4, 64), BlockPool(400, 4), StaticBudget(1))
        assert own.config.watermark * 400 == 4
        pool = own.pool.allocate(400 - 4 * 16)  # leaves four contexts of 64 tokens
        for index in range(4):
            own.add(request(f"{index}", 10))
        batch = own.schedule()
        assert batch is not None
        assert len(batch.chunks) == 4
        own.pool.release(pool)
