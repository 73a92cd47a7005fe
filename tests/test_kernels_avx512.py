"""The AVX-512 kernels where no such processor is: compiled for one, and not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stallfree.model.int8 import is_supported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU"),
]

COMPILE = """
import numpy as np
from numba import typeof
from stallfree.kernels import layers, shapes
from stallfree.kernels.processor import HAS_AVX512, HAS_VNNI
from stallfree.kernels.int8_matmul import WEIGHT_LEVELS

assert HAS_AVX512 and HAS_VNNI and WEIGHT_LEVELS == 127
floats = [np.zeros((2,) * n, dtype=np.float32) for n in range(4)]
ints = [np.zeros((2,) * n, dtype=np.int64) for n in range(4)]
halves = np.zeros((2, 2), dtype=np.uint16)


def product(dimensions):
    return shapes.Product(
        weights=np.zeros((2,) * (dimensions + 1), dtype=np.int8),
        scales=floats[dimensions],
        column_sums=np.zeros((2,) * dimensions, dtype=np.int32),
        bias=floats[dimensions],
    )


one, many = product(1), product(2)
every = shapes.Layers(
    floats[2], many, floats[2], floats[2], many, floats[2], many, many, ints[1]
)
shape = shapes.Shape(1, 1, 1, 1, 1, 1, np.float32(1), np.float32(1))
work = shapes.Work(ints[1], ints[1], floats[3], ints[2], ints[2], ints[2])
scratch = shapes.Scratch(
    hidden=floats[1],
    activations=np.zeros(2, dtype=np.uint8),
    scales=floats[1],
    zeros=np.zeros(2, dtype=np.int32),
    wide=floats[1],
    queries=floats[1],
    attended=floats[1],
    part=floats[1],
    part_sums=floats[1],
    part_tops=floats[1],
    counter=ints[1],
    barrier=ints[1],
    thread_sums=np.zeros((2, 2), dtype=np.int32),
    thread_row=floats[2],
    thread_queries=floats[2],
    thread_out=floats[2],
    thread_total=floats[2],
    thread_stats=floats[3],
    thread_weights=floats[2],
    thread_scores=floats[2],
    thread_places=ints[2],
)
job = shapes.Job(shape, shapes.Cache(halves, halves), work, scratch)
signature = tuple(typeof(value) for value in (2, one, every, job))
layers.run.compile(signature)
[assembly] = layers.run.inspect_asm().values()
assert "zmm" in assembly
assert "vpdpbusd" in assembly
"""


def test_the_kernels_of_newer_processors_compile(tmp_path: Path) -> None:
    wanted = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "icelake-server",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in wanted),
        "STALLFREE_CACHE": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
