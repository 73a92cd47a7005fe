"""Vectors of 16 floats for compiled functions.

LLVM maps a vector to one AVX-512 register or to several smaller ones. Every operation rounds the
same way on each lane, so a row's result depends on that row alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from stallfree.kernels.ir import (
    BF16X16,
    F32,
    F32X16,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    LANES,
    call,
    data_of,
    offset,
    splat,
    store,
)
from stallfree.kernels.ir import load as load_value
from stallfree.kernels.processor import HAS_BF16

I16X16 = ir.VectorType(I16, LANES)


class _Floats(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


F32X16_TYPE = _Floats()


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, F32X16)


Emit = Callable[..., Any]


def _operation(arguments: int, result: Any = F32X16_TYPE) -> Callable[[Emit], Any]:
    """A function of `arguments` vectors from what emits it: `emit(builder, *vectors)`."""

    def decorate(emit: Emit) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return emit(builder, *values)

        signature = result(*(F32X16_TYPE,) * arguments)
        if arguments == 1:
            return intrinsic(lambda typing, a: (signature, generate))
        if arguments == 2:
            return intrinsic(lambda typing, a, b: (signature, generate))
        return intrinsic(lambda typing, a, b, c: (signature, generate))

    return decorate


@_operation(3)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return call(builder, "llvm.fma.v16f32", F32X16, a, b, c)


@_operation(2)
def maximum(builder: Any, a: Any, b: Any) -> Any:
    """`a` where it is larger, else `b`: so `b` wins over NaN, in one instruction."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(1)
def exp2(builder: Any, a: Any) -> Any:
    """2 to the power of each lane, within 2e-7; out of [-126, 126], and for NaN, the nearest.

    The fraction's power is a polynomial and the whole part goes into the exponent's bits; exp2(0)
    is exactly 1.
    """
    low, high = (splat(builder, F32(limit)) for limit in (-126.0, 126.0))
    a = builder.select(builder.fcmp_ordered(">", a, low), a, low)
    a = builder.select(builder.fcmp_ordered("<", a, high), a, high)
    whole = call(builder, "llvm.nearbyint.v16f32", F32X16, a)
    fraction = builder.fsub(a, whole)
    power = splat(builder, F32(_EXP2_TERMS[-1]))
    for term in reversed(_EXP2_TERMS[:-1]):
        power = call(builder, "llvm.fma.v16f32", F32X16, power, fraction, splat(builder, F32(term)))
    bits = builder.shl(builder.fptosi(whole, I32X16), splat(builder, I32(23)))
    return builder.bitcast(builder.add(builder.bitcast(power, I32X16), bits), F32X16)


# 1 + x * q(x) with the least relative error on [-0.5, 0.5], 9.1e-8, by least squares whose weights
# follow the error (Lawson's algorithm).
_EXP2_TERMS = (1.0, 0.6931469776, 0.2402224208, 0.05550733744, 0.009671512688, 0.001326472725)


@_operation(1, types.float32)
def total(builder: Any, a: Any) -> Any:
    """The sum of all lanes, halves added to halves."""
    return _fold(builder, a, lambda x, y: builder.fadd(x, y))


@_operation(1, types.float32)
def largest(builder: Any, a: Any) -> Any:
    """The largest of all lanes."""
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


def _fold(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    for distance in (8, 4, 2, 1):
        order = ir.Constant(I32X16, [lane ^ distance for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, order))
    return builder.extract_element(vector, I32(0))


def _operator(function: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    combine = _operation(2)(emit)

    @overload(function)
    def _(a, b):  # Numba compares signatures
        if isinstance(a, _Floats) and isinstance(b, _Floats):
            return lambda a, b: combine(a, b)
        return None


_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def fill(typing: Any, scalar: Any) -> Any:
    """A vector of 16 times `scalar`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return splat(builder, values[0])

    return F32X16_TYPE(types.float32), generate


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """16 of a flat float32 array from `index`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        return load_value(builder, offset(builder, data, values[1]), F32X16)

    return F32X16_TYPE(array, types.intp), generate


@intrinsic
def load_ints(typing: Any, array: Any, index: Any, minus: Any, minus_index: Any, by: Any) -> Any:
    """16 of a flat int32 array from `index`, less `by` times those of another, as floats."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        both = []
        for i in (0, 2):
            data = data_of(context, builder, signature.args[i], values[i])
            place = offset(builder, data, values[i + 1])
            both.append(builder.load(builder.bitcast(place, I32X16.as_pointer()), align=4))
        less = builder.mul(both[1], splat(builder, values[4]))
        return builder.sitofp(builder.sub(both[0], less), F32X16)

    return F32X16_TYPE(array, types.intp, minus, types.intp, types.int32), generate


@intrinsic
def put(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store 16 floats in a flat array from `index`; in int16 as bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        value = values[2]
        if array.dtype == types.int16:
            value = _to_bfloat16(builder, value)
        store(builder, value, offset(builder, data, values[1]), align=1)
        return context.get_dummy_value()

    return types.none(array, types.intp, F32X16_TYPE), generate


@intrinsic
def put_quads(typing: Any, array: Any, index: Any, stride: Any, vector: Any, plus: Any) -> Any:
    """Store 16 floats, rounded, plus a number, in a flat uint8 array: by fours, `stride` apart."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        whole = call(builder, "llvm.nearbyint.v16f32", F32X16, values[3])
        shifted = builder.add(builder.fptosi(whole, I32X16), splat(builder, values[4]))
        quads = builder.bitcast(
            builder.trunc(shifted, ir.VectorType(I8, LANES)), ir.VectorType(I32, 4)
        )
        for quad in range(4):
            step = builder.mul(values[2], values[2].type(quad))
            place = offset(builder, data, builder.add(values[1], step))
            store(builder, builder.extract_element(quads, I32(quad)), place, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, F32X16_TYPE, types.int32), generate


@intrinsic
def put_words(typing: Any, array: Any, index: Any, stride: Any, vector: Any) -> Any:
    """Store 16 floats in a flat array, as `put` does: words of 32 bits, `stride` words apart."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        data = builder.bitcast(offset(builder, data, values[1]), I32.as_pointer())
        value = values[3]
        if array.dtype == types.int16:
            value = _to_bfloat16(builder, value)
        lanes = array.dtype.bitwidth * LANES // 32
        words = builder.bitcast(value, ir.VectorType(I32, lanes))
        for lane in range(lanes):
            place = offset(builder, data, builder.mul(values[2], I64(lane)))
            store(builder, builder.extract_element(words, I32(lane)), place, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, F32X16_TYPE), generate


@intrinsic
def put_one(typing: Any, array: Any, index: Any, scalar: Any) -> Any:
    """Store one float in a flat array, as `put` does."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        value = values[2]
        if array.dtype == types.int16:
            half = _to_bfloat16(builder, splat(builder, value))
            value = builder.extract_element(half, I32(0))
        place = offset(builder, data, values[1])
        builder.store(value, builder.bitcast(place, value.type.as_pointer()))
        return context.get_dummy_value()

    return types.none(array, types.intp, types.float32), generate


def _to_bfloat16(builder: Any, vector: Any) -> Any:
    """The nearest bfloat16 of each lane, as int16; of two the even one. NaN stays NaN."""
    if HAS_BF16:
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        return builder.bitcast(call(builder, name, BF16X16, vector), I16X16)
    bits = builder.bitcast(vector, I32X16)
    shift = splat(builder, I32(16))
    is_odd = builder.and_(builder.lshr(bits, shift), splat(builder, I32(1)))
    rounded = builder.add(bits, builder.add(is_odd, splat(builder, I32(0x7FFF))))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    rounded = builder.select(is_nan, splat(builder, I32(0x7FC00000)), rounded)
    return builder.trunc(builder.lshr(rounded, shift), I16X16)


@intrinsic
def keep_lanes(typing: Any, vector: Any, low: Any, high: Any, otherwise: Any) -> Any:
    """Lanes `low` up to `high` (exclusive) of `vector`; `otherwise` in the others."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = ir.Constant(I32X16, list(range(LANES)))
        limits = [splat(builder, builder.trunc(value, I32)) for value in values[1:3]]
        inside = builder.and_(
            builder.icmp_signed(">=", lanes, limits[0]),
            builder.icmp_signed("<", lanes, limits[1]),
        )
        return builder.select(inside, values[0], splat(builder, values[3]))

    return F32X16_TYPE(F32X16_TYPE, types.int64, types.int64, types.float32), generate
