"""The paper's experiments in simulation: capacities, load curves, the split of a model, ablation.

Each function runs one cell and returns plain numbers, so that cells can run in several processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean

from systems import ARTIFACT, DATASETS, SYSTEMS, PaperSystem, recipe

from stallfree.bench.capacity import Criterion
from stallfree.bench.capacity_search import SearchSettings, find_capacities
from stallfree.bench.giving_up import GiveUp
from stallfree.bench.metrics import Summary, summarize
from stallfree.bench.records import Record, Results
from stallfree.bench.workload import Workload
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import Simulation, simulate
from stallfree.sim.system import System

NUM_REQUESTS, SEEDS = 256, (0,)
MAX_DELAY_S = 2.0
ABLATION_REQUESTS, ABLATION_SEEDS = 128, range(8)
START_QPS = {"Mistral-7B": 2.0, "Yi-34B": 0.7, "LLaMA2-70B": 0.5, "Falcon-180B": 0.7}
START_SHARE = {"vllm": 0.5, "orca": 0.4, "faster_transformer": 0.03}  # of that; guesses too


def capacity(
    name: str,
    target: str,
    dataset: str,
    scheduler: str,
    has_overhead: bool = False,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, object]:
    """The capacity of a scheduler on one of the paper's systems, in requests per second.

    None if not even the lowest rate of the search passes.
    """
    paper = SYSTEMS[name]
    settings = paper.schedulers(target)[scheduler]
    made = paper.system(settings, DATASETS[dataset], ARTIFACT if has_overhead else None)
    criterion = Criterion(paper.targets[target], MAX_DELAY_S)
    guess_qps = START_QPS[name] * START_SHARE.get(scheduler, 1.0)
    search = SearchSettings(seeds=seeds, start_qps=guess_qps, min_qps=0.005)

    def measure(qps: float, seed: int) -> Results:
        workload = recipe(dataset, NUM_REQUESTS, seed).make().at_rate(qps)
        return _run(made, workload, GiveUp.beyond(criterion, workload)).results

    (found,) = find_capacities(measure, [criterion], search)
    return {"qps": found.mean_qps, "of_each_seed": [each.qps for each in found.seeds]}


def load_point(
    name: str, dataset: str, scheduler: str, target: str, qps: float
) -> dict[str, float]:
    """Latencies at a rate, of a run that is not given up."""
    paper = SYSTEMS[name]
    made = paper.system(paper.schedulers(target)[scheduler], DATASETS[dataset])
    workload = recipe(dataset, NUM_REQUESTS, 0).make().at_rate(qps)
    return _numbers(summarize(_run(made, workload).results))


def split_point(tensor_parallel: int, pipeline_parallel: int, qps: float) -> dict[str, float]:
    """Falcon-180B on two nodes, split one way or another, its budget 512; with its idle time."""
    paper = replace(
        SYSTEMS["Falcon-180B"], tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel
    )
    return _split(paper, SchedulingSettings(token_budget=512), qps)


def pipeline_point(scheduler: str, qps: float) -> dict[str, float]:
    """Falcon-180B as the paper splits it, under a scheduler: what its stages idle."""
    paper = SYSTEMS["Falcon-180B"]
    return _split(paper, paper.schedulers("relaxed")[scheduler], qps)


def _split(paper: PaperSystem, settings: SchedulingSettings, qps: float) -> dict[str, float]:
    dataset = "openchat_sharegpt4"
    workload = recipe(dataset, NUM_REQUESTS, 0).make().at_rate(qps)
    done = _run(paper.system(settings, DATASETS[dataset]), workload)
    stages = done.replicas[0].pipeline.stages
    idle = {
        f"idle_{kind.name.lower()}": mean(stage.idle_s[kind] for stage in stages)
        / done.results.end_s
        for kind in stages[0].idle_s
    }
    busy = mean(stage.busy_s for stage in stages) / done.results.end_s
    return {**_numbers(summarize(done.results)), **idle, "busy": busy}


def ablation_point(
    dataset: str, policy: str, qps: float, has_overhead: bool, seeds: range = ABLATION_SEEDS
) -> dict[str, float]:
    """Yi-34B with 128 requests: median TTFT and P99 TBT, the means over seeds."""
    settings = SchedulingSettings(scheduler=policy, token_budget=512)
    efficiency = ARTIFACT if has_overhead else None
    made = SYSTEMS["Yi-34B"].system(settings, DATASETS[dataset], efficiency)
    runs = [
        summarize(_run(made, recipe(dataset, ABLATION_REQUESTS, seed).make().at_rate(qps)).results)
        for seed in seeds
    ]
    return {
        "ttft_p50_s": mean(run.latencies["ttft"]["p50"] for run in runs),
        "tbt_p99_s": mean(run.latencies["tbt"]["p99"] for run in runs),
    }


def _run(
    made: System, workload: Workload, give_up: Callable[[Record], bool] | None = None
) -> Simulation:
    return simulate(workload, [made.replica()], LeastWork(), give_up=give_up)


def _numbers(summary: Summary) -> dict[str, float]:
    own = summary.latencies
    return {
        "tbt_p50_s": own["tbt"]["p50"],
        "tbt_p99_s": own["tbt"]["p99"],
        "ttft_p50_s": own["ttft"]["p50"],
        "delay_p50_s": own["scheduling_delay"]["p50"],
        "tokens_per_s": summary.output_tokens_per_s,
    }
