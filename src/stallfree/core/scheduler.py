"""The scheduler: owns all requests and the block pool, and turns a policy's wish into a batch.

`schedule` and `complete` (or `fail`) bracket each iteration. Several batches may be in flight, as
pipelining needs; a request in flight is neither scheduled again nor preempted. Nothing here knows
the time, or what runs the batch.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from stallfree.core.batch import Batch, Chunk
from stallfree.core.blocks import BlockPool, IntegrityError
from stallfree.core.budget import TokenBudget
from stallfree.core.fairness import TokenCounters
from stallfree.core.load import Load
from stallfree.core.policies import POLICIES, Candidate, Proposal, View
from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.targets import RANKS
from stallfree.core.waiting import PREFILL_ORDERS, WaitingQueue
from stallfree.errors import ConfigError, ContextLengthError, InvalidRequestError

_MOST_ADMISSIONS = 32  # in one iteration
_LAST_OUTPUTS = 64  # whose length says how long answers are


class PolicyError(Exception):
    """A policy proposed what it may not: a bug in the policy; nothing was scheduled."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of a scheduler.

    Attributes:
        policy: a name in `POLICIES`.
        max_num_seqs: most requests admitted at once.
        max_model_len: longest context in tokens, prompt and output together.
        watermark: share of the blocks that admissions leave free for running requests to grow,
            where the policy does not reserve for that.
        num_stages: batches that are in flight at once; each takes its share of the decodes.
        prefill_order: a name in `PREFILL_ORDERS`.
        is_fair: whether users take turns (see `fairness`).

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    policy: str = "sarathi"
    max_num_seqs: int = 128
    max_model_len: int = 4096
    watermark: float = 0.01
    num_stages: int = 1
    prefill_order: str = "fcfs"
    is_fair: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"scheduler is {self.policy!r}; it must be one of {list(POLICIES)}")
        if self.prefill_order not in PREFILL_ORDERS:
            raise ConfigError(
                f"prefill_order is {self.prefill_order!r}; it must be one of {list(PREFILL_ORDERS)}"
            )
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {self.max_num_seqs}; it must be at least 1")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}; it must be at least 2")


class Scheduler:
    """Admits, batches, preempts and ends requests.

    Args:
        config: see `SchedulerConfig`.
        pool: the KV blocks, all of them free.
        budget: asked for the tokens of each iteration, if the policy keeps one.

    Attributes:
        num_left_waiting: how many requests of each rank and lower ones the last iteration left
            waiting.

    Raises:
        ConfigError: the pool is too small for what the policy reserves for one request.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, budget: TokenBudget) -> None:
        self.config = config
        self.pool = pool
        self.budget = budget
        self.policy = POLICIES[config.policy]
        self._counters = TokenCounters() if config.is_fair else None
        self.waiting = WaitingQueue(config.prefill_order, self._counters)
        self.running: list[Request] = []  # by tier, then in order of arrival
        self._requests: dict[str, Request] = {}
        self._groups: dict[str, list[Request]] = {}
        watermark = 0 if self.policy.reserves_context else config.watermark
        self._watermark_blocks = int(watermark * pool.num_blocks)
        self._context_blocks = pool.blocks_for(config.max_model_len)
        self.num_left_waiting = [0] * len(RANKS)
        self._num_arrivals = 0
        self._output: deque[int] = deque(maxlen=_LAST_OUTPUTS)
        self._decodes_ran_last = False
        self._left_out: dict[str, int] = {}  # decodes without a share of the last batch, in line
        if self.policy.reserves_context and self._context_blocks > pool.num_blocks:
            raise ConfigError(
                f"scheduler {config.policy} reserves the full context of {config.max_model_len} "
                f"tokens for each request, but the KV cache holds {pool.num_tokens}: lower "
                "max_model_len or raise kv_cache_memory"
            )

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

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
        if request.group is not None:
            self._groups.setdefault(request.group, []).append(request)
        self.waiting.add(request)

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
        ready = self._grow_running()
        may_admit = len(self.waiting) == num_waiting  # nobody was preempted to let others grow
        if may_admit:
            ready = self._displace_flex(ready)
        if self.config.num_stages > 1:
            ready = self._share(ready)
        load = Load(ready)
        limit = admissions = None
        if self.policy.keeps_budget:
            limit = self._token_limit(load)
            is_all = len(ready) == len(self.running)
            everything = load if is_all else Load(self.running)
            admissions = self.budget.admissions(everything, self._next_sizes())
        flex_decodes, flex_limit = self._flex(load, limit)
        view = View(
            decodes=load.decodes,
            flex_decodes=flex_decodes,
            under_way=load.prefills,
            prefills=self._candidates(load.prefills, may_admit, is_flex=False),
            flex_prefills=self._candidates(load.prefills, may_admit, is_flex=True),
            num_running=len(self.running),
            free_blocks=self.pool.num_free,
            watermark_blocks=self._watermark_blocks,
            max_num_seqs=self.config.max_num_seqs,
            max_admissions=admissions,
            token_limit=limit,
            flex_limit=flex_limit,
            tile_tokens=self.budget.tile_tokens,
            decodes_ran_last=self._decodes_ran_last,
        )
        proposals = self.policy.propose(view)
        if not proposals:
            return None
        batch = self._check(proposals, None if limit is None else max(limit, flex_limit or 0))
        for chunk in batch.chunks:
            request = chunk.request
            if request.state is RequestState.WAITING:
                self._admit(request)
            if request.first_scheduled_at is None:
                request.first_scheduled_at = now
            request.in_flight = True
        self.num_left_waiting = [self.waiting.num_requests(rank) for rank in RANKS.values()]
        self._decodes_ran_last = batch.num_decodes > 0
        return batch

    def _token_limit(self, load: Load) -> int:
        """The budget, clamped at zero; a tile at least if there is no answer to hold up."""
        limit = max(0, self.budget.tokens(load))
        if limit or load.decodes or any(request.in_flight for request in self.running):
            return limit
        return self.budget.tile_tokens

    def _flex(self, load: Load, limit: int | None) -> tuple[list[Request], int | None]:
        """The `flex` decodes that may run where no prompt of others does, and the limit then."""
        has_flex = load.flex_decodes or self.waiting.has_flex
        if limit is None or not (has_flex or any(each.is_flex for each in load.prefills)):
            return load.flex_decodes, limit
        count, most = self.budget.flex(load)
        if not load.decodes:
            most = max(most, self.budget.tile_tokens)
        return load.flex_decodes[:count], most

    def _next_sizes(self) -> list[int]:
        """Tokens of those first in line, `flex` aside."""
        first = islice(self.waiting.in_order((), True, is_flex=False), _MOST_ADMISSIONS)
        return [request.num_tokens for request in first]

    def tokens_ahead(self, request: Request) -> tuple[int, int]:
        """Tokens of prompts that would be read before a new request, and how many of them wait."""
        num_tokens = num_waiting = 0
        prefills = [each for each in self.running if not each.is_decode]
        kinds = (False, True) if request.is_flex else (False,)
        for is_flex in kinds:
            own = [each for each in (*prefills, request) if each.is_flex == is_flex]
            for each in self.waiting.in_order(own, True, is_flex=is_flex):
                if each is request:
                    break
                num_tokens += 0 if each.is_sibling else each.num_remaining_tokens
                num_waiting += each.state is RequestState.WAITING
        return num_tokens, num_waiting

    def tokens_left(self, request: Request) -> int:
        """How many tokens a request probably still gets, as long as the last answers were."""
        left = request.max_tokens - request.num_output_tokens
        if self._output:
            typical = sum(self._output) // len(self._output)
            left = min(left, max(1, typical - request.num_output_tokens))
        return left

    def complete(self, batch: Batch, token_ids: Sequence[int]) -> None:
        """Take the result of a batch: one sampled token for each chunk of `batch.sampling`."""
        sampled = iter(token_ids)
        for chunk in batch.chunks:
            request = chunk.request
            token_id = next(sampled) if chunk.samples else None
            request.in_flight = False
            if request.pending_finish is not None:
                self._end(request, request.pending_finish)
                continue
            request.num_computed_tokens = chunk.start + chunk.num_tokens
            if self._counters is not None:
                prompt_tokens = 0 if chunk.is_decode else chunk.num_tokens
                self._counters.charge(request.targets.user, prompt_tokens, token_id is not None)
            if token_id is not None:
                request.output_token_ids.append(token_id)
                reason = request.finish_reason_after(token_id)
                if reason is not None:
                    self._end(request, reason)

    def num_repeats(self, batch: Batch) -> int:
        """How many more iterations hold what a completed batch held, if nobody arrives or leaves.

        Zero unless all that runs are decodes, nobody waits, and only their lengths end them.
        """
        running = self.running
        if len(self.waiting) or len(running) != batch.num_decodes or not running:
            return 0
        if len(batch.chunks) != len(running) or not all(r.is_decode for r in running):
            return 0
        if any(not r.params.ignore_eos or r.params.stop_token_ids for r in running):
            return 0
        count = min([request.max_tokens - len(request.output_token_ids) for request in running]) - 1
        missing = sum([self._missing_blocks(request, count) for request in running])
        return count if missing <= self.pool.num_free else 0

    def _missing_blocks(self, request: Request, count: int) -> int:
        """Blocks that a request lacks for `count` more decodes."""
        last = request.num_tokens + count - 1
        return max(0, self.pool.blocks_for(last) - len(request.block_table))

    def repeat(self, batch: Batch, token_id: int, count: int) -> None:
        """Take the results of `count` more iterations like `batch`, at most `num_repeats` of it.

        As if each had been scheduled and completed with `token_id` for every request.
        """
        for chunk in batch.chunks:
            request = chunk.request
            missing = self._missing_blocks(request, count)
            request.block_table += self.pool.allocate(missing)
            request.num_computed_tokens += count
            request.output_token_ids += [token_id] * count
            if self._counters is not None:
                for _ in range(count):
                    self._counters.charge(request.targets.user, 0, True)

    def fail(self, batch: Batch) -> None:
        """End every request of a batch that could not be run."""
        for chunk in batch.chunks:
            chunk.request.in_flight = False
            self._end(chunk.request, chunk.request.pending_finish or FinishReason.ERROR)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request from outside, such as for a stop string or a client that left.

        One in flight keeps its blocks until its batch is complete. One that ended stays as it is.
        """
        if request.is_finished:
            return
        if request.in_flight:
            request.pending_finish = reason
        else:
            self._end(request, reason)

    def check_integrity(self) -> None:
        """Check that blocks and requests agree.

        Raises:
            IntegrityError: a block is lost, or held by a request that should hold none.
        """
        self.pool.check_integrity(request.block_table for request in self._requests.values())
        if {id(request) for request in (*self.waiting, *self.running)} != {
            id(request) for request in self._requests.values()
        }:
            raise IntegrityError("the queues and the table of live requests disagree")

    def _grow_running(self) -> list[Request]:
        """Give each running request the block of its next token, preempting the last of the last.

        Returns those that are ready to run, by tier and arrival.
        """
        ready = []
        block_size = self.pool.block_size
        for request in list(self.running):
            if request.in_flight or request.state is not RequestState.RUNNING:
                continue
            if request.num_tokens <= len(request.block_table) * block_size:
                ready.append(request)
                continue
            missing = self.pool.blocks_for(request.num_tokens) - len(request.block_table)
            while missing > self.pool.num_free and request.state is RequestState.RUNNING:
                self._preempt(next(r for r in reversed(self.running) if not r.in_flight))
            if request.state is RequestState.RUNNING:
                request.block_table += self.pool.allocate(missing)
                ready.append(request)
        return ready

    def _share(self, ready: list[Request]) -> list[Request]:
        """Without the decodes that are beyond this batch's share of all, as others are in flight.

        Those that were left out before go first, in the order in which that befell them.
        """
        decodes = [request for request in ready if request.is_decode]
        num_decodes = sum(request.num_output_tokens > 0 for request in self.running)
        share = -(-num_decodes // self.config.num_stages)
        line = self._left_out
        decodes.sort(key=lambda request: line.get(request.request_id, len(line)))
        self._left_out = {each.request_id: place for place, each in enumerate(decodes[share:])}
        return [request for request in ready if request.request_id not in self._left_out]

    def _displace_flex(self, ready: list[Request]) -> list[Request]:
        """Preempt `flex` requests, the latest first, while one of another tier lacks their room.

        Returns those of `ready` that are left.
        """
        if not self.running or not self.running[-1].is_flex or self.policy.reserves_context:
            return ready
        candidate = next(self._candidates([], may_admit=True, is_flex=False), None)
        if candidate is None:
            return ready
        victims = [r for r in reversed(self.running) if r.is_flex and not r.in_flight]
        most_free = self.pool.num_free + sum(len(victim.block_table) for victim in victims)
        if most_free - candidate.num_blocks < self._watermark_blocks:
            return ready  # all of it would not be enough
        for victim in victims:
            has_place = len(self.running) < self.config.max_num_seqs
            left = self.pool.num_free - candidate.num_blocks
            if has_place and left >= self._watermark_blocks:
                break
            self._preempt(victim)
        return [request for request in ready if request.state is RequestState.RUNNING]

    def _preempt(self, request: Request) -> None:
        request.move_to(RequestState.WAITING)
        self._release_blocks(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.running.remove(request)
        self.waiting.add(request)

    def _candidates(
        self, under_way: Sequence[Request], may_admit: bool, *, is_flex: bool
    ) -> Iterator[Candidate]:
        """Prefills under way and, if some may be admitted, waiting ones: of `flex`, or the rest."""
        own = [request for request in under_way if request.is_flex == is_flex]
        for request in self.waiting.in_order(own, may_admit, is_flex=is_flex):
            if request.state is RequestState.RUNNING:
                yield Candidate(request, request.num_remaining_tokens)
            elif not self._waits_for_sibling(request):
                shared = len(self._sharable_blocks(request))
                yield Candidate(
                    request,
                    num_tokens=request.num_tokens - shared * self.pool.block_size,
                    num_blocks=self._blocks_to_admit(request) - shared,
                    is_waiting=True,
                )

    def _blocks_to_admit(self, request: Request) -> int:
        if self.policy.reserves_context:
            return self._context_blocks
        return self.pool.blocks_for(request.num_tokens)

    def _waits_for_sibling(self, request: Request) -> bool:
        """Whether the prompt of `request` is being computed, or is about to be, by another."""
        if request.group is None or self.policy.reserves_context:
            return False
        siblings = self._groups[request.group]
        if any(s.num_computed_tokens >= s.num_prompt_tokens for s in siblings):
            return False
        return siblings[0] is not request

    def _sharable_blocks(self, request: Request) -> list[int]:
        """Full blocks of the prompt that a sibling has computed; one token at least is left."""
        if request.group is None or self.policy.reserves_context:
            return []
        siblings = self._groups[request.group]
        source = max(siblings, key=lambda sibling: sibling.num_computed_tokens)
        num_tokens = min(
            source.num_computed_tokens, request.num_prompt_tokens, request.num_tokens - 1
        )
        return source.block_table[: num_tokens // self.pool.block_size]

    def _check(self, proposals: Sequence[Proposal], limit: int | None) -> Batch:
        """The batch that was proposed, once all of it is found legal."""
        chunks = []
        for view, num_tokens in proposals:
            request = view
            if not isinstance(request, Request) or request.in_flight:
                raise PolicyError(f"{request} cannot be scheduled")
            start, state = request.num_computed_tokens, request.state
            size = request.num_prompt_tokens + len(request.output_token_ids)
            if state is RequestState.FINISHED:
                raise PolicyError(f"{request} has ended")
            if state is RequestState.WAITING:
                start = len(self._sharable_blocks(request)) * self.pool.block_size
            if not 1 <= num_tokens <= size - start:
                raise PolicyError(f"{num_tokens} tokens proposed of {request}")
            samples = start + num_tokens == size
            is_decode = start == size - 1 and size > request.num_prompt_tokens
            chunks.append(Chunk(request, start, num_tokens, samples, is_decode))
        if len({id(chunk.request) for chunk in chunks}) < len(chunks):
            raise PolicyError("a request was proposed twice")
        batch = Batch(tuple(chunks))
        if limit is not None and batch.num_tokens > max(limit, batch.num_decodes):
            raise PolicyError(f"{batch.num_tokens} tokens proposed; the budget is {limit}")
        return batch

    def _admit(self, request: Request) -> None:
        shared = self._sharable_blocks(request)
        blocks = self.pool.allocate(self._blocks_to_admit(request) - len(shared))
        self.pool.share(shared)
        request.block_table = [*shared, *blocks]
        request.num_computed_tokens = len(shared) * self.pool.block_size
        request.move_to(RequestState.RUNNING)
        self.waiting.remove(request)
        insort(self.running, request, key=lambda each: (each.targets.rank, each.arrival))

    def _end(self, request: Request, reason: FinishReason) -> None:
        queue = self.running if request.state is RequestState.RUNNING else self.waiting
        queue.remove(request)
        request.move_to(RequestState.FINISHED)
        request.finish_reason = reason
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._output.append(request.num_output_tokens)
        self._release_blocks(request)
        del self._requests[request.request_id]
        if request.group is not None:
            siblings = self._groups[request.group]
            siblings.remove(request)
            if not siblings:
                del self._groups[request.group]

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
