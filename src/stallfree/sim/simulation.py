"""A workload against simulated replicas, event by event."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stallfree.bench.records import Record, Results
from stallfree.bench.workload import Arrival, Workload
from stallfree.sim.replica import Replica
from stallfree.sim.router import Router


@dataclass(slots=True)
class Simulation:
    """What a simulation gives: the same results as a live run, and what only it can see.

    Attributes:
        results: as clients of a live run would have seen them.
        replicas: in their last state: iterations, preemptions, what each stage did.
    """

    results: Results
    replicas: Sequence[Replica]


def simulate(
    workload: Workload,
    replicas: Sequence[Replica],
    router: Router,
    *,
    facts: Mapping[str, object] | None = None,
    give_up: Callable[[Record], bool] | None = None,
) -> Simulation:
    """Run a workload to its end.

    Args:
        workload: what arrives.
        replicas: new ones.
        router: chooses among them.
        facts: for the results.
        give_up: looks at each request that ended; if it says so, the run ends there, incomplete.
    """
    waiting = deque(workload.arrivals)
    records: list[Record] = []
    starts_open = workload.clients is None
    num_clients = 0 if starts_open else min(workload.clients or 0, len(waiting))
    due: deque[float] = deque([0.0] * num_clients)  # when clients of a closed loop are free
    gave_up = False

    def arrive() -> None:
        arrival = waiting.popleft()
        if not starts_open:
            arrival = replace(arrival, at_s=due.popleft())
        record = Record(arrival)
        records.append(record)
        place = router.choose(arrival, replicas) if len(replicas) > 1 else 0
        if not replicas[place].add(record, arrival.at_s):
            ended(record)

    def ended(record: Record) -> None:
        nonlocal gave_up
        gave_up = gave_up or (give_up is not None and give_up(record))
        if not starts_open and record.end_s is not None:
            due.append(record.end_s)

    while not gave_up:
        arrives_at = _next_arrival(waiting, due, starts_open)
        first = min(replicas, key=_next_at) if len(replicas) > 1 else replicas[0]
        if arrives_at <= first.next_at:
            if arrives_at == float("inf"):
                break
            arrive()
        else:
            is_alone = starts_open or len(replicas) == 1
            for record in first.advance(arrives_at if is_alone else -math.inf):
                ended(record)
    end_s = max(replica.clock.now() for replica in replicas)
    for replica in replicas:
        for record in replica.open_records():
            record.output_tokens = len(record.token_s)
    results = Results(workload, records, end_s, facts=facts or {}, is_complete=not gave_up)
    return Simulation(results, replicas)


def _next_at(replica: Replica) -> float:
    return replica.next_at


def _next_arrival(waiting: Sequence[Arrival], due: Sequence[float], is_open: bool) -> float:
    if not waiting:
        return float("inf")
    if is_open:
        return waiting[0].at_s
    return due[0] if due else float("inf")
