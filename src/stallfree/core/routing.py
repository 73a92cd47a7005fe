"""Which of several copies of the model a request goes to: where its first token comes first.

A copy that has read the beginning of the prompt need not read it again; so a request goes where its
prefix is, unless the wait there is longer by more than that saves. The server and the simulator
both choose by this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stallfree.core.admission import Pace, predict_first_token_s
from stallfree.core.load import Load
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler

_SAME_SHARE, _SAME_S = 0.05, 0.002  # how close predictions are that say the same

_PROBE = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a copy of the model can do for a request.

    Attributes:
        wait_s: predicted seconds until it begins to read the prompt.
        token_s: predicted seconds to read a token of it.
        num_requests: that it has.
        num_known: tokens of the prompt's beginning that it need not read.
    """

    wait_s: float
    token_s: float
    num_requests: int = 0
    num_known: int = 0

    def first_token_s(self, num_tokens: int) -> float:
        """Seconds to the first token of a prompt, of which at least one token is read."""
        return self.wait_s + self.token_s * max(1, num_tokens - self.num_known)

    def behind(self, num_tokens: int, num_requests: int, num_known: int) -> Offer:
        """For a request behind others, of which the wait does not know yet.

        Args:
            num_tokens: that are read before.
            num_requests: that there are then.
            num_known: tokens of this prompt that need not be read.
        """
        wait_s = self.wait_s + num_tokens * self.token_s
        return replace(self, wait_s=wait_s, num_requests=num_requests, num_known=num_known)


def offer_of(scheduler: Scheduler, pace_of: Pace, now: float) -> Offer:
    """What a scheduler offers to a request of the usual tier that arrives now.

    Args:
        scheduler: of the copy.
        pace_of: always knows a pace.
        now: its clock, in seconds.
    """
    probe = Request("", (0,), _PROBE, max_tokens=1, arrived_at=now)
    first_s = predict_first_token_s(probe, scheduler, pace_of)
    pace = pace_of(Load(scheduler.running))
    assert first_s is not None, "the pace is known"
    assert pace is not None, "the pace is known"
    token_s = 1 / pace[0]
    num_requests = len(scheduler.running) + len(scheduler.waiting)
    return Offer(max(0.0, first_s - token_s), token_s, num_requests)


def choose(offers: Sequence[Offer], num_tokens: int) -> int:
    """Index of the offer to take for a prompt of `num_tokens`.

    Of those whose predictions say the same, the one with the fewest requests; then the one that
    knows most of the prompt; then the first.
    """
    times = [offer.first_token_s(num_tokens) for offer in offers]
    limit_s = min(times) * (1 + _SAME_SHARE) + _SAME_S
    near = [index for index, first_s in enumerate(times) if first_s <= limit_s]
    return min(near, key=lambda index: (offers[index].num_requests, -offers[index].num_known))
