"""The scheduler: owns all requests and the block pool, and turns a policy's wish into a batch.

`schedule` and `complete` (or `fail`) bracket each iteration. Several batches may be in flight, as
pipelining needs; they run in the order in which they were scheduled. A request in flight is not
preempted, and scheduled again only for the next chunk of its prompt. Nothing here knows the time,
or what runs the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool, IntegrityError
from stallfree.core.budget import TokenBudget
from stallfree.core.fairness import TokenCounters
from stallfree.core.limits import Limits, limits_of, no_limits
from stallfree.core.load import Load
from stallfree.core.memory import Memory
from stallfree.core.outlook import Outlook
from stallfree.core.policies import POLICIES, View
from stallfree.core.prefill_line import PrefillLine
from stallfree.core.proposal_check import PolicyError, checked_batch
from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.running import RunningRequests
from stallfree.core.scheduler_config import SchedulerConfig
from stallfree.core.swap import SwapSpace
from stallfree.core.targets import RANKS
from stallfree.core.turns import DecodeTurns
from stallfree.core.waiting import WaitingQueue
from stallfree.errors import ContextLengthError, InvalidRequestError

__all__ = ["PolicyError", "Scheduler", "SchedulerConfig"]


class Scheduler:
    """Admits, batches, preempts and ends requests.

    Args:
        config: see `SchedulerConfig`.
        pool: the KV blocks, all of them free.
        budget: asked for the tokens of each iteration, if the policy keeps one.
        salt: of the keys of KV blocks, see `PrefixCache`.
        swap: where KV of preempted requests is kept; None: all of it is computed again.

    Attributes:
        waiting: requests that wait, in order.
        running: admitted requests, in order.
        outlook: what lies ahead of them.
        counters: of what each user got, with fairness.
        num_left_waiting: how many requests of each rank and lower ones the last iteration left
            waiting.
        preemptions, swapped: see `RunningRequests`.

    Raises:
        ConfigError: the pool is too small for what the policy reserves for one request.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        budget: TokenBudget,
        salt: bytes = b"",
        swap: SwapSpace | None = None,
    ) -> None:
        self.config = config
        self.pool = pool
        self.budget = budget
        self.swap = swap
        self.policy = POLICIES[config.policy]
        self.counters = TokenCounters() if config.is_fair else None
        self._requests: dict[str, Request] = {}
        self._memory = Memory(config, pool, salt, swap)
        self._cache = self._memory.cache
        self.waiting = WaitingQueue(config.prefill_order, self.counters)
        self.running = RunningRequests(config, self._memory, self.waiting)
        self.outlook = Outlook(self.running, self.waiting)
        self.preemptions, self.swapped = self.running.preemptions, self.running.swapped
        self.num_left_waiting = [0] * len(RANKS)
        self._turns = DecodeTurns(config.num_stages)
        self._num_arrivals = 0
        self._decodes_ran_last = False

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def prefix_queries(self) -> int:
        """Tokens of prompts that were looked for in the cache when they were first admitted."""
        return self._memory.num_asked

    @property
    def prefix_hits(self) -> int:
        """Those of them whose KV was there."""
        return self._memory.num_hit

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            InvalidRequestError: its prompt is empty or its id is in use.
            ContextLengthError: it can outgrow the context, or the whole KV cache.
        """
        self._check_fits(request)
        self._num_arrivals += 1
        request.arrival = (request.arrived_at, self._num_arrivals)
        self._requests[request.request_id] = request
        self._cache.add(request)
        self.waiting.add(request)

    def foresee(self, request: Request) -> None:
        """Note on a request that is not added yet how much of it will not have to be computed."""
        self._cache.foresee(request)

    def _check_fits(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        if request.num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt is empty; it must have at least 1 token")
        longest = request.num_prompt_tokens + request.max_tokens
        if longest > self.config.max_model_len:
            raise ContextLengthError(
                f"{request.num_prompt_tokens} prompt tokens and up to {request.max_tokens} output "
                f"tokens exceed the context of {self.config.max_model_len} tokens"
            )
        if request.max_kv_tokens > self.pool.num_tokens:
            raise ContextLengthError(
                f"{request.num_prompt_tokens} prompt tokens and up to {request.max_tokens} output "
                f"tokens exceed the KV cache of {self.pool.num_tokens} tokens"
            )

    def schedule(self, now: float = 0.0) -> Batch | None:
        """The next batch, in flight until it is completed or failed; None if nothing can run.

        `now` is the engine's clock in seconds.
        """
        num_waiting = len(self.waiting)
        ready = self.running.grow()
        may_admit = len(self.waiting) == num_waiting  # nobody was preempted to let others grow
        line = PrefillLine(self.running, self.waiting, self._memory)
        if may_admit and self.running.displace_flex(line.requests([], True, is_flex=False)):
            ready = [request for request in ready if request.state is RequestState.RUNNING]
        load = Load(self._turns.share(ready, self.running))
        load.copy_s = self._memory.most_copy_s(may_admit=may_admit and len(self.waiting) > 0)
        limits = self._limits(load)
        proposals = self.policy.propose(self._view(load, limits, line, may_admit))
        if not proposals:
            return None
        may_run, num_found = self.running.may_run, self._memory.num_found
        batch = checked_batch(proposals, limits.most_tokens, num_found, may_run)
        own = [chunk.request for chunk in batch.chunks]
        self.running.admit([request for request in own if request.state is RequestState.WAITING])
        for chunk in batch.chunks:
            request = chunk.request
            if request.first_scheduled_at is None:
                request.first_scheduled_at = now
            request.in_flight += 1
            request.num_computed_tokens = chunk.start + chunk.num_tokens
        batch.copies = self._memory.next_copies()
        self.budget.scheduled(load, batch)
        self.num_left_waiting = [self.waiting.num_requests(rank) for rank in RANKS.values()]
        self._decodes_ran_last = batch.num_decodes > 0
        return batch

    def _limits(self, load: Load) -> Limits:
        if self.policy.keeps_budget:
            return limits_of(self.budget, load, self.running, self.waiting)
        return no_limits(load)

    def _view(self, load: Load, limits: Limits, line: PrefillLine, may_admit: bool) -> View:
        """What the policy is shown."""
        return View(
            decodes=load.decodes,
            flex_decodes=limits.flex_decodes,
            under_way=load.prefills,
            prefills=line.candidates(load.prefills, may_admit, is_flex=False),
            flex_prefills=line.candidates(load.prefills, may_admit, is_flex=True),
            num_running=len(self.running),
            free_blocks=self.pool.num_free,
            watermark_blocks=self._memory.watermark_blocks,
            growth_blocks=self.running.growth_blocks,
            max_num_seqs=self.config.max_num_seqs,
            max_admissions=limits.admissions,
            token_limit=limits.tokens,
            flex_limit=limits.flex_tokens,
            costs=limits.costs,
            tile_tokens=self.budget.tile_tokens,
            decodes_ran_last=self._decodes_ran_last,
        )

    def complete(self, batch: Batch, token_ids: Sequence[int]) -> None:
        """Take the result of a batch: one sampled token for each chunk of `batch.sampling`."""
        if self.swap is not None:
            self.swap.note_done(batch.copies)
        sampled = iter(token_ids)
        for chunk in batch.chunks:
            request = chunk.request
            token_id = next(sampled) if chunk.samples else None
            request.in_flight -= 1
            if request.pending_finish is not None:
                self._end_pending(request)
                continue
            request.num_confirmed_tokens = chunk.start + chunk.num_tokens
            self._cache.confirm(request)
            if self.counters is not None:
                prompt_tokens = 0 if chunk.is_decode else chunk.num_tokens
                self.counters.charge(request.targets.user, prompt_tokens, token_id is not None)
            if token_id is not None:
                request.output_token_ids.append(token_id)
                reason = request.finish_reason_after(token_id)
                if reason is not None:
                    self._end(request, reason)

    def fail(self, batch: Batch) -> None:
        """End every request of a batch that could not be run."""
        if self.swap is not None:
            self.swap.note_failed(batch.copies)
        for chunk in batch.chunks:
            request = chunk.request
            request.in_flight -= 1
            request.pending_finish = request.pending_finish or FinishReason.ERROR
            self._end_pending(request)

    def recompute(self, batches: Sequence[Batch]) -> None:
        """Take back all batches in flight, and all KV, as both are lost.

        Requests wait again, in their order, to be computed from their tokens.
        """
        self._memory.forget()
        self._take_back(batches)

    def stop_swapping(self) -> None:
        """Keep nothing in the swap space from now on; no batch is in flight."""
        self._memory.stop_swapping()

    def stop_copying(self, batches: Sequence[Batch]) -> None:
        """Take back all batches in flight, as KV could not be copied, and copy none from now on.

        Requests wait again; what they had computed is in the KV cache until others need the room.
        """
        self._memory.stop_copying()
        self._take_back(batches)

    def _take_back(self, batches: Sequence[Batch]) -> None:
        for request in {chunk.request for batch in batches for chunk in batch.chunks}:
            request.in_flight = 0
            if request.pending_finish is not None:
                self._end_pending(request)
        for request in list(self.running):
            self.running.preempt(request, "lost")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request from outside, such as for a stop string or a client that left.

        One in flight keeps its blocks until its batch is complete. One that ended stays as it is.
        """
        if request.is_finished:
            return
        if request.in_flight:
            request.pending_finish = request.pending_finish or reason
        else:
            self._end(request, reason)

    def check_integrity(self) -> None:
        """Check that blocks and requests agree.

        Raises:
            IntegrityError: a block is lost, held by a request that should hold none, or found as
                what it does not hold; or one of the swap space is lost, or kept for nobody.
        """
        self._memory.check_integrity(list(self._requests.values()))
        if {id(request) for request in (*self.waiting, *self.running)} != {
            id(request) for request in self._requests.values()
        }:
            raise IntegrityError("the queues and the table of live requests disagree")

    def _end_pending(self, request: Request) -> None:
        """End a request that is to end, once no batch holds it."""
        if not request.in_flight and request.pending_finish is not None:
            self._end(request, request.pending_finish)

    def _end(self, request: Request, reason: FinishReason) -> None:
        queue = self.running if request.state is RequestState.RUNNING else self.waiting
        queue.remove(request)
        request.move_to(RequestState.FINISHED)
        request.finish_reason = reason
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.outlook.note_answer(request.num_output_tokens)
        self._memory.end(request)
        del self._requests[request.request_id]
        self._cache.remove(request)
