"""`stallfree bench capacity`: the highest rate of requests at which a server keeps an SLO."""

from __future__ import annotations

from typing import Annotated

import typer

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
from stallfree.cli.endpoint_options import EndpointSettings
from stallfree.cli.workload_options import WorkloadSettings


def capacity(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Where the server is: http://127.0.0.1:8000"),
    ],
    workload: WorkloadSettings,
    endpoint: EndpointSettings,
    slo_tbt: TbtOption,
    max_delay: DelayOption = MAX_DELAY,
    seeds: SeedsOption = SEEDS,
    precision: PrecisionOption = PRECISION,
    min_duration: MinDurationOption = MIN_DURATION,
    state: StateOption = None,
    output: OutputOption = None,
) -> None:
    """Find the highest rate of requests at which a server keeps an SLO.

    A rate passes if no request fails, the P99 of the time between tokens is within the target and
    the median request waits at most --max-delay to be begun with. Rates are doubled or halved from
    --qps on (1 unless given), then the gap between passed and failed is halved until it is within
    the precision. Each seed has a search of its own, which gives the interval. Every run lasts
    until its last answer, so the next one finds the server idle. Ctrl-C ends the search.

    A run must offer its requests for some twenty times --max-delay, or an overload shows too late
    and the capacity is overestimated: --min-duration. A run whose requests were sent late does not
    pass.

    The server's own settings are not known here: take a new --state when they change.
    """
    from stallfree.cli.capacity_search import search_capacity
    from stallfree.cli.live_system import LiveSystem

    wanted = read_wanted(
        workload, slo_tbt, max_delay, seeds, precision, min_duration, state, output
    )
    search_capacity(LiveSystem(endpoint.endpoint(url), workload, wanted.min_duration_s), wanted)
