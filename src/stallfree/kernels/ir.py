"""Words of LLVM's intermediate representation that the kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
LANES = 16
F32 = ir.FloatType()


class _BFloat(ir.Type):  # llvmlite has no name for it
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


F32X16 = ir.VectorType(F32, LANES)
I32X16 = ir.VectorType(I32, LANES)
BF16X16, BF16X32 = (ir.VectorType(_BFloat(), lanes) for lanes in (LANES, 2 * LANES))

Builder = Any  # llvmlite's IRBuilder
Value = Any  # an LLVM value


def declare(
    builder: Builder, name: str, result: ir.Type, arguments: Sequence[ir.Type]
) -> ir.Function:
    """The function `name` from outside, declared in the module under construction."""
    module = builder.module
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(result, arguments), name)


def call(builder: Builder, name: str, result: ir.Type, *arguments: Value) -> Value:
    """Call an LLVM intrinsic or a function of the process."""
    function = declare(builder, name, result, [argument.type for argument in arguments])
    return builder.call(function, arguments)


def data_of(context: Any, builder: Builder, array_type: Any, array: Value) -> Value:
    """The data pointer of a Numba array."""
    return context.make_array(array_type)(context, builder, array).data


def offset(builder: Builder, pointer: Value, elements: Value | int) -> Value:
    """`pointer` moved by `elements` of what it points to."""
    return builder.gep(pointer, [I64(elements) if isinstance(elements, int) else elements])


def load(builder: Builder, pointer: Value, type_: ir.Type, align: int = 4) -> Value:
    """A value of `type_` at `pointer`, whatever that points to."""
    return builder.load(builder.bitcast(pointer, type_.as_pointer()), align=align)


def store(builder: Builder, value: Value, pointer: Value, align: int = 4) -> None:
    """Store `value` at `pointer`, whatever that points to."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def splat(builder: Builder, scalar: Value) -> Value:
    """A vector of 16 times `scalar`."""
    vector = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(I32X16, [0] * LANES))


class Loop:
    """A counted loop whose body carries values from turn to turn, in registers.

        loop = Loop(builder, stop, initial)
        ... code that uses loop.index and loop.values ...
        results = loop.close(next_values)

    The body runs at least once.
    """

    def __init__(self, builder: Builder, stop: Value, initial: Sequence[Value]) -> None:
        self._builder, self._stop = builder, stop
        before = builder.block
        self._block = builder.append_basic_block("loop")
        builder.branch(self._block)
        builder.position_at_end(self._block)
        self.index = builder.phi(I64)
        self.index.add_incoming(I64(0), before)
        self.values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(self.values, initial, strict=True):
            phi.add_incoming(value, before)

    def close(self, values: Sequence[Value]) -> Sequence[Value]:
        """End the body; gives the values after the last turn."""
        builder = self._builder
        index = builder.add(self.index, I64(1))
        self.index.add_incoming(index, builder.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, builder.block)
        after = builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", index, self._stop), self._block, after)
        builder.position_at_end(after)
        return values


def prefetch(builder: Builder, pointer: Value) -> None:
    """Ask for the cache line at `pointer`."""
    byte = builder.bitcast(pointer, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), byte, I32(0), I32(3), I32(1))
