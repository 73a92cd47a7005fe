"""Compiled CPU kernels: a whole forward pass in int8, in one parallel region, without a compiler.

Numba compiles them on the user's machine, once for each processor. They know arrays, not models.
Inner loops whose values must stay in registers are written as LLVM instructions (`ir.py`), all else
as Python, with the vectors of 16 floats of `simd.py`.
"""
