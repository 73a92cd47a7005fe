"""Bubbles, live: how long the stages of a pipeline idle while work waits, by scheduler.

    python benchmarks/pipeline.py       # some ten minutes; let nothing else run

The demo model in two processes of one thread each, on two cores: Figure 8 of the paper. Short and
long prompts arrive faster than they can be answered, so there is always work. Beside each
scheduler's throughput and time between tokens it shows what share of the time each stage idled, and
why; and one process of two threads for comparison. Then the time to the first token of a long
prompt alone, with and without several of its chunks in flight. Prints tables; results go to
benchmarks/results/pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from live_load import Load
from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree import SamplingParams
from stallfree.core.bubbles import Bubble, StageUse
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings
from stallfree.executor.distributed import DistributedPipeline

ROOT = Path(__file__).parent.parent
PROMPTS = (32, 64, 128, 512, 1024)  # tokens, drawn at random
ANSWERS = (16, 64, 128)
LONG_PROMPT = 8192
NUM_REQUESTS = 48
MAX_NUM_SEQS = 32  # so that two batches in flight have as many decodes each as prompts feed


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run the model: its settings beyond the common ones."""

    name: str
    scheduler: str
    stages: int


CASES = [
    Case("sarathi", "sarathi", 2),
    Case("vllm", "vllm", 2),
    Case("orca", "orca", 2),
    Case("sarathi, one process", "sarathi", 1),
]


def main() -> int:
    """Run all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90, help="of each run")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/pipeline.json")
    options = parser.parse_args()
    runs = {case.name: run(case, options.seconds) for case in CASES}
    first = {name: first_token_s(pipelining) for name, pipelining in _PIPELINING.items()}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "runs": runs,
        "first_token_s": first,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    console = Console()
    console.print(bubbles(runs))
    console.print(first_tokens(first))
    return 0


_PIPELINING = {"one chunk in flight": False, "several": True}


def settings_of(case: Case) -> EngineSettings:
    """On two cores, whatever the number of processes."""
    return EngineSettings(
        scheduler=case.scheduler,
        pipeline_parallel_size=case.stages,
        threads=2 // case.stages,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=LONG_PROMPT + 64,
        kv_cache_memory_bytes=2**30,
    )


def run(case: Case, seconds: float) -> dict[str, Any]:
    """What an engine does while 48 requests are in it, after a sixth of the time to get there."""
    print(f"{case.name}: {seconds:g} s", file=sys.stderr)
    engine = build_engine(settings_of(case))
    load = Load(engine, PROMPTS, ANSWERS, NUM_REQUESTS)
    load.run(seconds / 6)
    load.forget()
    before, started = uses(engine), time.monotonic()
    load.run(seconds)
    elapsed_s, after = time.monotonic() - started, uses(engine)
    engine.close()
    return {
        "case": asdict(case),
        "tokens_per_s": load.num_tokens / elapsed_s,
        "tbt_p50_s": load.percentile(0.5),
        "tbt_p99_s": load.percentile(0.99),
        "stages": [_difference(*pair) for pair in zip(before, after, strict=True)],
    }


def uses(engine: Engine) -> list[StageUse]:
    """What each stage did so far; nothing is known of a model in this process."""
    pipeline = engine.executor
    if not isinstance(pipeline, DistributedPipeline):
        return []
    return [replace(use, idle_s=dict(use.idle_s)) for use in pipeline.log.stages]


def _difference(before: StageUse, after: StageUse) -> dict[str, float]:
    """Seconds that a stage was busy, and idle by reason, in between."""
    idle = {kind.name: after.idle_s[kind] - before.idle_s[kind] for kind in Bubble}
    return {"busy": after.busy_s - before.busy_s, **idle}


def first_token_s(pipelining: bool) -> float:
    """Median seconds to the first token of a long prompt alone, of three."""
    settings = replace(settings_of(CASES[0]), sequence_pipelining=pipelining, token_budget=256)
    engine = build_engine(settings)
    taken = []
    for number in range(3):
        prompt = [1000 + number] * LONG_PROMPT
        started = time.monotonic()
        engine.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=1))
        while engine.has_requests:
            engine.step()
        taken.append(time.monotonic() - started)
    engine.close()
    return median(taken)


def bubbles(runs: dict[str, Any]) -> Table:
    """Each stage's idle share, and the reasons; beside throughput and time between tokens."""
    made = Table(title="while work waits", title_justify="left", box=box.SIMPLE)
    made.add_column("scheduler")
    for name in ("tokens/s", "TBT P50", "TBT P99", "stage", "idle", *(k.name for k in Bubble)):
        made.add_column(name, justify="right")
    for name, own in runs.items():
        cells = [name, f"{own['tokens_per_s']:,.0f}"]
        cells += [f"{own[key] * 1000:,.0f} ms" for key in ("tbt_p50_s", "tbt_p99_s")]
        for number, stage in enumerate(own["stages"]):
            total = sum(stage.values())
            shares = [f"{stage[kind.name] / total:.1%}" for kind in Bubble]
            made.add_row(*cells, str(number), f"{1 - stage['busy'] / total:.1%}", *shares)
            cells = [""] * 4
        if not own["stages"]:
            made.add_row(*cells)
    return made


def first_tokens(seconds: dict[str, float]) -> Table:
    """The time to the first token of a long prompt alone."""
    made = Table(
        title=f"a prompt of {LONG_PROMPT:,} tokens alone", title_justify="left", box=box.SIMPLE
    )
    made.add_column("chunks")
    made.add_column("first token", justify="right")
    for name, value in seconds.items():
        made.add_row(name, f"{value:.1f} s")
    return made


if __name__ == "__main__":
    sys.exit(main())
