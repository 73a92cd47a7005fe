"""The schedulers of the Sarathi-Serve paper, side by side.

A policy is a pure function from a read-only `View` to the chunks it proposes. The scheduler checks
the proposal, allocates and emits the batch; so a policy says only who runs and how much of it.
`POLICIES` is the registry; to add one, write the function and give it a line there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from stallfree.core.token_costs import TokenCosts


class RequestView(Protocol):
    """What a policy may know of a request."""

    @property
    def num_remaining_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def is_flex(self) -> bool: ...
    @property
    def is_scored(self) -> bool: ...


class Candidate(NamedTuple):
    """A prefill.

    Attributes:
        request: whose it is.
        start: tokens whose KV is there.
        num_tokens: those after them, which it has to run.
        num_blocks: free blocks that it takes, if it waits.
        is_waiting: whether it is still to be admitted.
    """

    request: RequestView
    start: int
    num_tokens: int
    num_blocks: int = 0
    is_waiting: bool = False

    @classmethod
    def of_running(cls, request: RequestView) -> Candidate:
        """Of a request that was admitted."""
        return cls(request, request.num_computed_tokens, request.num_remaining_tokens)


class Proposal(NamedTuple):
    """Run the next `num_tokens` tokens of `request`, admitting it if it waits."""

    request: RequestView
    num_tokens: int


@dataclass(frozen=True, slots=True)
class View:
    """The state that a policy decides on.

    Attributes:
        decodes: admitted requests that are not in flight and continue an answer, by tier and
            arrival. Each already holds the block of its next token.
        flex_decodes: those that take only what the others leave, as many as that allows.
        under_way: admitted requests that are not in flight and read a prompt.
        prefills: those, and requests that may be admitted, in the order in which they are to be
            read, lazily.
        flex_prefills: the same of requests that take only what the others leave.
        num_running: all admitted requests, those in flight too.
        free_blocks: blocks left for admissions.
        watermark_blocks: free blocks that an admission must leave, unless nothing else runs.
        growth_blocks: and so many more for each request that runs then, itself included.
        max_num_seqs: most admitted requests.
        max_admissions: most that may be admitted in this iteration, `flex` aside, or None.
        token_limit: most tokens of the iteration, or None.
        flex_limit: the same where `flex` runs beside decodes alone.
        costs: what chunks take of these limits beyond their tokens.
        tile_tokens: see `TokenBudget.tile_tokens`.
        decodes_ran_last: whether the last iteration held a decode.
    """

    decodes: Sequence[RequestView]
    flex_decodes: Sequence[RequestView]
    under_way: Sequence[RequestView]
    prefills: Iterable[Candidate]
    flex_prefills: Iterable[Candidate]
    num_running: int
    free_blocks: int
    watermark_blocks: int
    growth_blocks: int
    max_num_seqs: int
    max_admissions: int | None
    token_limit: int | None
    flex_limit: int | None
    costs: TokenCosts
    tile_tokens: int
    decodes_ran_last: bool


class Plan:
    """A proposal under construction, with what is left of tokens, blocks and places."""

    def __init__(self, view: View) -> None:
        self.proposals: list[Proposal] = []
        self._view = view
        self._num_tokens = 0
        self._cost = -view.costs.row  # of chunks, beyond their tokens; one row is in the limit
        self._free_blocks = view.free_blocks
        self._num_running = view.num_running
        self._num_admitted = 0
        self._limit = view.token_limit
        self._may_admit = True
        self.has_chunk = False

    def run_chunk(self, candidate: Candidate, num_tokens: int) -> None:
        """Run tokens of a prompt."""
        if num_tokens > 0:
            self.proposals.append(Proposal(candidate.request, num_tokens))
            self._num_tokens += num_tokens
            self._cost += num_tokens * self._cost_of_token(candidate)
            if num_tokens == candidate.num_tokens:  # a token is sampled after it
                self._cost += self._view.costs.row
            self.has_chunk = True

    def run_decodes(self, requests: Sequence[RequestView]) -> None:
        """Run the token of each of them."""
        self.proposals += [Proposal(request, 1) for request in requests]
        self._num_tokens += len(requests)

    def run_prefills(self, prefills: Iterable[Candidate]) -> None:
        """Continue prefills, and admit new ones while memory and places allow.

        In their order, as far as the token limit goes. If one cannot be admitted, those under way
        go on, but nobody overtakes it into the free memory.
        """
        done: set[int] = set()
        for candidate in prefills:
            num_tokens = self._chunk(candidate)
            if num_tokens == 0:
                return
            if candidate.is_waiting and not self._admits(candidate):
                self._may_admit = False
                break
            self.run_chunk(candidate, num_tokens)
            done.add(id(candidate.request))
        else:
            return
        for request in self._view.under_way:
            if request.is_flex == candidate.request.is_flex and id(request) not in done:
                other = Candidate.of_running(request)
                self.run_chunk(other, self._chunk(other))

    def run_flex(self) -> None:
        """What takes only what the others leave: nothing while their prompts are read."""
        if not self.has_chunk:
            self._limit = self._view.flex_limit
            self.run_decodes(self._view.flex_decodes)
            self.run_prefills(self._view.flex_prefills)

    def _chunk(self, candidate: Candidate) -> int:
        """How many of its tokens fit; cut to a tile unless all of them do.

        The first chunk is of a tile at least, whatever its tokens cost, so that each gets on.
        """
        remaining, limit = candidate.num_tokens, self._limit
        if limit is None:
            return remaining
        left = max(0, limit - self._num_tokens)
        room = max(0.0, left - self._cost)
        each = 1 + self._cost_of_token(candidate)
        if remaining <= left and remaining * each + self._view.costs.row <= room:
            return remaining
        affordable = min(left, remaining - 1, int(room / each))
        fitting = self._cut(affordable)
        if not fitting and affordable < left:  # not even a tile, for what its tokens cost
            fitting = affordable
        if not self.has_chunk:
            least = self._cut(2 * self._view.tile_tokens - 1)
            fitting = max(fitting, min(least, self._cut(left) or left))
        return min(fitting, remaining)

    def _cut(self, num_tokens: int) -> int:
        """As many as end the iteration's tokens with a whole tile, none perhaps."""
        tile = self._view.tile_tokens
        return max(0, (self._num_tokens + num_tokens) // tile * tile - self._num_tokens)

    def _cost_of_token(self, candidate: Candidate) -> float:
        """What each of its tokens costs beyond itself, in tokens."""
        costs = self._view.costs
        logits = costs.row if candidate.request.is_scored else 0.0
        return logits + costs.attended * max(0, candidate.start - costs.start)

    def _admits(self, candidate: Candidate) -> bool:
        spared = 0
        if self._num_running:
            growth = self._view.growth_blocks * (self._num_running + 1)
            spared = self._view.watermark_blocks + growth
        left = self._free_blocks - candidate.num_blocks
        most = None if candidate.request.is_flex else self._view.max_admissions
        if self._num_running >= self._view.max_num_seqs or left < spared:
            return False
        if not self._may_admit or (most is not None and self._num_admitted >= most):
            return False
        self._num_running += 1
        self._num_admitted += 1
        self._free_blocks = left
        return True


def stall_free(view: View) -> list[Proposal]:
    """Every decode, then prefills under way and new ones, within the token limit.

    Sarathi-Serve, algorithm 3. Decodes are never skipped, even beyond the limit; but those of tier
    `flex`, like its prefills, get what the others leave. Without a limit this is the ablation
    `hybrid_only`, and the batching of `orca`: whole prompts beside decodes.
    """
    plan = Plan(view)
    plan.run_decodes(view.decodes)
    plan.run_prefills(view.prefills)
    plan.run_flex()
    return plan.proposals


def prefill_first(view: View) -> list[Proposal]:
    """Whole prompts if any waits and fits, else all decodes: vLLM as the paper compares it."""
    plan = Plan(view)
    plan.run_prefills(view.prefills)
    plan.run_prefills(view.flex_prefills)
    if not plan.proposals:
        plan.run_decodes([*view.decodes, *view.flex_decodes])
    return plan.proposals


def request_level(view: View) -> list[Proposal]:
    """Admit only when nothing runs, then decode until all have ended: FasterTransformer."""
    plan = Plan(view)
    plan.run_decodes([*view.decodes, *view.flex_decodes])
    if view.num_running == 0:
        plan.run_prefills(view.prefills)
        plan.run_prefills(view.flex_prefills)
    return plan.proposals


def alternating(view: View) -> list[Proposal]:
    """Chunks without decodes and decodes, in turn: the ablation with chunked prefills only."""
    decodes = [*view.decodes, *view.flex_decodes]
    plan = Plan(view)
    if not (decodes and not view.decodes_ran_last):
        plan.run_prefills(view.prefills)
        plan.run_prefills(view.flex_prefills)
    if not plan.proposals:
        plan.run_decodes(decodes)
    return plan.proposals


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy and what the scheduler must do for it.

    Attributes:
        propose: the decision.
        keeps_budget: whether the token budget limits it.
        reserves_context: whether admission takes memory for the longest context, so that it
            never preempts, rather than for the prompt. Such a policy shares no blocks either, as
            the systems that it stands for did not.
    """

    propose: Callable[[View], list[Proposal]]
    keeps_budget: bool = False
    reserves_context: bool = False

    @property
    def never_pauses(self) -> bool:
        """Whether every iteration holds every decode and no more than the budget."""
        return self.propose is stall_free and self.keeps_budget


POLICIES: dict[str, Policy] = {
    "sarathi": Policy(stall_free, keeps_budget=True),
    "vllm": Policy(prefill_first),
    "orca": Policy(stall_free, reserves_context=True),
    "faster_transformer": Policy(request_level, reserves_context=True),
    "simple_chunking": Policy(alternating, keeps_budget=True),
    "hybrid_only": Policy(stall_free),
}
