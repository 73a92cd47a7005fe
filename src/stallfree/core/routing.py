"""Which of several copies of the model a request goes to: where its first token comes first.

A copy that has read the beginning of the prompt need not read it again; so a request goes where its
prefix is, unless the wait there is longer by more than that saves. The server and the simulator
both choose by this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from stallfree.core.admission import predict_first_token_s
from stallfree.core.load import Load
from stallfree.core.pace import MeasuredPace
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler

_USUAL_S = 0.001  # to read a token, where no copy has read any
_SAME_SHARE, _SAME_S = 0.05, 0.002  # how close predictions are that say the same

_PROBE = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a copy of the model can do for a request.

    Attributes:
        wait_s: predicted seconds until it begins to read the prompt.
        token_s: predicted seconds to read a token of it; None: as in other copies.
        num_requests: that it has.
        num_known: tokens of the prompt's beginning that it need not read.
        num_before: tokens that are read before, of requests that the wait does not know of yet.
    """

    wait_s: float
    token_s: float | None
    num_requests: int = 0
    num_known: int = 0

    num_before: int = 0

    def first_token_s(self, num_tokens: int, usual_s: float) -> float:
        """Seconds to the first token of a prompt, of which at least one token is read.

        Args:
            num_tokens: of the prompt.
            usual_s: to read a token, where this is not known.
        """
        num_read = self.num_before + max(1, num_tokens - self.num_known)
        return self.wait_s + num_read * (self.token_s or usual_s)


def offer_of(scheduler: Scheduler, pace: MeasuredPace, now: float) -> Offer:
    """What a scheduler offers to a request of the usual tier that arrives now.

    Args:
        scheduler: of the copy.
        pace: at which it reads.
        now: its clock, in seconds.
    """
    probe = Request("", (0,), _PROBE, max_tokens=1, arrived_at=now)
    first_s = predict_first_token_s(probe, scheduler, pace)
    assert first_s is not None, "there is always a pace"
    token_s = 1 / pace(Load(scheduler.running))[0]
    num_requests = len(scheduler.running) + len(scheduler.waiting)
    wait_s = max(0.0, first_s - token_s)
    return Offer(wait_s, None if pace.is_guess else token_s, num_requests)


def choose(offers: Sequence[Offer], num_tokens: int) -> int:
    """Index of the offer to take for a prompt of `num_tokens`.

    Of those whose predictions say the same, the one with the fewest requests; then the one that
    knows most of the prompt; then the first.
    """
    known = [offer.token_s for offer in offers if offer.token_s is not None]
    usual_s = median(known) if known else _USUAL_S
    times = [offer.first_token_s(num_tokens, usual_s) for offer in offers]
    limit_s = min(times) * (1 + _SAME_SHARE) + _SAME_S
    near = [index for index, first_s in enumerate(times) if first_s <= limit_s]
    return min(near, key=lambda index: (offers[index].num_requests, -offers[index].num_known))
