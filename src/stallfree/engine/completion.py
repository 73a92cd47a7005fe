"""One completion as its client sees it: tokens in, deltas out."""

from __future__ import annotations

from stallfree.core.request import Request
from stallfree.engine.detokenizer import Detokenizer, StopStrings, TokenBytes
from stallfree.engine.outputs import Delta
from stallfree.executor.output import PositionLogprobs, Sample


class Completion:
    """The text of one request as it grows.

    Args:
        request_id: the client's, shared by its n completions.
        index: which of the n.
        request: the scheduler's request; only read.
        tokenizer: turns tokens into text.
    """

    def __init__(
        self, request_id: str, index: int, request: Request, tokenizer: TokenBytes
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.request = request
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.params.stop)
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * request.num_prompt_tokens

    def add_prompt_logprobs(self, start: int, logprobs: tuple[PositionLogprobs, ...]) -> None:
        """Keep those of positions `start + 1` on, which a chunk from `start` gave."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs[start + 1 : start + 1 + len(logprobs)] = logprobs

    def add(self, sample: Sample) -> Delta:
        """What a sampled token adds, after the scheduler took it."""
        request = self.request
        finish = request.finish_reason.value if request.finish_reason else None
        is_end = finish == "stop"
        text = "" if is_end else self._detokenizer.add(sample.token_id)
        if finish:
            text += self._detokenizer.finish()
        may_stop = request.num_output_tokens >= request.params.min_tokens
        text, stop = self._stops.add(text, may_stop=may_stop)
        stop_reason: str | int | None = stop
        if stop is not None:
            finish = "stop"
        elif finish:
            text += self._stops.finish()
            if is_end and sample.token_id in request.params.stop_token_ids:
                stop_reason = sample.token_id
        return Delta(
            request_id=self.request_id,
            index=self.index,
            text=text,
            token_ids=(sample.token_id,),
            logprobs=None if sample.logprobs is None else (sample.logprobs,),
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=finish,
            stop_reason=stop_reason,
            scheduled_at=request.first_scheduled_at,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _take_prompt_logprobs(self) -> tuple[PositionLogprobs | None, ...] | None:
        if self._prompt_logprobs is None:
            return None
        taken, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        return taken
