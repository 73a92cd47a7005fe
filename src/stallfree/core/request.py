"""A request: its tokens, its counters, and the one table of its state transitions.

A request has no phases. `num_computed_tokens` (tokens whose KV is in its blocks once the
batches in flight are through) chases `num_tokens` (prompt and output so far); "prefill" and
"decode" are derived from the gap. The prompt never changes: preemption only sets the counter back
to zero.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence

from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import DEFAULT_TARGETS, Targets


class RequestState(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # not admitted, or preempted: holds no blocks
    RUNNING = "running"  # admitted: holds blocks
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # its client left
    ERROR = "error"  # the iteration that held it failed


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


class IllegalTransitionError(Exception):
    """A state change that `TRANSITIONS` does not allow; the request is unchanged."""


class Request:
    """One prompt and its output. Only the scheduler changes it.

    Args:
        request_id: unique among live requests.
        prompt_token_ids: the prompt, at least one token.
        params: what was asked of the sampler.
        max_tokens: most output tokens, already limited to what the context leaves.
        end_token_ids: the model's own end tokens.
        arrived_at: the engine's clock at arrival, in seconds.
        seed: the seed of this request's own random numbers.
        group: completions of one prompt are a group.
        cache_salt: it shares KV blocks only with requests that have the same.
        targets: what it is promised, and whom it goes before.

    Attributes:
        num_computed_tokens: tokens whose KV is computed, or will be by the batches in flight:
            whatever is scheduled next runs after those.
        num_confirmed_tokens: those of them whose batches came back: what is in flight may yet fail.
        in_flight: batches in flight that hold it; more than one only while it reads its prompt.
        num_prompt_tokens: tokens of the prompt.
        block_keys: what its full blocks can be found by, as far as that was asked (`prefix_cache`).
        num_kept_blocks: blocks of its table, from the first on, that were given to others to find.
        num_found_tokens: while it waits, tokens of its beginning whose KV was there when it came.
        num_shared_tokens: those, and those after them that others were to compute before it.
        num_cached_tokens: tokens of its prompt that were there when it was first admitted.
        is_flex: whether it takes only what the others leave.
    """

    __slots__ = (
        "arrival",
        "arrived_at",
        "block_keys",
        "block_table",
        "cache_salt",
        "end_token_ids",
        "finish_reason",
        "first_scheduled_at",
        "group",
        "in_flight",
        "is_flex",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_confirmed_tokens",
        "num_found_tokens",
        "num_kept_blocks",
        "num_preemptions",
        "num_prompt_tokens",
        "num_shared_tokens",
        "output_token_ids",
        "params",
        "pending_finish",
        "prompt_token_ids",
        "request_id",
        "seed",
        "state",
        "targets",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        end_token_ids: frozenset[int] = frozenset(),
        arrived_at: float = 0.0,
        seed: int = 0,
        group: str | None = None,
        cache_salt: str | None = None,
        targets: Targets = DEFAULT_TARGETS,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.end_token_ids = end_token_ids
        self.arrived_at = arrived_at
        self.seed = seed
        self.group = group
        self.cache_salt = cache_salt
        self.targets = targets
        self.is_flex = targets.yields
        self.arrival = (arrived_at, sys.maxsize)  # the scheduler breaks ties by order of arrival
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_confirmed_tokens = 0
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_kept_blocks = 0
        self.num_found_tokens = self.num_shared_tokens = self.num_cached_tokens = 0
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.in_flight = 0
        self.pending_finish: FinishReason | None = None  # once no longer in flight
        self.num_preemptions = 0
        self.first_scheduled_at: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of output so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens whose KV is still to be computed; none while a token is being sampled."""
        return self.num_prompt_tokens + len(self.output_token_ids) - self.num_computed_tokens

    @property
    def num_unread_tokens(self) -> int:
        """Those of them that it probably has to compute itself."""
        return self.num_remaining_tokens - self.num_shared_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens whose KV it can ever need: the last output token is never run."""
        return self.num_prompt_tokens + self.max_tokens - 1

    @property
    def is_scored(self) -> bool:
        """Whether it asks how likely the tokens of its prompt are, which takes their logits."""
        return self.params.prompt_logprobs is not None

    @property
    def is_decode(self) -> bool:
        """Whether all but the newest output token is computed."""
        num_output = len(self.output_token_ids)
        return (
            num_output > 0 and self.num_prompt_tokens + num_output - self.num_computed_tokens == 1
        )

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.state is RequestState.FINISHED

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Token ids of positions start to stop - 1, across prompt and output."""
        split = self.num_prompt_tokens
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        head = self.prompt_token_ids[start:stop]
        if stop <= split:
            return head
        return [*head, *self.output_token_ids[: stop - split]]

    def move_to(self, state: RequestState) -> None:
        """Change state.

        Raises:
            IllegalTransitionError: the table does not allow it; nothing changes.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(
                f"request {self.request_id}: {self.state.value} to {state.value}"
            )
        self.state = state

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the request ends with `token_id` as its newest output token, or None."""
        num_output, params = len(self.output_token_ids), self.params
        if num_output >= max(params.min_tokens, 1):
            if not params.ignore_eos and token_id in self.end_token_ids:
                return FinishReason.STOP
            if token_id in params.stop_token_ids:
                return FinishReason.STOP
        if num_output >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.state.value}, prompt {self.num_prompt_tokens}, "
            f"output {self.num_output_tokens}/{self.max_tokens}, "
            f"computed {self.num_computed_tokens}, blocks {len(self.block_table)})"
        )
