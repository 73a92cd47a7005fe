"""How many replicas a workload needs: the fewest whose simulation keeps its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stallfree.bench.giving_up import GiveUp, Limit
from stallfree.bench.metrics import Slo, Summary, summarize
from stallfree.bench.workload import Workload
from stallfree.sim.router import Router
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System

MAX_DELAY_S = 2.0  # of the median request, where there is no target for the first token


@dataclass(frozen=True, slots=True)
class Trial:
    """A number of replicas, and what came of it.

    Attributes:
        replicas: how many.
        summary: of the requests until then.
        keeps: whether nobody failed and P99 of each time that has a target is within it.
        is_complete: whether the workload was run to its end, not given up as hopeless.
    """

    replicas: int
    summary: Summary
    keeps: bool
    is_complete: bool = True


def keeps(summary: Summary, slo: Slo) -> bool:
    """Whether nobody failed, and P99 of each time that has a target is within it.

    Without a target for the first token, half of all requests must be begun with in two seconds,
    as in the paper's definition of capacity.
    """
    if summary.failures or summary.num_answered < summary.num_requests:
        return False
    own = summary.latencies
    if slo.tbt_s is not None and own["tbt"]["p99"] > slo.tbt_s:
        return False
    if slo.ttft_s is not None:
        return own["ttft"]["p99"] <= slo.ttft_s
    return own["scheduling_delay"]["p50"] <= MAX_DELAY_S


def find_replicas(
    workload: Workload,
    system: System,
    router: Callable[[], Router],
    slo: Slo,
    most: int,
    on_trial: Callable[[Trial], None] | None = None,
) -> int | None:
    """The fewest replicas that keep the targets; None if `most` do not.

    Their number is doubled until they do, then the gap is halved. A run is given up as soon as more
    times are too long than may be, whatever is to come.

    Args:
        workload: in an open loop.
        system: of each replica.
        router: makes a new one.
        slo: the targets.
        most: where to give up.
        on_trial: called after each trial.
    """

    def works(replicas: int) -> bool:
        copies = system.replicas(replicas)
        done = simulate(workload, copies, router(), give_up=_rule(workload, slo)).results
        summary = summarize(done, slo)
        is_kept = done.is_complete and keeps(summary, slo)
        trial = Trial(replicas, summary, is_kept, done.is_complete)
        if on_trial:
            on_trial(trial)
        return trial.keeps

    low, high = 0, 1
    while not works(high):
        if high == most:
            return None
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _rule(workload: Workload, slo: Slo) -> GiveUp:
    """Gives up where `keeps` cannot be true any more."""
    return GiveUp(
        workload,
        tbt=None if slo.tbt_s is None else Limit(slo.tbt_s, 0.99),
        ttft=None if slo.ttft_s is None else Limit(slo.ttft_s, 0.99),
        delay=Limit(MAX_DELAY_S, 0.5) if slo.ttft_s is None else None,
    )
