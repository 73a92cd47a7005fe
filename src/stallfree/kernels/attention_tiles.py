"""The two matrix products of attention for a few rows, generated: scores, and weighted values.

Keys and values are float32 or bfloat16. Of bfloat16, two rows of a matrix are interleaved (see
`kv_layout`), as the processor's dot product of pairs wants them; queries and weights are rounded to
bfloat16 for it. Where the processor has none, each half of a pair is widened to float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.ir import (
    BF16X32,
    F32,
    F32X16,
    I32,
    I32X16,
    I64,
    LANES,
    Builder,
    Loop,
    Value,
    call,
    data_of,
    load,
    offset,
    prefetch,
    splat,
    store,
)
from stallfree.kernels.jit import compiled
from stallfree.kernels.kv_layout import GROUP
from stallfree.kernels.processor import HAS_AVX512, HAS_BF16

STRETCH_GROUPS = 8
STRETCH = STRETCH_GROUPS * GROUP
ROWS = 7 if HAS_AVX512 else 4
LATER = 2 * STRETCH_GROUPS  # where the places of the next stretch are, after those of this
_VECTORS = 4 if HAS_AVX512 else 1  # in registers for each row
_HIGH_HALF, _LOW_HALF = 0xFFFF0000, 0xFFFF


def factor_dtype(kv_dtype: torch.dtype) -> torch.dtype:
    """What queries and weights are rounded to before keys and values of that type meet them."""
    return kv_dtype if HAS_BF16 else torch.float32


class _Form(NamedTuple):
    """How keys and values are multiplied.

    Attributes:
        pairs: whether they are pairs of bfloat16.
        dots: whether pairs are multiplied as such; queries and weights are pairs then, too.
    """

    pairs: bool
    dots: bool

    @staticmethod
    def of(stored: Any, factors: Any) -> _Form:
        """From the types of two arrays."""
        return _Form(stored.dtype == types.int16, factors.dtype == types.int16)

    @property
    def rows(self) -> int:
        """Of a matrix of keys or values, that one vector holds."""
        return 2 if self.pairs else 1

    @property
    def factors(self) -> int:
        """Words of 32 bits of each query or row of weights that meet one vector."""
        return 2 if self.pairs and not self.dots else 1

    def words(self, builder: Builder, pointer: Value) -> Value:
        """`pointer`, to queries or weights, as one to such words."""
        return builder.bitcast(pointer, (I32 if self.dots else F32).as_pointer())

    def load(self, builder: Builder, pointer: Value) -> Value:
        """16 columns of one row, or two rows, of keys or values."""
        return load(builder, pointer, I32X16 if self.pairs else F32X16)

    def first_row(self, builder: Builder, vector: Value, is_alone: Value) -> Value:
        """`vector`, with nothing in its second row if there is to be one row alone."""
        if not self.pairs:
            return vector
        kept = builder.select(is_alone, I32(_LOW_HALF), I32(-1))
        return builder.and_(vector, splat(builder, kept))

    def columns(self, builder: Builder, vector: Value) -> list[Value]:
        """What each factor is multiplied by."""
        if self.factors == 1:
            return [vector]
        low = builder.shl(vector, splat(builder, I32(16)))
        high = builder.and_(vector, splat(builder, I32(_HIGH_HALF)))
        return [builder.bitcast(half, F32X16) for half in (low, high)]

    def add_products(
        self, builder: Builder, totals: list[Value], words: list[Value], vectors: Iterable[Value]
    ) -> list[Value]:
        """`totals` (rows x vectors), plus each row's factors times each vector's columns.

        Args:
            words: where each row's first factor is, one after the other; then the second ones.
            vectors: loaded.
        """
        columns = [self.columns(builder, vector) for vector in vectors]
        rows = len(words) // self.factors
        for part in range(self.factors):
            for row in range(rows):
                pointer = words[part * rows + row]
                factor = splat(builder, load(builder, pointer, pointer.type.pointee))
                for v, column in enumerate(columns):
                    place = row * len(columns) + v
                    totals[place] = self._add(builder, totals[place], factor, column[part])
        return totals

    def _add(self, builder: Builder, total: Value, factor: Value, column: Value) -> Value:
        if not self.dots:
            return call(builder, "llvm.fma.v16f32", F32X16, factor, column, total)
        pairs = (builder.bitcast(each, BF16X32) for each in (factor, column))
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X16, total, *pairs)


def _make_score(rows: int) -> Any:
    """A function of `rows` queries and the keys of a stretch."""

    @intrinsic
    def score(
        typing: Any,
        queries: Any,
        at: Any,
        keys: Any,
        places: Any,
        depth: Any,
        scores: Any,
        later_at: Any,
        later_step: Any,
    ) -> Any:
        form = _Form.of(keys, queries)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            q = offset(builder, data_of(context, builder, queries, values[0]), values[1])
            q = form.words(builder, q)
            base = data_of(context, builder, keys, values[2])
            table = data_of(context, builder, places, values[3])
            out = data_of(context, builder, scores, values[5])
            steps = builder.udiv(values[4], I64(form.rows))
            later_step = builder.mul(values[7], I64(form.rows))
            groups, later = (
                [
                    offset(builder, base, load(builder, offset(builder, table, i), I64, align=8))
                    for i in range(first, first + STRETCH_GROUPS)
                ]
                for first in (0, LATER)
            )
            for first in range(0, STRETCH_GROUPS, _VECTORS):
                some = groups[first : first + _VECTORS]
                zero = ir.Constant(F32X16, None)
                loop = Loop(builder, steps, [zero] * (rows * len(some)))
                words_at = offset(builder, q, builder.mul(loop.index, I64(form.factors * ROWS)))
                key_at = builder.mul(loop.index, I64(form.rows * GROUP))
                vectors = [form.load(builder, offset(builder, k, key_at)) for k in some]
                fetch_at = builder.add(values[6], builder.mul(loop.index, later_step))
                for k in later[first : first + _VECTORS]:
                    prefetch(builder, offset(builder, k, fetch_at))
                words = [
                    offset(builder, words_at, part * ROWS + row)
                    for part in range(form.factors)
                    for row in range(rows)
                ]
                made = form.add_products(builder, list(loop.values), words, vectors)
                for index, value in enumerate(loop.close(made)):
                    row, v = divmod(index, len(some))
                    store(builder, value, offset(builder, out, row * STRETCH + (first + v) * GROUP))
            return context.get_dummy_value()

        signature = types.none(
            queries, types.intp, keys, places, types.intp, scores, types.intp, types.intp
        )
        return signature, generate

    return score


def _make_weigh(rows: int, vectors: int) -> Any:
    """A function that adds the values of a stretch to `rows` rows of outputs, weighted."""

    @intrinsic
    def weigh(
        typing: Any,
        weights: Any,
        shrink: Any,
        values_: Any,
        places: Any,
        keys: Any,
        width: Any,
        column: Any,
        out: Any,
        at: Any,
        later_at: Any,
        later_step: Any,
    ) -> Any:
        form = _Form.of(values_, weights)
        wide = form.rows * LANES  # elements of a vector

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            p, factors, base, table = (
                data_of(context, builder, signature.args[i], values[i]) for i in range(4)
            )
            p = form.words(builder, p)
            row_words = STRETCH // (2 if form.dots else 1)
            table = offset(builder, table, STRETCH_GROUPS)  # the values' places
            result = offset(builder, data_of(context, builder, out, values[7]), values[8])
            count, stride, first = values[4], values[5], values[6]
            result = offset(builder, result, first)
            rows_at = [
                offset(builder, result, builder.mul(stride, I64(row))) for row in range(rows)
            ]
            initial = []
            for row in range(rows):
                factor = splat(builder, load(builder, offset(builder, factors, row), F32))
                for v in range(vectors):
                    old = load(builder, offset(builder, rows_at[row], v * LANES), F32X16)
                    initial.append(builder.fmul(old, factor))
            whole = builder.udiv(builder.add(count, I64(GROUP - 1)), I64(GROUP))
            groups = Loop(builder, whole, initial)
            start, later = (
                load(builder, offset(builder, table, at), I64, align=8)
                for at in (groups.index, builder.add(groups.index, I64(LATER)))
            )
            first_token = builder.mul(groups.index, I64(GROUP))
            left = builder.sub(count, first_token)
            left = builder.select(builder.icmp_signed("<", left, I64(GROUP)), left, I64(GROUP))
            steps = builder.udiv(builder.add(left, I64(form.rows - 1)), I64(form.rows))
            tokens = Loop(builder, steps, groups.values)
            token = builder.mul(tokens.index, I64(form.rows))
            column_at = builder.add(builder.mul(token, stride), builder.mul(first, I64(form.rows)))
            data = offset(builder, base, builder.add(start, column_at))
            is_alone = builder.icmp_signed("<", left, builder.add(token, I64(form.rows)))
            loaded = [form.load(builder, offset(builder, data, v * wide)) for v in range(vectors)]
            seen = [form.first_row(builder, vector, is_alone) for vector in loaded]
            fetch_at = builder.add(values[9], builder.mul(token, values[10]))
            ahead = offset(builder, base, builder.add(later, fetch_at))
            for v in range(vectors):
                prefetch(builder, offset(builder, ahead, v * wide))
            word = builder.add(first_token, token)
            if form.dots:
                word = builder.udiv(word, I64(2))
            words = [
                offset(builder, p, builder.add(word, I64(row * row_words + part)))
                for part in range(form.factors)
                for row in range(rows)
            ]
            made = form.add_products(builder, list(tokens.values), words, seen)
            for index, value in enumerate(groups.close(tokens.close(made))):
                row, v = divmod(index, vectors)
                store(builder, value, offset(builder, rows_at[row], v * LANES))
            return context.get_dummy_value()

        numbers = (types.intp,) * 3
        signature = types.none(
            weights, shrink, values_, places, *numbers, out, types.intp, types.intp, types.intp
        )
        return signature, generate

    return weigh


_score1, _score2, _score4, _score_most = (_make_score(rows) for rows in (1, 2, 4, ROWS))
_weigh1, _weigh2, _weigh4, _weigh_most = (_make_weigh(rows, _VECTORS) for rows in (1, 2, 4, ROWS))
_narrow1, _narrow2, _narrow4, _narrow_most = (_make_weigh(rows, 1) for rows in (1, 2, 4, ROWS))


@compiled
def score(rows, queries, at, keys, places, depth, scores, part, parts):
    """Scores (rows, STRETCH) of `rows` queries and the keys of a stretch.

    Asks for part `part` of `parts` of the next stretch's keys meanwhile.
    """
    step = GROUP // parts
    later = part * step * depth
    if rows > 4:
        _score_most(queries, at, keys, places, depth, scores, later, step)
    elif rows > 2:
        _score4(queries, at, keys, places, depth, scores, later, step)
    elif rows > 1:
        _score2(queries, at, keys, places, depth, scores, later, step)
    else:
        _score1(queries, at, keys, places, depth, scores, later, step)


@compiled
def weigh(rows, weights, shrink, values, places, count, width, out, at, part, parts):
    """Multiply `rows` outputs by `shrink`, and add the first `count` values of a stretch, weighted.

    Asks for part `part` of `parts` of the next stretch's values meanwhile.
    """
    turns = width // (_VECTORS * LANES) + width % (_VECTORS * LANES) // LANES
    step = width // (parts * turns)
    later = part * turns * step * GROUP
    column = 0
    while column + _VECTORS * LANES <= width:
        if rows > 4:
            _weigh_most(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 2:
            _weigh4(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 1:
            _weigh2(weights, shrink, values, places, count, width, column, out, at, later, step)
        else:
            _weigh1(weights, shrink, values, places, count, width, column, out, at, later, step)
        column += _VECTORS * LANES
        later += step * GROUP
    while column < width:
        if rows > 4:
            _narrow_most(
                weights, shrink, values, places, count, width, column, out, at, later, step
            )
        elif rows > 2:
            _narrow4(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 1:
            _narrow2(weights, shrink, values, places, count, width, column, out, at, later, step)
        else:
            _narrow1(weights, shrink, values, places, count, width, column, out, at, later, step)
        column += LANES
        later += step * GROUP
