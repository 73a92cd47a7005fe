"""Which cells each experiment has, and running them on all processors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import sweeps
from rich.progress import Progress
from systems import DATASETS, SYSTEMS

TARGETS = ("strict", "relaxed")
SCHEDULERS = ("sarathi", "sarathi --tbt-slo", "vllm", "orca")
CAPACITY_SCHEDULERS = (*SCHEDULERS, "faster_transformer")
OVERHEAD_SYSTEM = "Yi-34B"  # whose overhead is published
OVERHEAD_SCHEDULERS = ("sarathi", "vllm", "orca")
CURVE_QPS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
SPLITS, SPLIT_QPS = ((8, 1), (4, 2)), (0.3, 0.6, 0.9, 1.2)
PIPELINE_QPS = 0.6
ABLATION_QPS = {
    "openchat_sharegpt4": tuple(round(0.5 + 0.1 * step, 2) for step in range(8)),
    "arxiv_summarization": tuple(round(0.3 + 0.0125 * step, 4) for step in range(8)),
}
ABLATION_POLICIES = ("hybrid_only", "simple_chunking", "sarathi")

Cell = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]


def capacity_cells(names: Sequence[str] = tuple(SYSTEMS)) -> list[Cell]:
    """Every policy, system, target and dataset; one system with the artifact's overhead too."""
    cells: list[Cell] = [
        (sweeps.capacity, (*place, False))
        for place in itertools.product(names, TARGETS, DATASETS, CAPACITY_SCHEDULERS)
    ]
    if OVERHEAD_SYSTEM in names:
        cells += [
            (sweeps.capacity, (OVERHEAD_SYSTEM, *place, True))
            for place in itertools.product(TARGETS, DATASETS, OVERHEAD_SCHEDULERS)
        ]
    return cells


def curve_cells() -> list[Cell]:
    """Yi-34B, chat, under the strict target: latencies at each rate."""
    return [
        (sweeps.load_point, ("Yi-34B", "openchat_sharegpt4", scheduler, "strict", qps))
        for scheduler, qps in itertools.product(SCHEDULERS, CURVE_QPS)
    ]


def split_cells() -> list[Cell]:
    """Falcon-180B split in two ways, and its pipeline under three schedulers."""
    cells: list[Cell] = [
        (sweeps.split_point, (*split, qps)) for split, qps in itertools.product(SPLITS, SPLIT_QPS)
    ]
    return cells + [(sweeps.pipeline_point, (scheduler, PIPELINE_QPS)) for scheduler in SCHEDULERS]


def ablation_cells() -> list[Cell]:
    """The three schedulers at each rate of a dataset, without the artifact's overhead and with."""
    return [
        (sweeps.ablation_point, (dataset, policy, qps, has_overhead))
        for has_overhead in (False, True)
        for dataset, rates in ABLATION_QPS.items()
        for policy, qps in itertools.product(ABLATION_POLICIES, rates)
    ]


def run_cells(title: str, cells: Iterable[Cell], processes: int) -> list[dict[str, Any]]:
    """Run all, each in a process of the pool; in their order, each with its arguments."""
    todo = list(cells)
    with ProcessPoolExecutor(processes) as pool, Progress(transient=True) as bar:
        task = bar.add_task(title, total=len(todo))
        futures = [pool.submit(function, *arguments) for function, arguments in todo]
        for _ in as_completed(futures):
            bar.advance(task)
        return [
            {"experiment": function.__name__, "cell": list(arguments), **future.result()}
            for (function, arguments), future in zip(todo, futures, strict=True)
        ]
