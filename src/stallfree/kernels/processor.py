"""What the processor can do.

The int8 kernels are made for two kinds: AVX-512 with VNNI, and AVX2, where weights have 7 bits
(`int8_matmul.py`). Attention multiplies pairs of bfloat16 with AVX512_BF16. For others (ARM) there
are no kernels: models run in floats there.
"""

from __future__ import annotations

import platform

import llvmlite.binding
import numba


def _features() -> set[str]:
    """Names of LLVM's processor features; `NUMBA_CPU_FEATURES` may say otherwise than the host."""
    told: str | None = numba.config.CPU_FEATURES
    if told is not None:
        return {name.removeprefix("+") for name in told.split(",") if not name.startswith("-")}
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


_FEATURES = _features()
IS_X86 = platform.machine() in ("x86_64", "AMD64")
HAS_AVX2 = {"avx2", "fma", "f16c"} <= _FEATURES
HAS_AVX512 = {"avx512f", "avx512bw", "avx512vl"} <= _FEATURES
HAS_BF16 = HAS_AVX512 and "avx512bf16" in _FEATURES
HAS_VNNI = HAS_AVX512 and "avx512vnni" in _FEATURES
