"""Is a latency target held? `stallfree serve --tbt-slo` under loads that nobody tuned it for.

    python benchmarks/slo.py                    # all four parts: about an hour on two cores
    python benchmarks/slo.py --only targets     # one; the stored results of the others stay
    python benchmarks/slo.py --quick            # a smoke test of a few minutes, stored elsewhere
    python benchmarks/slo.py --show             # measure nothing, show what is stored

Parts:
    targets    three targets and six static budgets, each under the same load: 8 clients that
               decode all the time, and prompts of 200 to 3,000 tokens that arrive at random, about
               as many as the machine can read. What static budget would have kept each target?
    contexts   prompts four times longer and a quarter as many: 200 ms, and the static budget that
               was best for 200 ms in `targets`, which has to be run before (otherwise 64)
    neighbour  the load of `targets`; after 40 s another process takes half a core
    tiers      more requests of three service tiers than can be served

Each part runs a new server for each setting, after a warm-up of some seconds that is not counted.
Results with every timestamp go to benchmarks/results/slo.json, pictures to docs. The load is
seeded: the same prompts at the same times for each setting. It saturates two cores of Zen 3;
choose --rate for another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from load import Target
from machine import int8_rate, read_bandwidth
from rich.console import Console
from server import ServerError, machine_facts, serving
from slo_load import RATE, SEED, MixedLoad, Run, TierLoad, run_load
from slo_picture import draw
from slo_summary import best_static, pack, summarize, summarize_neighbour, summarize_tiers
from slo_tables import tables
from stall import first_model

from stallfree.engine.settings import API_KEY_VARIABLE

ROOT = Path(__file__).parent.parent
TABLE_WIDTH = 100  # also where the output is no terminal
SETTINGS = (  # targets between budgets, so that a drift of the machine favours neither
    *("--tbt-slo 100ms", "--token-budget 16", "--token-budget 32"),
    *("--tbt-slo 200ms", "--token-budget 48", "--token-budget 64"),
    *("--tbt-slo 500ms", "--token-budget 96", "--token-budget 160"),
)
QUICK_SETTINGS = ("--tbt-slo 200ms", "--token-budget 48")
CONTEXT_TARGET_MS, DEFAULT_BUDGET = 200, 64
NEIGHBOUR_LOAD_S, NEIGHBOUR_AFTER_S = 90.0, 40.0
TIERS = (  # the longest prompt alone takes 4 to 6 s to read beside answers within 200 ms
    "--tbt-slo 200ms --ttft-slo 20s --tier priority:tbt=200ms,ttft=10s --prefill-order edf",
    {"priority": 10.0, "default": 20.0},
)
QUICK_S, QUICK_WORDS = 8.0, 8  # seconds of a quick load, and what its prompts are divided by


def main() -> int:
    """Run the parts that are asked for; 1 if a server or a request failed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = _stored(options.json)
    names = [name for name in PARTS if name in (options.only or PARTS)]
    shown = {name: parts[name] for name in names if options.show and name in parts}
    try:
        for name in [] if options.show else names:
            shown[name] = {**_facts(), **PARTS[name](options, parts)}
            if all("error" in run for run in shown[name]["runs"]):
                print(f"{name}: nothing was measured, nothing is stored", file=sys.stderr)
                continue
            parts[name] = shown[name]
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"parts": parts}, separators=(",", ":"))
            options.json.write_text(text + "\n", encoding="utf-8")
            print(f"{name}: stored in {options.json}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the server is stopped, this part was not stored", file=sys.stderr)
        return 130
    for path in draw(shown, options.pictures):
        print(f"wrote {path}", file=sys.stderr)
    runs = [run for part in shown.values() for run in part["runs"]]
    failed = [each["name"] for each in runs if "error" in each or each["summary"]["failures"]]
    for name in failed:
        print(f"{name}: failed, or requests of it did", file=sys.stderr)
    console = Console(width=TABLE_WIDTH)
    for name, part in shown.items():
        console.print(*tables(name, part), sep="\n")
    return 1 if failed else 0


def _targets(options: argparse.Namespace, parts: dict[str, Any]) -> dict[str, Any]:
    load = _mixed(options)
    usual = QUICK_SETTINGS if options.quick else SETTINGS
    runs = _measure_all(options, parts.get("targets", {}), usual, load)
    return {"load": asdict(load), "runs": runs}


def _measure_all(
    options: argparse.Namespace, stored: dict[str, Any], usual: Sequence[str], load: MixedLoad
) -> list[dict[str, Any]]:
    """The runs of these settings; of some others if asked for, beside what is stored."""
    settings = options.settings or usual
    kept = [run for run in stored.get("runs", []) if run["name"] not in settings]
    runs = [_measure(setting, load, options, summarize) for setting in settings]
    return (kept if options.settings else []) + runs


def _contexts(options: argparse.Namespace, parts: dict[str, Any]) -> dict[str, Any]:
    usual = _mixed(options)
    load = replace(
        usual,
        prompt_words=4 * usual.prompt_words,
        least_words=4 * usual.least_words,
        most_words=4 * usual.most_words,
        rate=usual.rate / 4,
    )
    best = best_static(parts.get("targets", {}).get("runs", []), CONTEXT_TARGET_MS)
    budget = best["budget"] if best else DEFAULT_BUDGET
    usual_settings = (f"--tbt-slo {CONTEXT_TARGET_MS}ms", f"--token-budget {budget}")
    runs = _measure_all(options, parts.get("contexts", {}), usual_settings, load)
    return {"load": asdict(load), "runs": runs}


def _neighbour(options: argparse.Namespace, _: dict[str, Any]) -> dict[str, Any]:
    load = replace(_mixed(options), seconds=QUICK_S if options.quick else NEIGHBOUR_LOAD_S)
    after_s = QUICK_S / 2 if options.quick else NEIGHBOUR_AFTER_S
    run = _measure("--tbt-slo 200ms", load, options, summarize_neighbour, after_s)
    return {"load": asdict(load), "runs": [run]}


def _tiers(options: argparse.Namespace, _: dict[str, Any]) -> dict[str, Any]:
    load = TierLoad(seed=options.seed)
    if options.quick:
        low, high = load.least_words // QUICK_WORDS, load.most_words // QUICK_WORDS
        load = replace(load, seconds=QUICK_S, least_words=low, most_words=high)
        load = replace(load, priority_rate=0.8, default_rate=0.8, flex_rate=0.8)
    setting, targets_s = TIERS
    run = _measure(setting, load, options, lambda run: summarize_tiers(run, targets_s))
    return {"load": asdict(load), "runs": [run]}


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], dict[str, Any]]] = {
    "targets": _targets,
    "contexts": _contexts,
    "neighbour": _neighbour,
    "tiers": _tiers,
}


def _mixed(options: argparse.Namespace) -> MixedLoad:
    load = MixedLoad(rate=options.rate, seed=options.seed)
    if options.quick:
        low, high = load.least_words // QUICK_WORDS, load.most_words // QUICK_WORDS
        load = replace(load, seconds=QUICK_S, least_words=low, most_words=high)
        return replace(load, rate=2 * load.rate, output_tokens=32)
    return load


def _measure(
    setting: str,
    load: MixedLoad | TierLoad,
    options: argparse.Namespace,
    numbers: Callable[[Run], dict[str, Any]],
    neighbour_after_s: float | None = None,
) -> dict[str, Any]:
    """Start a server, send it the load and end it; `error` says why if it did not answer."""
    arguments = shlex.split(setting)
    about = {
        "name": setting,
        "target_ms": _value_of("--tbt-slo", arguments),
        "budget": _value_of("--token-budget", arguments),
        "date": _date(),
    }
    model = [options.model] if options.model else []
    api_key = os.environ.get(API_KEY_VARIABLE)
    _say(setting, "starting the server")
    try:
        with serving([*model, *arguments, *shlex.split(options.serve_args)]) as url:
            target = Target(url, first_model(Target(url, "", api_key)), api_key)
            _say(setting, "warming up")
            run_load(target, load.warm_up())
            _say(setting, f"{len(load.arrivals())} prompts in {load.seconds:.0f} s")
            run = run_load(target, load, neighbour_after_s)
    except ServerError as error:
        print(error, file=sys.stderr)
        words = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
        return {**about, "error": words[-1].strip(" │")}  # errors of the command line are framed
    summary = numbers(run)
    _say(
        setting,
        f"done in {run.end_s:.0f} s: P99 {summary['tbt_p99_ms']:.0f} ms, "
        f"{summary['tokens_per_s']:.0f} tokens/s; "
        f"the clients took {summary['client_cpu_share']:.1%} of a core",
    )
    for failure in {record.error for record in run.records if record.error}:
        _say(setting, f"a request failed: {failure}")
    records = [pack(record) for record in run.records]
    return {**about, "model": target.model, "summary": summary, "records": records}


def _value_of(flag: str, arguments: Sequence[str]) -> int | None:
    """A flag's number, without its unit; None if it is not there."""
    if flag not in arguments:
        return None
    return int(arguments[arguments.index(flag) + 1].removesuffix("ms"))


def _facts() -> dict[str, Any]:
    """What a part's results depend on, and when they are from."""
    rates = {"read_gb_per_s": read_bandwidth() / 1e9, "int8_gop_per_s": int8_rate() / 1e9}
    command = shlex.join(["python", *sys.argv])
    return {
        "date": _date(),
        "command": command.replace(f"{ROOT}/", "").replace(str(Path.home()), "~"),
        "machine": {**machine_facts(), **rates},
    }


def _stored(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return parts


def _date() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _say(setting: str, words: str) -> None:
    print(f"{setting}: {words}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="8 s of shorter prompts and few settings; stored in the folder for temporary files",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="'FLAGS'",
        help="of `targets` and `contexts`: only these, such as '--tbt-slo 200ms'; stored runs stay",
    )
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is stored")
    parser.add_argument("--rate", type=float, default=RATE, help="prompts per second")
    parser.add_argument("--seed", type=int, default=SEED, help="of times, lengths and words")
    parser.add_argument("--model", help="folder, GGUF or hub id (default: the demo model)")
    parser.add_argument("--serve-args", default="", help="more flags for `stallfree serve`")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/slo.json")
    parser.add_argument("--pictures", type=Path, help="folder; default: docs")
    options = parser.parse_args()
    elsewhere = Path(tempfile.gettempdir()) / "stallfree-slo"
    options.json = options.json or (
        elsewhere / "slo.json" if options.quick else ROOT / "benchmarks/results/slo.json"
    )
    options.pictures = options.pictures or (elsewhere if options.quick else ROOT / "docs")
    return options


if __name__ == "__main__":
    sys.exit(main())
