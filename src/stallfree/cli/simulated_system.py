"""Simulated hardware under load, as a capacity search sees it: a rate and a seed in, a run out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

from stallfree.bench.capacity import Criterion
from stallfree.bench.giving_up import GiveUp
from stallfree.bench.progress import OnProgress, Progress
from stallfree.bench.records import Record, Results
from stallfree.bench.workload import Workload
from stallfree.cli.drawn_workload import DrawnWorkload
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.replica import Replica
from stallfree.sim.router import make_router
from stallfree.sim.simulation import simulate

_REFRESH_S = 0.2


class SimulatedSystem:
    """Replicas that runs of one workload are simulated on: any draw of it, at any rate.

    Args:
        system: what is simulated.
        scheduling: of each replica.
        workload: its rate is not looked at.
        replicas: how many there are behind the router.
        router: the name of that.
        loosest: the criterion beyond which a run is given up.
        min_duration_s: see `DrawnWorkload`.

    Attributes:
        simulated_s, num_iterations: of all runs so far.
        seconds: that these took.

    Raises:
        ConfigError: a setting is wrong, or the workload is a closed loop.
    """

    def __init__(
        self,
        system: SystemSettings,
        scheduling: SchedulingSettings,
        workload: WorkloadSettings,
        replicas: int,
        router: str,
        loosest: Criterion,
        min_duration_s: float = 0.0,
    ) -> None:
        make_router(router)
        self.simulated_s = self.seconds = 0.0
        self.num_iterations = 0
        self._system = system.system(scheduling)
        self._drawn = DrawnWorkload(workload, self._system.max_model_len, min_duration_s)
        self._num_replicas, self._router, self._loosest = replicas, router, loosest
        self._facts = {
            "system": system.facts(),
            "scheduling": asdict(scheduling),
            "replicas": replicas,
            "router": router,
            "stallfree": version("stallfree"),
        }

    def facts(self) -> Mapping[str, object]:
        """All that a run depends on, that it is given up included."""
        return {**self._facts, **self._drawn.facts(), "given_up_beyond": asdict(self._loosest)}

    def measure_unloaded(self) -> None:
        """Nothing: a simulation tells when it begins with a request."""

    def measure(self, qps: float, seed: int, on_progress: OnProgress | None = None) -> Results:
        """One run, incomplete if it was given up."""
        workload = self._drawn.at_rate(qps, seed)
        copies = self._system.replicas(self._num_replicas, seed)
        give_up: Callable[[Record], bool] = GiveUp.beyond(self._loosest, workload)
        if on_progress is not None:
            give_up = _Watched(give_up, workload, copies, on_progress)
        started = time.perf_counter()
        done = simulate(workload, copies, make_router(self._router), give_up=give_up)
        self.seconds += time.perf_counter() - started
        self.simulated_s += done.results.end_s
        self.num_iterations += sum(replica.num_iterations for replica in copies)
        return done.results


class _Watched:
    """A rule that also tells how far the run is, a few times a second."""

    def __init__(
        self,
        rule: Callable[[Record], bool],
        workload: Workload,
        replicas: Sequence[Replica],
        on_progress: OnProgress,
    ) -> None:
        self._rule, self._replicas, self._on_progress = rule, replicas, on_progress
        self._num_planned = len(workload.arrivals)
        self._num_answered = self._num_failed = self._num_tokens = 0
        self._told_at = time.monotonic()

    def __call__(self, record: Record) -> bool:
        is_failure = record.failure is not None
        self._num_failed += is_failure
        self._num_answered += not is_failure
        self._num_tokens += len(record.token_s)
        if time.monotonic() - self._told_at >= _REFRESH_S:
            self._told_at = time.monotonic()
            self._on_progress(self._progress())
        return self._rule(record)

    def _progress(self) -> Progress:
        num_ended = self._num_answered + self._num_failed
        return Progress(
            elapsed_s=max(replica.clock.now() for replica in self._replicas),
            num_planned=self._num_planned,
            num_sent=num_ended + sum(replica.num_requests for replica in self._replicas),
            num_answered=self._num_answered,
            num_failed=self._num_failed,
            num_tokens=self._num_tokens,
        )
