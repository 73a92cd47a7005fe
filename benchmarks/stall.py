"""The generation stall, live: the same load against `stallfree serve` under several schedulers.

    python benchmarks/stall.py                         # vllm, orca and sarathi on the demo model
    python benchmarks/stall.py --url http://host:8000  # a server that runs already

Prints a table, and writes every timestamp to benchmarks/results/stall.json and a picture of them
to docs/stall.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from load import Load, Record, Target, make_prompt, percentile, run, send
from picture import draw
from rich import box
from rich.console import Console
from rich.table import Column, Table
from server import ServerError, machine_facts, serving

from stallfree.core.policies import POLICIES
from stallfree.engine.settings import API_KEY_VARIABLE

ROOT = Path(__file__).parent.parent
BASELINE = "vllm"
COLUMNS = {  # of the table: the name of a summary field, and how it is shown
    "tbt_p50_ms": ("TBT ms\nP50", "{:,.0f}"),
    "tbt_p99_ms": ("\nP99", "{:,.0f}"),
    "tbt_max_ms": ("\nmax", "{:,.0f}"),
    "steady_ttft_p50_s": ("TTFT s\nshort", "{:.2f}"),
    "long_ttft_p50_s": ("\nlong", "{:.2f}"),
    "tokens_per_s": ("tokens\nper s", "{:,.0f}"),
    "total_s": ("total\ns", "{:.1f}"),
}


def main() -> int:
    """Run the benchmark; 1 if a request failed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = Load(**{item.name: getattr(options, item.name) for item in fields(Load)})
    try:
        if options.url:
            runs = [_measure(options.url, options.url, options.model, load)]
        else:
            runs = [_serve_and_measure(name, options, load) for name in options.schedulers]
    except ServerError as error:
        print(f"the server does not answer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the server is stopped, nothing was written", file=sys.stderr)
        return 130
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "load": asdict(load),
        "runs": runs,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, options.picture)
    failures = [record["error"] for each in runs for record in each["records"] if record["error"]]
    for failure in failures:
        print(f"a request failed: {failure}", file=sys.stderr)
    for each in runs:
        missing = each["summary"]["tokens_without_event"]
        if missing:
            print(
                f"{each['name']}: {missing} tokens brought no event; gaps span them",
                file=sys.stderr,
            )
    print(f"wrote {options.json} and {options.picture}", file=sys.stderr)
    Console().print(table(runs))
    return 1 if failures else 0


def summarize(records: list[Record]) -> dict[str, float]:
    """Latencies of the steady clients' tokens, TTFT of both kinds, throughput, total time."""
    steady = [record for record in records if record.kind == "steady"]
    long = [record for record in records if record.kind == "long"]
    gaps_ms = [gap * 1000 for record in steady for gap in record.gaps_s]
    tokens = sum(record.prompt_tokens + record.completion_tokens for record in records)
    arrived = sum(len(record.token_s) for record in records)
    total_s = max((time for record in records for time in record.token_s), default=float("nan"))
    return {
        "tbt_p50_ms": percentile(gaps_ms, 0.5),
        "tbt_p99_ms": percentile(gaps_ms, 0.99),
        "tbt_max_ms": percentile(gaps_ms, 1),
        "steady_ttft_p50_s": percentile([record.first_token_s for record in steady], 0.5),
        "long_ttft_p50_s": percentile([record.first_token_s for record in long], 0.5),
        "tokens_per_s": tokens / total_s,
        "total_s": total_s,
        "tokens_without_event": sum(record.completion_tokens for record in records) - arrived,
    }


def table(runs: list[dict[str, Any]]) -> Table:
    """The summaries side by side, and their ratios to the baseline's."""
    caption = "TBT of the decoding clients; TTFT of short and of long prompts, median"
    made = Table(Column("scheduler", no_wrap=True), caption=caption, box=box.SIMPLE)
    for title, _ in COLUMNS.values():
        made.add_column(title, justify="right", no_wrap=True)
    for each in runs:
        cells = [form.format(each["summary"][name]) for name, (_, form) in COLUMNS.items()]
        made.add_row(_label(each), *cells)
    baseline = next((each for each in runs if each["name"] == BASELINE), None)
    others = [each for each in runs if baseline and each is not baseline]
    if baseline and others:
        made.add_section()
        for each in others:
            ratios = [each["summary"][name] / baseline["summary"][name] for name in COLUMNS]
            made.add_row(f"{each['name']} / {BASELINE}", *(f"{ratio:.3f}" for ratio in ratios))
    return made


def _label(measured: dict[str, Any]) -> str:
    budget = measured["token_budget"]
    return f"{measured['name']} ({budget})" if budget else str(measured["name"])


def _serve_and_measure(name: str, options: argparse.Namespace, load: Load) -> dict[str, Any]:
    arguments = [options.model] if options.model else []
    arguments += ["--scheduler", name, "--max-model-len", str(options.max_model_len)]
    budget = options.token_budget if POLICIES[name].keeps_budget else None
    if budget is not None:
        arguments += ["--token-budget", str(budget)]
    print(f"{name}: starting the server", file=sys.stderr)
    with serving([*arguments, *shlex.split(options.serve_args)]) as url:
        return _measure(name, url, None, load, budget)


def _measure(
    name: str, url: str, model: str | None, load: Load, budget: int | None = None
) -> dict[str, Any]:
    api_key = os.environ.get(API_KEY_VARIABLE)
    target = Target(url, model or first_model(Target(url, "", api_key)), api_key)
    print(f"{name}: warming up", file=sys.stderr)
    send(target, make_prompt(load.prompt_words, load.seed - 1), 8, time.perf_counter())
    print(f"{name}: {load.clients} clients, {load.long_count} long prompts", file=sys.stderr)
    records = run(target, load)
    summary = summarize(records)
    print(f"{name}: done in {summary['total_s']:.1f} s", file=sys.stderr)
    return {
        "name": name,
        "token_budget": budget,
        "model": target.model,
        "summary": summary,
        "records": [asdict(record) for record in records],
    }


def first_model(target: Target) -> str:
    """The name of the first model that a server lists.

    Raises:
        ServerError: it does not answer.
    """
    request = urllib.request.Request(f"{target.url}/v1/models", headers=target.headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except OSError as error:
        raise ServerError(f"{target.url}: {error}") from error


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedulers", nargs="+", default=["vllm", "orca", "sarathi"])
    parser.add_argument("--token-budget", type=int, default=48, help="of those that keep one")
    parser.add_argument("--model", help="folder, GGUF or hub id; with --url, its name there")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--serve-args", default="", help="more flags for `stallfree serve`")
    parser.add_argument("--url", help="measure a server that runs already instead")
    for item in fields(Load):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=item.default)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/stall.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/stall.png")
    options = parser.parse_args()
    unknown = [name for name in options.schedulers if name not in POLICIES]
    if unknown:
        parser.error(f"no scheduler is called {unknown[0]!r}; there are {', '.join(POLICIES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
