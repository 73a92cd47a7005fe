"""When a run is given up: as soon as it is certain that it cannot pass.

It knows the whole workload, and of the run only the requests that have ended. Nothing here knows
how they are run.
"""

from __future__ import annotations

from stallfree.bench.capacity import Criterion
from stallfree.bench.metrics import num_above
from stallfree.bench.records import Record
from stallfree.bench.workload import Workload

_MEDIAN = 0.5


class GiveUp:
    """Says of each request that ended whether the run has failed with it, whatever is to come.

    That is so once one failed, or more times between tokens, or more delays, are too long than may
    be of all that the workload will have. It holds for answers that have the lengths that were
    planned, and for systems that tell their delays.

    Args:
        workload: all of it.
        criterion: the loosest that the run is judged by.
    """

    def __init__(self, workload: Workload, criterion: Criterion) -> None:
        self._criterion = criterion
        num_gaps = sum(each.output_tokens - 1 for each in workload.arrivals)
        self._gaps_left = num_above(num_gaps, criterion.quantile)
        self._delays_left = num_above(len(workload.arrivals), _MEDIAN)

    def __call__(self, record: Record) -> bool:
        """Whether the run has failed, now that a request ended; each is to be told once."""
        delay_s, limit_s = record.scheduling_delay_s, self._criterion.tbt_s
        self._gaps_left -= sum(gap > limit_s for gap in record.gaps_s)
        self._delays_left -= delay_s is not None and delay_s > self._criterion.max_delay_s
        return record.failure is not None or self._gaps_left < 0 or self._delays_left < 0
