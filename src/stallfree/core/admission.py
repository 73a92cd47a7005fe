"""Who is refused at once, because too much waits or the first token would come too late.

A refusal that costs nothing and says when to come back is worth more than an answer after the
client has given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stallfree.core.load import Load
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.errors import InvalidRequestError, OverloadedError

_RETRY_AFTER_S = 5.0  # where nothing is predicted
_LONGEST_RETRY_S = 600.0

# Beside what runs: tokens of prompts read in a second, and seconds of an iteration; None if not
# known.
Pace = Callable[[Load], tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Admission:
    """Limits on what may wait.

    Attributes:
        max_queued_requests: most waiting requests, or None; if none waits, one may always.
        max_queued_tokens: most tokens of waiting prompts, or None; if none waits, one may always.
        slo_factor: most that the predicted time to the first token may be of its target, or None.
    """

    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    slo_factor: float | None = None

    def check(self, request: Request, count: int, scheduler: Scheduler) -> float | None:
        """Judge a request that is about to be added.

        Only what would go before it counts: of its own tier, and of those that go before that.

        Args:
            request: the request, not added yet.
            count: how many completions of its prompt there are.
            scheduler: where it would wait.

        Returns:
            The predicted seconds to its first token, if they are limited.

        Raises:
            OverloadedError: it is refused.
            InvalidRequestError: it could not be answered within its target by an idle server.
        """
        scheduler.foresee(request)
        self._check_queue(request, count, scheduler)
        target_s = request.targets.ttft_s
        if self.slo_factor is None:
            return None
        predicted_s = predict_first_token_s(request, scheduler)
        if predicted_s is None or target_s is None:
            return predicted_s
        limit_s = self.slo_factor * target_s
        if predicted_s <= limit_s:
            return predicted_s
        alone_s = _reading_s(request.num_unread_tokens, Load(()), scheduler.budget.pace)
        if alone_s is not None and alone_s > limit_s:
            raise InvalidRequestError(
                f"reading the prompt of {request.num_prompt_tokens} tokens takes {alone_s:.1f} s, "
                f"longer than {self.slo_factor:g} times the target of {target_s:g} s to the first "
                "token: allow more with ttft_slo_ms",
                "ttft_slo_ms",
            )
        raise OverloadedError(
            f"the first token is predicted to come after {predicted_s:.1f} s; the target is "
            f"{target_s:g} s, and {self.slo_factor:g} times that is the limit",
            min(predicted_s - limit_s, _LONGEST_RETRY_S),
        )

    def _check_queue(self, request: Request, count: int, scheduler: Scheduler) -> None:
        """Where the last iteration left nobody waiting, as many more may as there are places."""
        rank, waiting = request.targets.rank, scheduler.waiting
        num_waiting, num_tokens = waiting.num_requests(rank), waiting.num_tokens(rank)
        if num_waiting == 0:
            return
        places = 0
        if scheduler.num_left_waiting[rank] == 0:
            places = max(0, scheduler.config.max_num_seqs - len(scheduler.running))
        limit = self.max_queued_requests
        reason = None
        if limit is not None and num_waiting + count > limit + places:
            reason = f"{num_waiting} requests wait, and no more than {limit + places} may"
        limit = self.max_queued_tokens
        if limit is not None and num_tokens + request.num_unread_tokens > limit:
            kind = " that are not cached" if request.num_shared_tokens else ""
            reason = (
                f"the prompt has {request.num_unread_tokens} tokens{kind}, {num_tokens} wait, and "
                f"together no more than {limit} may"
            )
        if reason is not None:
            predicted_s = predict_first_token_s(request, scheduler)
            retry_s = _RETRY_AFTER_S if predicted_s is None else predicted_s
            raise OverloadedError(reason, min(retry_s, _LONGEST_RETRY_S))


def predict_first_token_s(
    request: Request, scheduler: Scheduler, pace_of: Pace | None = None
) -> float | None:
    """When a new request would get its first token, in seconds from now.

    What goes before it is read at the present pace. If there is no place for it, it also waits
    until enough of those that run have ended, which are taken to be as long as the last answers
    were. Free memory is not predicted. None if no pace is known.

    Args:
        request: not added yet.
        scheduler: where it would wait.
        pace_of: the pace beside what runs; None for what the budget predicts.
    """
    running = [each for each in scheduler.running if request.is_flex or not each.is_flex]
    load, budget = Load(running), scheduler.budget
    pace_of = pace_of or budget.pace
    num_tokens, num_waiting = scheduler.outlook.tokens_ahead(request)
    reading_s = _reading_s(num_tokens + request.num_unread_tokens, load, pace_of)
    pace = pace_of(load)
    if reading_s is None or pace is None or not running:
        return reading_s
    places = scheduler.config.max_num_seqs - len(running)
    if budget.admissions(load, [request.num_tokens]) == 0:
        places = 0  # as many decode as the target allows
    missing = num_waiting + 1 - places
    if missing <= 0:
        return reading_s
    left = sorted(scheduler.outlook.tokens_left(each) for each in running)
    rounds = math.ceil(missing / len(left))
    return max(reading_s, pace[1] * left[min(missing, len(left)) - 1] * rounds)


def _reading_s(num_tokens: int, load: Load, pace_of: Pace) -> float | None:
    """Seconds to read so many tokens of prompts beside what runs, if they can be predicted.

    With half of the iteration that is under way, where something runs.
    """
    pace = pace_of(load)
    if pace is None:
        return None
    is_busy = bool(load.decodes or load.flex_decodes or load.prefills)
    return num_tokens / pace[0] + pace[1] / 2 * is_busy
