"""`stallfree bench simulated-capacity`: the same search on hardware that is not here."""

from __future__ import annotations

from stallfree.cli.capacity_options import (
    MAX_DELAY,
    MIN_DURATION,
    PRECISION,
    SEEDS,
    DelayOption,
    MinDurationOption,
    OutputOption,
    PrecisionOption,
    SeedsOption,
    StateOption,
    TbtOption,
    read_wanted,
)
from stallfree.cli.simulate import ReplicasOption, RouterOption, speed_line
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.scheduling_settings import SchedulingSettings


def simulated_capacity(
    system: SystemSettings,
    scheduling: SchedulingSettings,
    workload: WorkloadSettings,
    slo_tbt: TbtOption,
    max_delay: DelayOption = MAX_DELAY,
    seeds: SeedsOption = SEEDS,
    precision: PrecisionOption = PRECISION,
    min_duration: MinDurationOption = MIN_DURATION,
    replicas: ReplicasOption = 1,
    router: RouterOption = "least-work",
    state: StateOption = None,
    output: OutputOption = None,
) -> None:
    """Find the highest rate of requests at which simulated hardware keeps an SLO.

    The search and its flags are those of `stallfree bench capacity`, each run is one of `stallfree
    simulate`. A run is given up as soon as it cannot pass under the loosest --slo-tbt any more;
    what it would have shown beyond that is not known. Here too, a run must offer its requests for
    some twenty times --max-delay: --min-duration.

    Without --token-budget and --tbt-slo, an iteration holds 512 tokens on any device. Simulated
    requests have no users and no tiers, so --fair and --tier are refused.
    """
    from rich.console import Console

    from stallfree.cli.capacity_search import search_capacity
    from stallfree.cli.simulated_system import SimulatedSystem

    wanted = read_wanted(
        workload, slo_tbt, max_delay, seeds, precision, min_duration, state, output
    )
    simulated = SimulatedSystem(
        *(system, scheduling, workload, replicas, router, wanted.loosest, wanted.min_duration_s)
    )
    search_capacity(simulated, wanted)
    line = speed_line(simulated.simulated_s, simulated.seconds, simulated.num_iterations)
    Console().print(line, highlight=False, soft_wrap=True)
