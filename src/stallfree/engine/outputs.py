"""What the engine reports: the growth of each completion, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from stallfree.errors import EngineError
from stallfree.executor.output import PositionLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What one iteration added to one completion.

    Attributes:
        request_id: the id given to `Engine.add`.
        index: which of the n completions.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: the new tokens, an end token included.
        logprobs: one for each of `token_ids`, if asked for.
        prompt_logprobs: one for each prompt token (None for the first), if asked for; once, with
            the first delta of index 0.
        finish_reason: "stop", "length", "abort" or "error" in the last delta, else None.
        stop_reason: the stop string or stop token id that ended it, if one did.
        error: what went wrong, if finish_reason is "error" or "abort".
        scheduled_at: the engine's clock when the completion was first scheduled.
        num_cached_tokens: tokens of its prompt whose KV was there then.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: EngineError | None = None
    scheduled_at: float | None = None
    num_cached_tokens: int = 0
