"""Where keys, values and queries lie: matrices in float32, or in bfloat16 with rows in pairs.

Keys and values lie in groups of 16 tokens: keys [groups][K] matrices of D rows and 16 columns, so
that 16 keys are a vector, values [groups][K] matrices of 16 rows and padded D columns. An array of
bfloat16 has int16 for its type, since NumPy has none.
"""

from __future__ import annotations

from stallfree.kernels.ir import LANES
from stallfree.kernels.jit import inlined

GROUP = LANES  # tokens whose keys and values lie together


@inlined
def element(array, row, column, columns):
    """Where an element of a matrix lies: of bfloat16, a row's elements are beside the next row's.

    32 bits have one element of float32, or two of bfloat16.
    """
    rows = 4 // array.itemsize
    return (row // rows * columns + column) * rows + row % rows
