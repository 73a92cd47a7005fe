"""What is known of an HTTP request while it is answered: for its log line, its trace, its count.

Times are those of the engine's clock, taken where deltas reach the event loop: closer to what the
client sees than the engine's own.
"""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.outputs import Delta

OTHER = "other"  # the endpoint of a request for the documentation, or for what is not there


@dataclass(slots=True)
class GenerationNote:
    """What became of the completions of a request.

    Attributes:
        completion_id: as the response has it.
        tier: of the request.
        params: of sampling.
        num_choices: how many completions there are.
        num_prompt_tokens: of the prompts, each counted once.
        arrived_at: when the request had come.
        prompts: their texts, or token ids where there is no text; only if they may be logged.
        is_accepted: whether the engine took all of it.
        num_output_tokens: of all completions.
        scheduled_at: when one of them was scheduled first.
        first_token_at: when the first token of any came.
        last_token_at: when the newest token of any came.
        longest_gap_s: between two tokens of one of them.
        texts: of the completions, by choice; only if they may be logged.
    """

    completion_id: str
    tier: str
    params: SamplingParams
    num_choices: int
    num_prompt_tokens: int
    arrived_at: float
    prompts: list[object] | None = None
    is_accepted: bool = False
    num_output_tokens: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    longest_gap_s: float | None = None
    texts: dict[int, list[str]] = field(default_factory=dict)
    _reasons: dict[int, str] = field(default_factory=dict)
    _last_at: dict[int, float] = field(default_factory=dict)

    def add(self, choice: int, delta: Delta, now: float) -> None:
        """Note a delta of a choice."""
        if delta.finish_reason is not None:
            self._reasons[choice] = delta.finish_reason
        if self.prompts is not None and delta.text:
            self.texts.setdefault(choice, []).append(delta.text)
        if not delta.token_ids:
            return
        self.num_output_tokens += len(delta.token_ids)
        if delta.scheduled_at is not None:
            earlier = self.scheduled_at
            later = delta.scheduled_at
            self.scheduled_at = later if earlier is None else min(earlier, later)
        if self.first_token_at is None:
            self.first_token_at = now
        before = self._last_at.get(choice)
        if before is not None:
            self.longest_gap_s = max(self.longest_gap_s or 0.0, now - before)
        self._last_at[choice] = self.last_token_at = now

    @property
    def reasons(self) -> list[str]:
        """Why each choice ended, in order; "abort" for those that were cut off."""
        return [self._reasons.get(choice, "abort") for choice in range(self.num_choices)]

    @property
    def reason(self) -> str | None:
        """Why all of it ended: the worst of the choices' reasons; None if it was not accepted."""
        if not self.is_accepted:
            return None
        return next(
            reason for reason in ("error", "abort", "length", "stop") if reason in self.reasons
        )


@dataclass(slots=True)
class RequestNote:
    """An HTTP request.

    Attributes:
        request_id: of the response's header.
        method: of HTTP.
        started_at: when it came.
        keeps_text: whether prompts and answers may be logged.
        trace_headers: those that tie it to the client's trace.
        endpoint: the template of its path, or `OTHER`.
        status: of HTTP; 499 if the client left before there was one.
        refusal: the status of the answer that its connection gave in place of the application's.
        ended_at: when it ended.
        trace_id: of its trace, if there is one.
        generation: what was generated, if that is what it asked for.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    started_at: float = 0.0
    keeps_text: bool = False
    trace_headers: dict[str, str] = field(default_factory=dict)
    endpoint: str = OTHER
    status: int = 499
    refusal: int | None = None
    ended_at: float = 0.0
    trace_id: str | None = None
    generation: GenerationNote | None = None


_current: ContextVar[RequestNote] = ContextVar("request_note")


def begin_note(note: RequestNote) -> None:
    """Make a note that of the request which this task, and those it starts, answer."""
    _current.set(note)


def current_note() -> RequestNote:
    """The note of the request that is being answered; one that nobody reads outside of any."""
    return _current.get(None) or RequestNote()
