"""Who is refused at once, because too much waits or the first token would come too late.

A refusal that costs nothing and says when to come back is worth more than an answer after the
client has given up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stallfree.core.load import Load
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.errors import OverloadedError

_RETRY_AFTER_S = 5.0  # where nothing is predicted


@dataclass(frozen=True, slots=True)
class Admission:
    """Limits on what may wait.

    Attributes:
        max_queued_requests: most waiting requests, or None.
        max_queued_tokens: most tokens of waiting prompts, or None; one alone may always wait.
        slo_factor: most that the predicted time to the first token may be of its target, or None.
    """

    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    slo_factor: float | None = None

    def check(self, request: Request, scheduler: Scheduler) -> float | None:
        """Predict the seconds to the first token of a request that is about to be added.

        Returns:
            The prediction; None if the scheduler's budget predicts nothing.

        Raises:
            OverloadedError: the request is refused.
        """
        predicted_s = predict_first_token_s(request, scheduler)
        waiting = scheduler.waiting
        retry_after_s = _RETRY_AFTER_S if predicted_s is None else predicted_s
        if self.max_queued_requests is not None and len(waiting) >= self.max_queued_requests:
            raise OverloadedError(
                f"{len(waiting)} requests wait, and no more than {self.max_queued_requests} may",
                retry_after_s,
            )
        num_tokens = waiting.num_tokens + request.num_prompt_tokens
        limit = self.max_queued_tokens
        if limit is not None and len(waiting) and num_tokens > limit:
            raise OverloadedError(
                f"the prompt has {request.num_prompt_tokens} tokens, {waiting.num_tokens} wait, "
                f"and together no more than {limit} may",
                retry_after_s,
            )
        target_s = request.targets.ttft_s
        if self.slo_factor is None or predicted_s is None or target_s is None:
            return predicted_s
        if predicted_s > self.slo_factor * target_s:
            raise OverloadedError(
                f"the first token is predicted to come after {predicted_s:.1f} s; the target is "
                f"{target_s:g} s, and {self.slo_factor:g} times that is the limit",
                predicted_s - self.slo_factor * target_s,
            )
        return predicted_s


def predict_first_token_s(request: Request, scheduler: Scheduler) -> float | None:
    """When a new request would get its first token, in seconds from now.

    What goes before it is read at the present pace. If there is no place for it, it also waits
    until enough of those that run have ended, all at their longest. Free memory is not predicted.
    None if the budget predicts nothing.
    """
    load = Load(scheduler.running)
    pace = scheduler.budget.pace(load)
    if pace is None:
        return None
    tokens_per_s, step_s = pace
    num_tokens, num_waiting = scheduler.tokens_ahead(request)
    reading_s = (num_tokens + request.num_tokens) / tokens_per_s + step_s
    places = scheduler.config.max_num_seqs - len(scheduler.running)
    allowed = scheduler.budget.admissions(load)
    if allowed is not None:
        places = min(places, allowed)
    missing = num_waiting + 1 - places
    if missing <= 0 or not scheduler.running:
        return reading_s
    left = sorted(each.max_tokens - each.num_output_tokens for each in scheduler.running)
    rounds = math.ceil(missing / len(left))
    waiting_s = step_s * left[min(missing, len(left)) - 1] * rounds
    return max(reading_s, waiting_s)
