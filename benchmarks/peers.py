"""Other servers and stallfree under the same load, one after the other, each on the demo model.

    python benchmarks/peers.py                              # all: half an hour, the first time one
    python benchmarks/peers.py --only openvino stallfree    # some; --list names them

Installs each in an environment of its own and writes the weights in the form that suits it, once,
below ~/.cache/stallfree/peers. Prints a table, and writes every timestamp to
benchmarks/results/peers.json and a picture to docs/peers.png. Ratios hold within one run only.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from load import Load, Record, Target, make_prompt, percentile, run, send
from machine import int8_rate, read_bandwidth
from peer_install import PEERS, InstallError, command_of, environment_of, install
from peer_weights import Weights, write_weights
from peers_picture import draw
from rich import box
from rich.console import Console
from rich.table import Column, Table
from server import ServerError, free_port, machine_facts, running, serve_command
from stall import first_model, summarize

from stallfree.cache import cache_folder
from stallfree.engine.settings import API_KEY_VARIABLE
from stallfree.errors import ModelError

ROOT = Path(__file__).parent.parent
OURS = "stallfree"
DECODE_TOKENS, PREFILLS = 64, 2
TABLE_WIDTH = 100  # also where the output is no terminal
COLUMNS = {  # of the table: the name of a summary field, and how it is shown
    "decode_ms": ("decode\nms", "{:,.1f}"),
    "prefill_s": ("prefill\ns", "{:.2f}"),
    "prefill_tokens_per_s": ("\ntokens/s", "{:,.0f}"),
    "tbt_p50_ms": ("TBT ms\nP50", "{:,.0f}"),
    "tbt_p99_ms": ("\nP99", "{:,.0f}"),
    "tbt_max_ms": ("\nmax", "{:,.0f}"),
    "steady_ttft_p50_s": ("TTFT s\nshort", "{:.2f}"),
    "long_ttft_p50_s": ("\nlong", "{:.2f}"),
    "total_s": ("total\ns", "{:.1f}"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A server and how it is started.

    Attributes:
        peer: one of `PEERS`, or "stallfree".
        weights: a field of `Weights`; none for stallfree.
        flags: of its command line.
    """

    peer: str
    weights: str = ""
    flags: tuple[str, ...] = ()


LLAMA_48 = ("--batch-size", "48")
VLLM_40 = ("--max-num-batched-tokens", "40", "--max-num-seqs", "16")
ROWS = {
    "llama.cpp-q4": Row("llama.cpp", "q4"),
    "llama.cpp-q8": Row("llama.cpp", "q8"),
    "llama.cpp-q8-48": Row("llama.cpp", "q8", LLAMA_48),
    "llama.cpp-native-q4": Row("llama.cpp-native", "q4"),
    "llama.cpp-native-q8": Row("llama.cpp-native", "q8"),
    "llama.cpp-native-q8-48": Row("llama.cpp-native", "q8", LLAMA_48),
    "vllm-float32": Row("vllm", "bfloat16", ("--dtype", "float32")),
    "vllm-float32-40": Row("vllm", "bfloat16", ("--dtype", "float32", *VLLM_40)),
    "vllm-bfloat16": Row("vllm", "bfloat16"),
    "vllm-bfloat16-40": Row("vllm", "bfloat16", VLLM_40),
    "vllm-w8a8": Row("vllm", "w8a8"),
    "vllm-w8a8-40": Row("vllm", "w8a8", VLLM_40),
    "openvino-q8": Row("openvino", "q8"),
    "openvino-q8-32": Row("openvino", "q8", ("--max-num-batched-tokens", "32")),
}


def main() -> int:
    """Run the benchmark; 1 if a server could not be measured."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = {**ROWS, OURS: Row(OURS, flags=tuple(shlex.split(options.serve_args)))}
    if options.list:
        for name, row in rows.items():
            package = PEERS[row.peer].package if row.peer in PEERS else "this checkout"
            print(f"{name:24}{package} {row.weights} {shlex.join(row.flags)}")
        return 0
    load = Load(**{item.name: getattr(options, item.name) for item in fields(Load)})
    try:
        read, int8 = read_bandwidth() / 1e9, int8_rate() / 1e9
        machine = {**machine_facts(), "read_gb_per_s": read, "int8_gop_per_s": int8}
        print(
            f"{machine['cores']} cores of {machine['cpu']}: {read:.1f} GB/s read, "
            f"{int8:.0f} GOP/s FBGEMM int8 (reference)",
            file=sys.stderr,
        )
        chosen = {name: rows[name] for name in options.only or rows}
        weights = write_weights(options.folder / "weights", options.fresh)
        refusals = _install({row.peer for row in chosen.values()}, options.folder, options.fresh)
        runs = []
        for name, row in chosen.items():
            refusal = refusals.get(row.peer)
            found = (
                {"error": refusal}
                if refusal
                else _serve_and_measure(name, row, load, options.folder, weights)
            )
            runs.append({"name": name, "peer": row.peer, **found})
    except ModelError as error:
        print(f"the weights cannot be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the server is stopped, nothing was written", file=sys.stderr)
        return 130
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "packages": {name: peer.package for name, peer in PEERS.items()},
        "load": asdict(load),
        "runs": runs,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, options.picture)
    print(f"wrote {options.json} and {options.picture}", file=sys.stderr)
    Console(width=TABLE_WIDTH).print(table(runs))
    failed = [each for each in runs if "error" in each]
    for each in failed:
        print(f"{each['name']} failed: {each['error']}", file=sys.stderr)
    return 1 if failed else 0


def table(runs: list[dict[str, Any]]) -> Table:
    """The summaries side by side, and their ratios to stallfree's."""
    caption = (
        "One client alone: time per token, and of a long prompt. Under load: TBT of the decoding\n"
        f"clients, median TTFT of short and of long prompts. x: times {OURS}'s."
    )
    made = Table(
        Column("server", no_wrap=True), caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for title, _ in COLUMNS.values():
        made.add_column(title, justify="right", no_wrap=True)
    done = [each for each in runs if "error" not in each]
    for each in runs:
        if each in done:
            cells = [form.format(each["summary"][name]) for name, (_, form) in COLUMNS.items()]
        else:
            cells = ["failed"]
        made.add_row(each["name"], *cells)
    ours = next((each for each in done if each["name"] == OURS), None)
    if ours:
        made.add_section()
        for each in done:
            ratios = [each["summary"][name] / ours["summary"][name] for name in COLUMNS]
            made.add_row(each["name"], *(f"{ratio:.3g}x" for ratio in ratios))
    return made


def _install(peers: set[str], folder: Path, fresh: bool) -> dict[str, str]:
    """Install peers; gives the reasons of those that could not be."""
    refusals = {}
    for peer in sorted(peers & set(PEERS)):
        try:
            install(peer, folder / peer, fresh)
        except InstallError as error:
            print(error, file=sys.stderr)
            refusals[peer] = str(error)
    return refusals


def _serve_and_measure(
    name: str, row: Row, load: Load, folder: Path, weights: Weights
) -> dict[str, Any]:
    """Start a server, measure it and end it; if that fails, `error` says why."""
    print(f"{name}: starting the server", file=sys.stderr)
    port = free_port()
    path = folder / f"{name}.log"
    with (
        path.open("w+", encoding="utf-8", errors="replace") as log,
        tempfile.TemporaryDirectory() as temporary,
    ):
        if row.peer == OURS:
            command, environment = serve_command(row.flags, port), None
        else:
            model = getattr(weights, row.weights)
            command = [*command_of(row.peer, folder / row.peer, model, port), *row.flags]
            # some leave files in the temporary folder
            environment = environment_of(row.peer, folder / row.peer) | {"TMPDIR": temporary}
        about = {"command": _shown(command), "read_gb_per_s": read_bandwidth() / 1e9}
        started = time.perf_counter()
        try:
            with running(command, port, log, environment) as url:
                start_s = time.perf_counter() - started
                print(f"{name}: up after {start_s:.0f} s", file=sys.stderr)
                return {**about, "start_s": start_s, **_measure(name, url, load)}
        except (ServerError, OSError) as error:
            words = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
            reason = words[-1].strip(" │")  # the command line draws a box around its errors
            print(f"{name}: {reason}", file=sys.stderr)
            return {**about, "error": f"{reason} (see {path})"}


def _shown(command: list[str]) -> str:
    """A command line without the folders of whoever ran it."""
    return shlex.join(command).replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


def _measure(name: str, url: str, load: Load) -> dict[str, Any]:
    """Time one client alone, then the load. No prompt is sent twice, for servers keep them.

    Raises:
        ServerError: a request failed.
    """
    api_key = os.environ.get(API_KEY_VARIABLE)
    target = Target(url, first_model(Target(url, "", api_key)), api_key)

    def alone(num_words: int, max_tokens: int, seed: int) -> Record:
        return send(target, make_prompt(num_words, load.seed + seed), max_tokens, started)

    started = time.perf_counter()
    print(f"{name}: one client", file=sys.stderr)
    warm_up = alone(load.prompt_words, 8, 2000)
    decode = alone(load.prompt_words, DECODE_TOKENS, 2001)
    prefills = [alone(load.long_words, 1, 2002 + number) for number in range(PREFILLS)]
    print(f"{name}: {load.clients} clients, {load.long_count} long prompts", file=sys.stderr)
    records = run(target, load)
    for record in (warm_up, decode, *prefills, *records):
        if record.error:
            raise ServerError(f"a request failed: {record.error}")
    prefill = min(prefills, key=lambda record: record.first_token_s)
    summary = {
        "decode_ms": percentile(decode.gaps_s, 0.5) * 1000,
        "prefill_s": prefill.first_token_s,
        "prefill_tokens_per_s": prefill.prompt_tokens / prefill.first_token_s,
        **summarize(records),
    }
    print(f"{name}: done in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return {
        "summary": summary,
        "decode": asdict(decode),
        "prefills": [asdict(record) for record in prefills],
        "records": [asdict(record) for record in records],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*ROWS, OURS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="rows to run")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--serve-args", default="--token-budget 48", help="of `stallfree serve`")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers")
    parser.add_argument("--fresh", action="store_true", help="install and write all anew")
    for item in fields(Load):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=item.default)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/peers.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/peers.png")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
