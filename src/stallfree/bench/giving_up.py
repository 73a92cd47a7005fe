"""When a run is given up: as soon as it is certain that it cannot pass.

It knows the whole workload, and of the run only the requests that have ended. Nothing here knows
how they are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallfree.bench.capacity import Criterion
from stallfree.bench.metrics import num_above
from stallfree.bench.records import Record
from stallfree.bench.workload import Workload

_MEDIAN = 0.5


@dataclass(frozen=True, slots=True)
class Limit:
    """What a percentile of times has to be within.

    Attributes:
        seconds: at most.
        quantile: which percentile.
    """

    seconds: float
    quantile: float


class GiveUp:
    """Says of each request that ended whether the run has failed with it, whatever is to come.

    That is so once one failed, or more times are too long than may be of all that the workload will
    have. It holds for answers that have the lengths that were planned, and for systems that tell
    their delays.

    Args:
        workload: all of it.
        tbt: of times between tokens; None for no limit.
        ttft: of times to the first token.
        delay: of scheduling delays.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        tbt: Limit | None = None,
        ttft: Limit | None = None,
        delay: Limit | None = None,
    ) -> None:
        count = len(workload.arrivals)
        num_gaps = sum(each.output_tokens - 1 for each in workload.arrivals)
        rules = ((tbt, num_gaps, _gaps_s), (ttft, count, _ttft_s), (delay, count, _delay_s))
        self._allowances = [
            _Allowance(limit, planned, times) for limit, planned, times in rules if limit
        ]

    @classmethod
    def beyond(cls, criterion: Criterion, workload: Workload) -> GiveUp:
        """The rule for runs that are judged by a criterion, or by tighter ones too."""
        return cls(
            workload,
            tbt=Limit(criterion.tbt_s, criterion.quantile),
            delay=Limit(criterion.max_delay_s, _MEDIAN),
        )

    def __call__(self, record: Record) -> bool:
        """Whether the run has failed, now that a request ended; each is to be told once."""
        spent = [each.is_spent_with(record) for each in self._allowances]  # all have to be told
        return record.failure is not None or any(spent)


class _Allowance:
    """How many of the times that a workload will have may still be too long."""

    def __init__(
        self, limit: Limit, planned: int, times: Callable[[Record], Sequence[float]]
    ) -> None:
        self._limit_s, self._times = limit.seconds, times
        self._left = num_above(planned, limit.quantile)

    def is_spent_with(self, record: Record) -> bool:
        self._left -= sum(seconds > self._limit_s for seconds in self._times(record))
        return self._left < 0


def _gaps_s(record: Record) -> Sequence[float]:
    return record.gaps_s


def _ttft_s(record: Record) -> Sequence[float]:
    return [] if record.ttft_s is None else [record.ttft_s]


def _delay_s(record: Record) -> Sequence[float]:
    return [] if record.scheduling_delay_s is None else [record.scheduling_delay_s]
