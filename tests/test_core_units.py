"""Requests, blocks, budgets and policies, piece by piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stallfree.core.blocks import BlockPool, IntegrityError, OutOfBlocksError
from stallfree.core.budget import StaticBudget
from stallfree.core.counter_random import mix, uniform
from stallfree.core.policies import POLICIES, Candidate, View
from stallfree.core.request import (
    TRANSITIONS,
    FinishReason,
    IllegalTransitionError,
    Request,
    RequestState,
)
from stallfree.core.sampling_params import MAX_STOP_STRINGS, SamplingParams
from stallfree.core.token_costs import TokenCosts
from stallfree.errors import InvalidRequestError

NO_COSTS = TokenCosts()


def make_request(num_prompt: int = 4, max_tokens: int = 4, **params: object) -> Request:
    own = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request("r", range(num_prompt), own, max_tokens=max_tokens, end_token_ids=frozenset({0}))


def test_tokens_span_prompt_and_output() -> None:
    request = make_request(3)
    request.output_token_ids += [10, 11, 12]
    everything = [0, 1, 2, 10, 11, 12]
    for start in range(6):
        for stop in range(start, 7):
            assert list(request.tokens(start, stop)) == everything[start:stop]


@pytest.mark.parametrize("source", RequestState)
@pytest.mark.parametrize("target", RequestState)
def test_only_the_table_moves_a_request(source: RequestState, target: RequestState) -> None:
    request = make_request()
    request.state = source
    if target in TRANSITIONS[source]:
        request.move_to(target)
        assert request.state is target
    else:
        with pytest.raises(IllegalTransitionError):
            request.move_to(target)
        assert request.state is source


def test_finish_reasons() -> None:
    request = make_request(max_tokens=3, min_tokens=2, stop_token_ids=(7,))
    request.output_token_ids = [0]
    assert request.finish_reason_after(0) is None  # min_tokens is not reached
    request.output_token_ids = [0, 7]
    assert request.finish_reason_after(7) is FinishReason.STOP
    assert request.finish_reason_after(0) is FinishReason.STOP
    assert request.finish_reason_after(5) is None
    request.output_token_ids = [5, 5, 5]
    assert request.finish_reason_after(5) is FinishReason.LENGTH
    ignoring = make_request(ignore_eos=True)
    ignoring.output_token_ids = [0]
    assert ignoring.finish_reason_after(0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.001),
        ("stop_token_ids", tuple(range(129))),
        ("top_k", 1.5),
        ("n", True),
        ("temperature", "a"),
        ("stop", (1,)),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("seed", 2**63),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
        ("stop", ("",)),
        ("stop", ("x" * 1001,)),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ],
)
def test_sampling_params_refuse(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_one_stop_string_may_come_bare() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_counter_random_is_uniform_and_repeatable() -> None:
    values = [uniform(1, index) for index in range(20_000)]
    assert values == [uniform(1, index) for index in range(20_000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    assert len({mix(seed, 0) for seed in range(-1000, 1000)}) == 2000


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, shares and releases against a plain account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=4)
        self.tables: list[list[int]] = []

    tables_made: Bundle[int] = Bundle("tables_made")

    @rule(target=tables_made, count=st.integers(0, 6))
    def allocate(self, count: int) -> int:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            assert self.pool.num_free == free
            self.tables.append([])
        else:
            self.tables.append(self.pool.allocate(count))
            assert self.pool.num_free == free - count
        return len(self.tables) - 1

    @rule(target=tables_made, source=tables_made, count=st.integers(0, 6))
    def share(self, source: int, count: int) -> int:
        shared = self.tables[source][:count]
        self.pool.share(shared)
        self.tables.append(list(shared))
        return len(self.tables) - 1

    @rule(table=tables_made)
    def release(self, table: int) -> None:
        self.pool.release(self.tables[table])
        self.tables[table] = []

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == self.pool.num_blocks - len(held)


TestPool = PoolMachine.TestCase


def test_pool_finds_what_is_wrong() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    with pytest.raises(IntegrityError):
        pool.check_integrity([])  # leaked
    with pytest.raises(IntegrityError):
        pool.check_integrity([blocks, blocks])  # held by one more than counted
    pool.release(blocks)
    with pytest.raises(IntegrityError):
        pool.release(blocks)
    with pytest.raises(IntegrityError):
        pool.share(blocks)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 2, 3)] == [0, 1, 1, 2]


class _Decode:
    num_remaining_tokens = 1
    num_computed_tokens = 0
    is_decode = True
    is_flex = is_scored = False


class _Prefill:
    is_decode = False
    is_flex = False

    def __init__(self, num_remaining_tokens: int, start: int = 0, is_scored: bool = False) -> None:
        self.num_remaining_tokens = num_remaining_tokens
        self.num_computed_tokens = start
        self.is_scored = is_scored


def view(
    decodes: int = 0,
    prefills: tuple[int, ...] = (),
    waiting: tuple[int, ...] = (),
    limit: int | None = None,
    *,
    free_blocks: int = 100,
    watermark: int = 0,
    growth: int = 0,
    max_num_seqs: int = 100,
    max_admissions: int | None = None,
    costs: TokenCosts = NO_COSTS,
    tile: int = 1,
    decodes_ran_last: bool = False,
) -> View:
    started = [_Prefill(n) for n in prefills]
    return View(
        decodes=[_Decode() for _ in range(decodes)],
        flex_decodes=[],
        under_way=started,
        prefills=[
            *(Candidate.of_running(each) for each in started),
            *(Candidate(_Prefill(n), 0, n, 1, is_waiting=True) for n in waiting),
        ],
        flex_prefills=[],
        num_running=decodes + len(started),
        free_blocks=free_blocks,
        watermark_blocks=watermark,
        growth_blocks=growth,
        max_num_seqs=max_num_seqs,
        max_admissions=max_admissions,
        token_limit=limit,
        flex_limit=limit,
        costs=costs,
        tile_tokens=tile,
        decodes_ran_last=decodes_ran_last,
    )


def sizes(policy: str, state: View) -> list[int]:
    return [proposal.num_tokens for proposal in POLICIES[policy].propose(state)]


def test_sarathi_fills_the_budget_after_all_decodes() -> None:
    assert sizes("sarathi", view(3, (10,), (20, 20), limit=16)) == [1, 1, 1, 10, 3]
    assert sizes("sarathi", view(5, (), (20,), limit=3)) == [1] * 5  # clamped, none skipped
    assert sizes("sarathi", view(0, (), (5, 4, 9), limit=9)) == [5, 4]


def test_sarathi_cuts_chunks_to_tiles() -> None:
    assert sizes("sarathi", view(3, (100,), (), limit=50, tile=16)) == [1, 1, 1, 45]
    assert sizes("sarathi", view(3, (46,), (), limit=50, tile=16)) == [1, 1, 1, 46]  # ends it
    assert sizes("sarathi", view(3, (100,), (), limit=7, tile=16)) == [1, 1, 1, 4]  # goes on
    assert sizes("sarathi", view(0, (), (100, 100), limit=60, tile=16)) == [48]
    assert sizes("sarathi", view(0, (40,), (100,), limit=60, tile=16)) == [40, 8]


def test_sarathi_charges_what_chunks_cost_beyond_their_tokens() -> None:
    """The limit reckons with one row of logits, and with chunks that begin at `start`."""
    costs = TokenCosts(row=0.5, start=100, attended=0.01)

    def run(
        *prefills: _Prefill, limit: int = 64, tile: int = 1, decodes: int = 0, each: float = 0.5
    ) -> list[int]:
        state = view(decodes, limit=limit, tile=tile, costs=costs._replace(row=each))
        line = [Candidate.of_running(each) for each in prefills]
        return sizes("sarathi", replace(state, prefills=line))[decodes:]

    assert run(_Prefill(64)) == [64]
    assert run(_Prefill(900)) == [64]
    assert run(_Prefill(900, start=100)) == [64]
    assert run(_Prefill(900, start=200)) == [32]  # each token costs 2
    assert run(_Prefill(900, is_scored=True)) == [43]  # 64.5 / 1.5
    assert run(_Prefill(900, start=250, is_scored=True)) == [21]
    assert run(*(_Prefill(1) for _ in range(64))) == [1] * 43
    assert run(_Prefill(20), _Prefill(900, is_scored=True)) == [20, 29]
    assert run(_Prefill(20), _Prefill(900, start=200, is_scored=True), tile=16) == [20, 12]
    assert run(_Prefill(900, start=9_000, is_scored=True), tile=16) == [16]  # a tile all the same
    assert run(_Prefill(7, start=9_000), limit=5, tile=16) == [5]
    assert run(_Prefill(40), _Prefill(900, start=9_000)) == [40]
    for decodes in range(32):  # and a whole tile beside the decodes
        [least] = run(_Prefill(900, is_scored=True), tile=16, decodes=decodes, each=1e9)
        assert least == -(-(decodes + 16) // 16) * 16 - decodes
    assert run(_Prefill(4), _Prefill(60, is_scored=True), tile=16, decodes=15, each=3.0) == [4, 11]
    assert run(_Prefill(4), _Prefill(60), each=30.0) == [4, 59]  # the last one costs 31


def test_admission_keeps_watermark_places_and_order() -> None:
    assert sizes("sarathi", view(1, (), (5, 5), free_blocks=3, watermark=2, limit=90)) == [1, 5]
    assert sizes("sarathi", view(0, (), (5, 5), free_blocks=2, watermark=2, limit=90)) == [5]
    assert sizes("sarathi", view(2, (), (5,), max_num_seqs=2, limit=90)) == [1, 1]


def test_admission_leaves_room_to_grow_for_each_that_runs_and_itself() -> None:
    state = view(1, (), (5, 5), free_blocks=6, watermark=1, growth=1, limit=90)
    assert sizes("sarathi", state) == [1, 5, 5]  # 5 left, 1 + 2 spared; then 4 left, 1 + 3
    state = view(1, (), (5, 5), free_blocks=5, watermark=1, growth=1, limit=90)
    assert sizes("sarathi", state) == [1, 5]
    state = view(1, (), (5, 5), free_blocks=3, watermark=1, growth=1, limit=90)
    assert sizes("sarathi", state) == [1]
    assert sizes("sarathi", view(0, (), (5,), free_blocks=1, growth=1, limit=90)) == [5]


def test_vllm_runs_prompts_or_decodes() -> None:
    assert sizes("vllm", view(4, (), (50, 60))) == [50, 60]
    assert sizes("vllm", view(4, (), (50,), free_blocks=0)) == [1] * 4
    assert sizes("vllm", view(4)) == [1] * 4


def test_orca_and_hybrid_only_run_whole_prompts_beside_decodes() -> None:
    for policy in ("orca", "hybrid_only"):
        assert sizes(policy, view(2, (), (500, 600))) == [1, 1, 500, 600]
    assert POLICIES["orca"].reserves_context
    assert not POLICIES["hybrid_only"].reserves_context


def test_faster_transformer_admits_only_when_nothing_runs() -> None:
    assert sizes("faster_transformer", view(2, (), (500,))) == [1, 1]
    assert sizes("faster_transformer", view(0, (), (500, 600))) == [500, 600]


def test_simple_chunking_alternates() -> None:
    assert sizes("simple_chunking", view(2, (50,), (9,), limit=16)) == [1, 1]
    after = view(2, (50,), (9,), limit=16, decodes_ran_last=True)
    assert sizes("simple_chunking", after) == [16]
    assert sizes("simple_chunking", view(2, limit=16, decodes_ran_last=True)) == [1, 1]
    assert sizes("simple_chunking", view(0, (50,), (), limit=16)) == [16]


@given(
    decodes=st.integers(0, 20),
    prefills=st.lists(st.integers(2, 200), max_size=5),
    waiting=st.lists(st.integers(1, 200), max_size=5),
    limit=st.integers(0, 64),
    tile=st.integers(1, 32),
)
def test_sarathi_keeps_any_budget(
    decodes: int, prefills: list[int], waiting: list[int], limit: int, tile: int
) -> None:
    state = view(decodes, tuple(prefills), tuple(waiting), limit, tile=tile)
    proposals = POLICIES["sarathi"].propose(state)
    total = sum(proposal.num_tokens for proposal in proposals)
    assert [p.num_tokens for p in proposals[:decodes]] == [1] * decodes
    assert total <= max(limit, decodes)
    work_left = sum(prefills) + sum(waiting)
    if limit > decodes and work_left:
        assert total > decodes  # prefill never starves while the budget has room
    if limit >= tile and work_left > limit and len(proposals) > decodes:
        assert total % tile == 0 or total > limit - tile


def test_static_budget_is_checked() -> None:
    with pytest.raises(ValueError, match="0"):
        StaticBudget(0)
    with pytest.raises(ValueError, match="tile"):
        StaticBudget(1, 0)
