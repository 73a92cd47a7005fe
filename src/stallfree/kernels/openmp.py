"""Parallel regions on PyTorch's own OpenMP threads.

A second pool of threads would fight PyTorch's for the cores: idle OpenMP threads spin. So a region
is started in the library that PyTorch has loaded, through the entry points that GCC compiles
`#pragma omp` to (libgomp's ABI, which LLVM's libomp offers too). Barriers are our own: they spin
for a moment and then yield the core. The package itself (`stallfree/__init__.py`) lets idle threads
of the pool sleep soon, for the same reason.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch  # noqa: F401  # loads the OpenMP library
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.ir import I8, I32, I64, call, data_of, offset
from stallfree.kernels.processor import IS_X86

_SYMBOLS = {  # by the name that compiled code knows
    "stallfree_parallel": "GOMP_parallel",
    "stallfree_thread": "omp_get_thread_num",
    "stallfree_threads": "omp_get_num_threads",
}
BARRIER_WORDS = 16  # int64
_LOOKS = 200  # before a waiting thread offers its core; about 5 us


def _connect() -> bool:
    """Make the library known to compiled code; False if there is none that fits."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    files = dict.fromkeys(line.split()[-1] for line in mapped if "libgomp" in line)
    bundled = [file for file in files if "/torch" in file]  # comes first if there are several
    for file in bundled or files:
        library = ctypes.CDLL(file)
        for name, symbol in _SYMBOLS.items():
            address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
            llvmlite.binding.add_symbol(name, address)
        give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
        llvmlite.binding.add_symbol("stallfree_yield", give_way)
        return True
    return False


AVAILABLE = _connect()


@intrinsic
def parallel(typing: Any, body: Any, threads: Any, arguments: Any) -> Any:
    """Run `body(thread, threads, *arguments)` in `threads` threads, and wait for all.

    There may be fewer (OMP_THREAD_LIMIT): `body` is told how many. It is a function made by
    `compiled`; what it returns is lost.
    """
    inner = (types.intp, types.intp, *arguments.types)
    body.dispatcher.compile(inner)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = body.dispatcher.overloads[inner]
        context.active_code_library.add_linking_library(made.library)
        members = [builder.extract_value(values[2], i) for i in range(len(arguments))]
        frame = ir.LiteralStructType([member.type for member in members])
        memory = builder.alloca(frame)
        for index, member in enumerate(members):
            builder.store(member, builder.gep(memory, [I32(0), I32(index)]))
        run = _trampoline(context, builder, made, frame)
        call(
            builder,
            "stallfree_parallel",
            ir.VoidType(),
            run,
            builder.bitcast(memory, I8.as_pointer()),
            builder.trunc(values[1], I32),
            I32(0),
        )
        return context.get_dummy_value()

    return types.none(body, types.intp, arguments), generate


def _trampoline(context: Any, builder: Any, made: Any, frame: Any) -> Any:
    """What each thread enters: takes the arguments out of `frame` and calls the body."""
    signature = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
    name = builder.module.get_unique_name("stallfree_region")
    function = ir.Function(builder.module, signature, name)
    function.linkage = "internal"
    inside = ir.IRBuilder(function.append_basic_block())
    memory = inside.bitcast(function.args[0], frame.as_pointer())
    arguments = [
        inside.load(inside.gep(memory, [I32(0), I32(i)])) for i in range(len(frame.elements))
    ]
    thread, threads = (
        inside.sext(call(inside, name, I32), I64)
        for name in ("stallfree_thread", "stallfree_threads")
    )
    target = context.declare_function(inside.module, made.fndesc)
    context.call_conv.call_function(
        inside,
        target,
        made.fndesc.restype,
        made.fndesc.argtypes,
        [thread, threads, *arguments],
    )
    inside.ret_void()
    return function


@intrinsic
def barrier(typing: Any, state: Any, threads: Any) -> Any:
    """Wait until every thread of the region is here.

    Not OpenMP's own: that one keeps the core while it waits, and if another process has pushed two
    threads of a region onto one core, each barrier then costs a whole time slice.

    Args:
        state: int64 (16,), zeros before the first barrier: threads that have arrived, and, a
            cache line further on, how often all had.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arrived = data_of(context, builder, signature.args[0], values[0])
        turns = offset(builder, arrived, BARRIER_WORDS // 2)
        turn = builder.load_atomic(turns, "acquire", 8)
        before = builder.atomic_rmw("add", arrived, I64(1), "acq_rel")
        last = builder.icmp_signed("==", before, builder.sub(values[1], I64(1)))
        with builder.if_else(last) as (is_last, is_not):
            with is_last:
                builder.store_atomic(I64(0), arrived, "release", 8)
                builder.atomic_rmw("add", turns, I64(1), "acq_rel")
            with is_not:
                _wait(builder, turns, turn)
        return context.get_dummy_value()

    return types.none(state, types.intp), generate


def _wait(builder: Any, turns: Any, turn: Any) -> None:
    """Spin until `turns` moves on; after a while, offer the core to others between looks."""
    before = builder.block
    loop, still, yielding, done = (
        builder.append_basic_block(name) for name in ("wait", "still", "yielding", "done")
    )
    builder.branch(loop)
    builder.position_at_end(loop)
    looks = builder.phi(I64)
    looks.add_incoming(I64(0), before)
    now = builder.load_atomic(turns, "acquire", 8)
    builder.cbranch(builder.icmp_signed("==", now, turn), still, done)
    builder.position_at_end(still)
    if IS_X86:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    more = builder.add(looks, I64(1))
    looks.add_incoming(more, still)
    looks.add_incoming(more, yielding)
    builder.cbranch(builder.icmp_signed("<", more, I64(_LOOKS)), loop, yielding)
    builder.position_at_end(yielding)
    call(builder, "stallfree_yield", I32)
    builder.branch(loop)
    builder.position_at_end(done)


@intrinsic
def fetch_add(typing: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Add `amount` to `counters[index]` (int64) at once for all threads; gives the old value."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = offset(
            builder, data_of(context, builder, signature.args[0], values[0]), values[1]
        )
        return builder.atomic_rmw("add", pointer, values[2], "acq_rel")

    return types.int64(counters, types.intp, types.int64), generate
