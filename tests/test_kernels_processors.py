"""Kernels of another processor than this one, compiled in a process that is told it has another.

Those of newer processors cannot be run here, those of older ones can. Those of this one are run by
all other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from int8_models import make_decoder, make_tokens, relative_errors, run, save_model

from stallfree.kernels.processor import HAS_VNNI
from stallfree.model.int8 import is_supported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU"),
]

NEWER = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c")
OLDER = ("avx2", "fma", "f16c", "avx", "sse4.2", "sse4.1", "ssse3", "sse3", "sse2", "popcnt")

COMPILE = """
import numpy as np
from numba import typeof
from stallfree.kernels import layers, shapes
from stallfree.kernels.processor import HAS_AVX512, HAS_BF16, HAS_VNNI
from stallfree.kernels.int8_matmul import WEIGHT_LEVELS

assert HAS_AVX512 and HAS_VNNI and WEIGHT_LEVELS == 127


def zeros(dimensions, dtype):
    return np.zeros((2,) * dimensions, dtype=dtype)


def product(dimensions):
    return shapes.Product(
        weights=zeros(dimensions + 1, np.int8),
        scales=floats[dimensions],
        column_sums=zeros(dimensions, np.int32),
        bias=floats[dimensions],
    )


floats = [zeros(n, np.float32) for n in range(5)]
ints = [zeros(n, np.int64) for n in range(4)]
halves = zeros(2, np.int16)  # bfloat16
factors = halves if HAS_BF16 else floats[2]
one, many = product(1), product(2)
every = shapes.Layers(
    floats[2], many, floats[2], floats[2], many, floats[2], many, many, floats[2], floats[2],
    ints[1], ints[1]
)
shape = shapes.Shape(1, 1, 1, 1, 1, 1, np.float32(1), np.float32(1), 2)
work = shapes.Work(ints[1], ints[1], floats[4], ints[2], ints[2], ints[2])
scratch = shapes.Scratch(
    hidden=floats[1],
    activations=zeros(1, np.uint8),
    scales=floats[1],
    zeros=zeros(1, np.int32),
    wide=floats[1],
    queries=floats[1],
    attended=floats[1],
    part=floats[1],
    part_sums=floats[1],
    part_tops=floats[1],
    counter=ints[1],
    barrier=ints[1],
    thread_sums=zeros(2, np.int32),
    thread_row=floats[2],
    thread_queries=factors,
    thread_out=floats[2],
    thread_total=floats[2],
    thread_stats=floats[3],
    thread_weight_sums=floats[2],
    thread_scores=floats[2],
    thread_weights=factors,
    thread_places=ints[2],
)
job = shapes.Job(shape, shapes.Cache(halves, halves), work, scratch)
signature = tuple(typeof(value) for value in (2, one, every, job))
layers.run.compile(signature)
[assembly] = layers.run.inspect_asm().values()
assert "zmm" in assembly
assert "vpdpbusd" in assembly
"""

RUN = """
import pathlib, sys, torch
import int8_models as m
import test_kernels as k

levels = int(sys.argv[3])
assert k.WEIGHT_LEVELS == levels
k.test_sums_of_products_are_exact()
k.test_the_largest_sums_are_exact(255, 0, -levels)
k.test_rows_are_normed_and_rounded_to_the_nearest_level()
d = m.make_decoder(pathlib.Path(sys.argv[1]))
errors = m.attention_errors(d, m.make_tokens(2100), 16, m.STOPS)
assert max(errors) < 1e-5
tokens = m.make_tokens(1100)
whole = m.run(d, tokens, [])
assert torch.equal(m.run(d, tokens, [3, 200, 1098]), whole)
torch.save(whole, sys.argv[2])
"""


def run_on(
    processor: str, features: Sequence[str], cache: Path, program: str, *arguments: object
) -> None:
    """Run a program, of which nothing is compiled yet, as if this were `processor`."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features),
        "STALLFREE_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, check=True
    )


@pytest.mark.skipif(HAS_VNNI, reason="this is such a processor")
def test_the_kernels_of_newer_processors_compile(tmp_path: Path) -> None:
    """AVX-512 with VNNI."""
    run_on("icelake-server", NEWER, tmp_path, COMPILE)


@pytest.mark.skipif(not HAS_VNNI, reason="this is such a processor")
@pytest.mark.parametrize(
    ("processor", "features", "levels"), [("haswell", OLDER, 63), ("icelake-server", NEWER, 127)]
)
def test_the_kernels_of_older_processors_are_right_too(
    tmp_path: Path, processor: str, features: Sequence[str], levels: int
) -> None:
    """AVX2 without VNNI: other instructions, and weights of 7 bits; AVX-512 without bfloat16."""
    folder, made = save_model(tmp_path / "model", "groups of 7"), tmp_path / "logits.pt"
    run_on(processor, features, tmp_path, RUN, folder, made, levels)
    ours = run(make_decoder(folder), make_tokens(1100), [])
    errors = relative_errors(torch.load(made), ours)
    assert errors.median() < 0.2  # near 1 if anything is misplaced
