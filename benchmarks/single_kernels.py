"""Single kernels beside PyTorch's and beside what the machine can do.

    python benchmarks/single_kernels.py               # the shapes of the demo model
    python benchmarks/single_kernels.py --model MODEL

Each linear layer with few and many rows, and the attention of one layer; all kernels in turn, in
several rounds. Prints tables, and writes everything to benchmarks/results/kernels.json and a
picture to docs/kernels.png. (transformers would take a module called `kernels` for a library.)
"""

from __future__ import annotations

import stallfree  # noqa: F401  # before torch: it says how long idle threads spin

# isort: split
import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernel_attention
import kernel_linears
import torch
from kernel_attention import measure_attention
from kernel_linears import costs_of, measure_linear
from kernels_picture import draw
from rich import box
from rich.console import Console
from rich.table import Column, Table
from server import machine_facts
from steps import Bounds, matrices_of

from stallfree.engine.settings import available_cpus
from stallfree.errors import ConfigError, ModelError
from stallfree.model.config import ModelConfig
from stallfree.model.int8 import is_supported
from stallfree.model.int8_cache import int8_weights
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.source import open_model

ROOT = Path(__file__).parent.parent
ROWS, QUICK_ROWS = (1, 4, 8, 16, 32, 64, 128, 512), (1, 8)
WEIGHT_BYTES, QUICK_WEIGHT_BYTES = 1 << 27, 1 << 16  # far beyond the caches; next to nothing
TABLE_WIDTH = 100  # also where the output is no terminal


def main() -> int:
    """Run the benchmark; 1 if this machine or the model does not do."""
    options = _options()
    torch.set_num_threads(options.threads)
    try:
        decoder = _decoder(options.model, options.threads)
    except (ConfigError, ModelError, RuntimeError) as error:
        print(f"the kernels cannot be measured: {error}", file=sys.stderr)
        return 1
    quick = options.quick
    rows, weight_bytes = (QUICK_ROWS, QUICK_WEIGHT_BYTES) if quick else (ROWS, WEIGHT_BYTES)
    rounds = 1 if quick else options.rounds
    bounds, linears = Bounds(), []
    for name, shape in matrices_of(decoder.config).items():
        print(f"{name}: {shape[1]} -> {shape[0]}", file=sys.stderr)
        made = measure_linear(
            decoder, shape, rows, weight_bytes=weight_bytes, rounds=rounds, bounds=bounds
        )
        linears += [{"matrix": name, "outputs": shape[0], "inputs": shape[1], **m} for m in made]
    for each in linears:
        costs = costs_of((each["outputs"], each["inputs"]), each["rows"])
        each["floor_ms"] = bounds.floor_s(*costs) * 1000
    print("attention", file=sys.stderr)
    attention = measure_attention(decoder, rounds, bounds)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {**machine_facts(), **bounds.facts},
        "threads": options.threads,
        "rounds": rounds,
        "linears": linears,
        "attention": attention,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, options.picture)
    print(f"wrote {options.json} and {options.picture}", file=sys.stderr)
    console = Console(width=TABLE_WIDTH)
    console.print(f"{options.threads} threads of {result['machine']['cpu']}: {bounds}")
    console.print(linear_table(linears, bounds.reference))
    console.print(attention_table(attention))
    return 0


def _decoder(model: str | None, threads: int) -> Int8Decoder:
    """The model in int8: its shapes are measured, and its scratch memory used.

    Raises:
        ConfigError, ModelError: the model cannot be used.
        RuntimeError: the machine does not run the kernels.
    """
    if not is_supported():
        raise RuntimeError("they need an x86-64 CPU with AVX2 and PyTorch with libgomp")
    source = open_model(model)
    config = ModelConfig.from_hf(source.hf_config)
    weights = int8_weights(source.path, source.weights)
    return Int8Decoder(config, weights, max_positions=config.max_context, threads=threads)


def linear_table(records: Sequence[dict[str, Any]], reference: str) -> Table:
    """Least times of a linear layer, one line for each number of rows."""
    caption = (
        "least ms; floor: reading at the bandwidth, or computing at the best rate of\n"
        f"{reference}, a reference that may be beaten; x: int8 / floor"
    )
    made = Table(Column("inputs -> outputs", no_wrap=True), caption=caption, box=box.SIMPLE)
    for title in ("rows", "floor", *kernel_linears.NAMES, "x floor"):
        made.add_column(title, justify="right")
    lines: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for each in records:
        lines.setdefault((each["matrix"], each["rows"]), {})[each["kernel"]] = each
    shown = ""
    for (matrix, rows), some in lines.items():
        ours = some[kernel_linears.OURS]
        title = "" if matrix == shown else f"{matrix}: {ours['inputs']} -> {ours['outputs']}"
        if title and shown:
            made.add_section()
        shown = matrix
        times = [some[name]["min_ms"] for name in kernel_linears.NAMES]
        cells = (f"{time_ms:,.3f}" for time_ms in (ours["floor_ms"], *times))
        made.add_row(title, str(rows), *cells, f"{ours['min_ms'] / ours['floor_ms']:.2f}")
    return made


def attention_table(records: Sequence[dict[str, Any]]) -> Table:
    """Least times of attention and what they come to, ours beside PyTorch's."""
    caption = (
        "one layer, least ms; floor, GB/s of KV and GFLOP/s: ours. The floor is reading the\n"
        "bfloat16 KV cache, or computing at the float32 rate of oneDNN; x: ours / floor"
    )
    made = Table("tokens at context", caption=caption, box=box.SIMPLE)
    for title in ("floor", *kernel_attention.NAMES, "GB/s", "GFLOP/s", "x floor"):
        made.add_column(title, justify="right")
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for each in records:
        cases.setdefault(each["case"], {})[each["kernel"]] = each
    for name, some in cases.items():
        ours = some[kernel_attention.OURS]
        times = [some[kernel]["min_ms"] for kernel in kernel_attention.NAMES]
        rates = (ours[what] / ours["min_ms"] / 1e6 for what in ("bytes", "operations"))
        made.add_row(
            name,
            *(f"{time_ms:,.3f}" for time_ms in (ours["floor_ms"], *times)),
            *(f"{rate:,.1f}" for rate in rates),
            f"{ours['min_ms'] / ours['floor_ms']:.2f}",
        )
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, GGUF or hub id; the demo model if left out")
    parser.add_argument("--threads", type=int, default=min(2, available_cpus()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="numbers mean nothing")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kernels.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/kernels.png")
    options = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
