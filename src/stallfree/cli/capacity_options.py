"""The flags of every command that searches for a capacity, and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from stallfree.bench.capacity import Criterion
from stallfree.bench.capacity_search import MAX_QPS, MIN_QPS, SearchSettings
from stallfree.cli.bench_serve import check_outputs
from stallfree.cli.drawn_workload import DrawnWorkload
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.flags import check_range, parse_duration
from stallfree.errors import ConfigError

MAX_DELAY, SEEDS, PRECISION, MIN_DURATION = "2s", 3, "2.5%", "60s"
_PANEL = "Search"

TbtOption = Annotated[
    str,
    typer.Option(
        metavar="TIME[,TIME]",
        help="Target for the P99 of all times between tokens: 200ms. Several share their runs.",
        rich_help_panel=_PANEL,
    ),
]
DelayOption = Annotated[
    str,
    typer.Option(
        metavar="TIME", help="Most of the median scheduling delay.", rich_help_panel=_PANEL
    ),
]
SeedsOption = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="SEEDS",
        help="How many draws of the workload have a search of their own; the first has "
        "--workload-seed.",
        rich_help_panel=_PANEL,
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="SHARE", help="How near the lowest rate that fails must be.", rich_help_panel=_PANEL
    ),
]
MinDurationOption = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Least time over which the requests of a run arrive: where --num-requests would "
        "arrive sooner, there are more. An overload takes time to show.",
        rich_help_panel=_PANEL,
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Keep each run's numbers here, and take from here what was measured already of the "
        "same system and workload.",
        rich_help_panel=_PANEL,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="Also write the capacities and all runs here.",
        rich_help_panel="Output",
    ),
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is searched for.

    Attributes:
        criteria: one for each target; they differ in nothing else.
        settings: of the search.
        min_duration_s: least time over which the requests of a run arrive.
        state: where runs are kept; None for nowhere.
        output: where the capacities are written too; None for nowhere.
    """

    criteria: Sequence[Criterion]
    settings: SearchSettings
    min_duration_s: float
    state: Path | None
    output: Path | None

    @property
    def loosest(self) -> Criterion:
        """The criterion that is met wherever another is."""
        return max(self.criteria, key=lambda each: each.tbt_s)


def read_wanted(
    workload: WorkloadSettings,
    slo_tbt: str,
    max_delay: str,
    seeds: int,
    precision: str,
    min_duration: str,
    state: Path | None,
    output: Path | None,
) -> Wanted:
    """What the flags ask for.

    Raises:
        ConfigError: a value makes no sense, seeds would not differ, or the output cannot be
            written.
    """
    check_outputs(output)
    check_range("qps", workload.qps, MIN_QPS, MAX_QPS)
    criteria = read_criteria(slo_tbt, max_delay)
    settings = SearchSettings(
        seeds=tuple(range(workload.workload_seed, workload.workload_seed + seeds)),
        start_qps=1.0 if workload.qps is None else workload.qps,
        precision=read_share(precision),
    )
    DrawnWorkload(workload).check_seeds(settings.seeds)
    return Wanted(criteria, settings, _duration("min-duration", min_duration), state, output)


def read_criteria(slo_tbt: str, max_delay: str) -> list[Criterion]:
    """The criteria of `--slo-tbt` and `--max-delay`.

    Raises:
        ConfigError: a time is none, or there twice.
    """
    delay_s = _duration("max-delay", max_delay)
    targets = [_duration("slo-tbt", each) for each in slo_tbt.split(",")]
    if len(set(targets)) < len(targets):
        raise ConfigError(f"slo-tbt is {slo_tbt!r}; a target is there twice")
    return [Criterion(tbt_s, delay_s) for tbt_s in targets]


def _duration(name: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_share(text: str) -> float:
    """Read a share: `2.5%` or `0.025`.

    Raises:
        ConfigError: it is neither.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) if not rest else None
    except ValueError:
        value = None
    if value is None:
        raise ConfigError(f"precision is {text!r}; write it as 2.5% or 0.025")
    return value / 100 if percent else value
