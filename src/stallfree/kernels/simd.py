"""Vectors of 16 floats for compiled functions.

LLVM maps a vector to one AVX-512 register or to several smaller ones. Every operation rounds the
same way on each lane, so a row's result depends on that row alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from stallfree.kernels.ir import (
    F16,
    F32,
    F32X16,
    I8,
    I32,
    I32X16,
    LANES,
    call,
    data_of,
    load_floats,
    offset,
    splat,
    store,
)


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
    """The larger of each lane; a number wins over NaN."""
    return call(builder, "llvm.maxnum.v16f32", F32X16, a, b)


@_operation(1)
def exp2(builder: Any, a: Any) -> Any:
    """2 to the power of each lane, within 2e-7; out of [-126, 126], and for NaN, the nearest.

    The fraction's power is a polynomial (its Taylor series on [-0.5, 0.5]) and the whole part
    goes into the exponent's bits; exp2(0) is exactly 1.
    """
    low, high = (splat(builder, F32(limit)) for limit in (-126.0, 126.0))
    a = call(builder, "llvm.maxnum.v16f32", F32X16, a, low)
    a = call(builder, "llvm.minnum.v16f32", F32X16, a, high)
    whole = call(builder, "llvm.nearbyint.v16f32", F32X16, a)
    fraction = builder.fsub(a, whole)
    power = splat(builder, F32(_EXP2_TERMS[-1]))
    for term in reversed(_EXP2_TERMS[:-1]):
        power = call(builder, "llvm.fma.v16f32", F32X16, power, fraction, splat(builder, F32(term)))
    bits = builder.shl(builder.fptosi(whole, I32X16), splat(builder, I32(23)))
    return builder.bitcast(builder.add(builder.bitcast(power, I32X16), bits), F32X16)


_EXP2_TERMS = tuple(math.log(2) ** n / math.factorial(n) for n in range(8))


@_operation(1, types.float32)
def total(builder: Any, a: Any) -> Any:
    """The sum of all lanes, halves added to halves."""
    return _fold(builder, a, lambda x, y: builder.fadd(x, y))


@_operation(1, types.float32)
def largest(builder: Any, a: Any) -> Any:
    """The largest of all lanes."""
    return _fold(builder, a, lambda x, y: call(builder, "llvm.maxnum.v16f32", F32X16, x, y))


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
    """16 floats of a flat array from `index`: float32, or uint16 that hold float16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        return load_floats(builder, offset(builder, data, values[1]))

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
    """Store 16 floats in a flat array from `index`; in uint16 as float16.

    float16 is cut at its largest numbers, so that no number becomes infinite; infinities become
    NaN, so that a later sum tells of them.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        value = values[2]
        if array.dtype == types.uint16:
            value = builder.fptrunc(_clamp(builder, value, 65504.0), ir.VectorType(F16, LANES))
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
def put_one(typing: Any, array: Any, index: Any, scalar: Any) -> Any:
    """Store one float in a flat array, as `put` does."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = data_of(context, builder, signature.args[0], values[0])
        value = values[2]
        if array.dtype == types.uint16:
            vector = _clamp(builder, splat(builder, value), 65504.0)
            value = builder.fptrunc(builder.extract_element(vector, I32(0)), F16)
        place = offset(builder, data, values[1])
        builder.store(value, builder.bitcast(place, value.type.as_pointer()))
        return context.get_dummy_value()

    return types.none(array, types.intp, types.float32), generate


def _clamp(builder: Any, vector: Any, limit: float) -> Any:
    """Cut finite lanes at `limit` and its negative; what is no finite number becomes NaN."""
    nothing = builder.fmul(vector, splat(builder, F32(0.0)))  # NaN for infinities and NaN
    for order, edge in ((">", limit), ("<", -limit)):
        edges = splat(builder, F32(edge))
        outside = builder.fcmp_ordered(order, vector, edges)
        vector = builder.select(outside, edges, vector)
    return builder.fadd(vector, nothing)


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
