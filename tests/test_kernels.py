"""Single kernels against exact and float64 arithmetic, through small compiled functions."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.model.int8 import is_supported

if not is_supported():
    pytest.skip("no int8 kernels on this CPU", allow_module_level=True)

from stallfree.kernels.int8_matmul import (
    DEPTH,
    LEVELS,
    MAX_INPUTS,
    PANEL,
    ROWS,
    WEIGHT_LEVELS,
    column_sums_of,
    multiply_tile,
    pack,
    padded,
)
from stallfree.kernels.ir import LANES
from stallfree.kernels.jit import entry
from stallfree.kernels.processor import HAS_VNNI
from stallfree.kernels.rows import quantize, rms_norm
from stallfree.kernels.simd import exp2, load, put


@entry
def tiles(rows, activations, weights, sums, out):  # type: ignore[no-untyped-def]
    """Sums (rows, outputs) of unsigned activations."""
    steps = weights.shape[1] // (PANEL * DEPTH)
    for group in range((rows + ROWS - 1) // ROWS):
        some = min(ROWS, rows - group * ROWS)
        for panel in range(weights.shape[0]):
            multiply_tile(some, activations, group, weights, panel, steps, 1, sums)
            for row in range(some):
                for column in range(PANEL):
                    out[group * ROWS + row, panel * PANEL + column] = sums[row * PANEL + column]


@entry
def norm_and_quantize(x, weight, size, normed, activations, scales, zeros):  # type: ignore[no-untyped-def]
    width = weight.size
    for row in range(x.shape[0]):
        rms_norm(x[row], 0, weight, size, width, np.float32(1e-6), normed[row], 0)
        quantize(normed[row], 0, width, row, activations, scales, zeros)


@entry
def powers(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        put(out, i, exp2(load(x, i)))


def aligned(*shape: int, dtype: torch.dtype) -> Any:
    return torch.zeros(shape, dtype=dtype).numpy()


def groups_of(rows: Any) -> Any:
    """Activations (rows, inputs) as tiles take them: [rows / ROWS][inputs / 4][ROWS][4], flat."""
    count, width = rows.shape
    whole = np.zeros((padded(count, ROWS), width), dtype=np.uint8)
    whole[:count] = rows
    return whole.reshape(-1, ROWS, width // DEPTH, DEPTH).swapaxes(1, 2).reshape(-1)


def multiply(activations: Any, zero: int, weight: Any) -> Any:
    """Sums of activations (rows, inputs), 0 to 255, less `zero`, times a weight (outputs, inputs).

    By the kernels; all outputs, padded.
    """
    (rows, inputs), outputs = activations.shape, padded(len(weight), PANEL)
    width = padded(inputs, LANES)
    panels = torch.empty((outputs // PANEL, width * PANEL), dtype=torch.int8)
    whole = torch.zeros((outputs, inputs), dtype=torch.int8)
    whole[: len(weight)] = torch.from_numpy(weight)
    pack(whole, width, panels)
    unsigned = np.full((rows, width), zero, dtype=np.uint8)
    unsigned[:, :inputs] = activations
    sums, out = aligned(ROWS * PANEL, dtype=torch.int32), np.empty((rows, outputs), dtype=np.int32)
    tiles(rows, groups_of(unsigned), panels.numpy(), sums, out)
    return out - zero * column_sums_of(2, panels.numpy())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 200),
    zero=st.integers(0, 255),
    seed=st.integers(0, 1000),
)
def test_sums_of_products_are_exact(
    rows: int, inputs: int, outputs: int, zero: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    activations = rng.integers(0, 256, (rows, inputs))
    weight = rng.integers(-WEIGHT_LEVELS, WEIGHT_LEVELS + 1, (outputs, inputs), dtype=np.int8)
    made = multiply(activations, zero, weight)
    assert (made[:, :outputs] == (activations - zero) @ weight.T.astype(np.int64)).all()
    assert not made[:, outputs:].any()
    for row in range(rows):
        assert (multiply(activations[row : row + 1], zero, weight) == made[row]).all()


def test_products_use_the_instructions_made_for_them() -> None:
    compiled = numba.njit(tiles.py_func)
    kinds = aligned(1, dtype=torch.uint8), aligned(1, 1, dtype=torch.int8)
    sums = aligned(1, dtype=torch.int32), aligned(1, 1, dtype=torch.int32)
    compiled.compile(tuple(numba.typeof(each) for each in (1, *kinds, *sums)))
    [assembly] = compiled.inspect_asm().values()
    assert ("vpdpbusd" in assembly) == ("zmm" in assembly) == HAS_VNNI


@pytest.mark.parametrize(("activation", "zero"), [(0, 255), (255, 0), (0, 128), (255, 128)])
@pytest.mark.parametrize("weight", [-WEIGHT_LEVELS, WEIGHT_LEVELS])
def test_the_largest_sums_are_exact(activation: int, zero: int, weight: int) -> None:
    """Of as many inputs as are allowed: nothing overflows or saturates."""
    inputs = MAX_INPUTS // LANES * LANES
    activations, weights = np.full((7, inputs), activation), np.full((65, inputs), weight, np.int8)
    made = multiply(activations, zero, weights)
    assert (made[:, :65] == inputs * (activation - zero) * weight).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    size=st.integers(1, 200),
    seed=st.integers(0, 1000),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_rows_are_normed_and_rounded_to_the_nearest_level(
    rows: int, size: int, seed: int, magnitude: float
) -> None:
    """Also rows whose numbers are all of one sign, and one of zeros."""
    rng = np.random.default_rng(seed)
    width = padded(size, PANEL)
    x, weight = aligned(rows, width, dtype=torch.float32), aligned(width, dtype=torch.float32)
    x[:, :size] = rng.standard_normal((rows, size)) * magnitude
    x[-1] = 0
    weight[:size] = np.abs(rng.standard_normal(size)) + 0.1
    x[0], x[1:2] = np.abs(x[0]), -np.abs(x[1:2])
    normed = aligned(rows, width, dtype=torch.float32)
    activations = aligned(padded(rows, ROWS) * width, dtype=torch.uint8)
    scales, zeros = aligned(rows, dtype=torch.float32), aligned(rows, dtype=torch.int32)
    norm_and_quantize(x, weight, size, normed, activations, scales, zeros)

    exact = x.astype(np.float64)
    exact *= weight / np.sqrt((exact**2).sum(axis=1, keepdims=True) / size + 1e-6)
    most = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(normed - exact) <= 2e-6 * most).all()
    reach = exact.max(axis=1, initial=0) - exact.min(axis=1, initial=0)
    assert np.allclose(scales[:-1], reach[:-1] / LEVELS, rtol=4e-6)
    levels = activations.reshape(-1, width // DEPTH, ROWS, DEPTH).swapaxes(1, 2)
    levels = levels.reshape(-1, width)[:rows].astype(np.int64)
    used = np.append(levels, zeros[:, None], axis=1)
    assert (used.min(axis=1) == 0).all()
    assert (np.abs(used.max(axis=1)[:-1] - LEVELS) <= 1).all()
    levels -= zeros[:, None]
    assert not levels[-1].any()
    assert (np.abs(levels * scales[:, None] - exact) <= scales[:, None] * 0.501).all()


def test_powers_of_two_are_right_to_float32() -> None:
    x = np.concatenate(
        [np.linspace(-126, 126, 99_985), [0, -0.0, -126, 126, 0.5, -0.5, 1.5, 2.5, 1e-30]]
    )
    x = np.pad(x, (0, -len(x) % LANES)).astype(np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert (np.abs(out / np.exp2(x.astype(np.float64)) - 1) < 2e-7).all()
    assert (out[x == 0] == 1).all()
    assert (out[x == np.rint(x)] == np.exp2(x[x == np.rint(x)])).all()


def test_powers_out_of_range_are_the_nearest() -> None:
    x = np.zeros(LANES, dtype=np.float32)
    x[:4] = -1e30, -1000, 1000, 1e30
    out = np.empty_like(x)
    powers(x, out)
    assert out[:4].tolist() == [2.0**-126, 2.0**-126, 2.0**126, 2.0**126]
