"""How kernels are compiled, and where what was compiled is kept.

No compiler has to be installed: Numba brings LLVM with it. The machine code stays in the cache
folder, under a hash of all kernels, so a change of any of them compiles all anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock, Timeout

from stallfree.cache import cache_folder

_SAVE_TIMEOUT_S = 60.0  # that another process may take; most take milliseconds
_log = logging.getLogger(__name__)


def source_hash() -> str:
    """What changes when any kernel does."""
    state = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def _keep_compiled() -> None:
    """Keep machine code in the cache folder, so that only a first start compiles.

    Numba notices changes of the file that a function is in, but not of those it calls; a folder
    per state of all kernels makes up for that. Where nothing can be kept, each start compiles.
    """
    folder = cache_folder() / "kernels" / source_hash()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning("compiled kernels are not kept, so each start takes longer: %s", error)
        return
    numba.config.CACHE_DIR = str(folder)


def are_kept() -> bool:
    """Whether machine code of these kernels is kept, of some signature at least."""
    folder = numba.config.CACHE_DIR
    return bool(folder) and next(Path(folder).rglob("*.nbc"), None) is not None


_keep_compiled()

# No GIL, no bounds checks, division by zero gives infinity, and no counting of references: threads
# would fight for the counters.
_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}

_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # Python never calls these


def compiled(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return numba.njit(**_INNER, **_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """As `compiled`, for small functions: their code goes where they are called."""
    return numba.njit(inline="always", **_INNER, **_OPTIONS)(function)


def entry(function: Callable[..., Any]) -> Any:
    """As `compiled`, for what Python calls; its machine code is kept on disk, if there is room."""
    made = numba.njit(cache=True, **_OPTIONS)(function)
    _bear_faults(made._cache)
    return made


def _bear_faults(cache: Any) -> None:
    """Go on without what is kept where it cannot be used: Numba lets such errors end the call.

    One process saves at a time: two that add another signature each would choose one file for both.
    """
    load, save = cache.load_overload, cache.save_overload

    def load_if_possible(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except Exception as error:  # whatever half a pickle raises
            _log.warning("what is kept of a compiled kernel is damaged; it is made anew: %s", error)
            with suppress(OSError):
                cache.flush()
            return None

    def save_if_possible(*arguments: Any) -> None:
        try:
            with ExitStack() as stack:
                with suppress(OSError, NotImplementedError, Timeout):  # each for itself then
                    lock = FileLock(Path(cache.cache_path) / ".lock", timeout=_SAVE_TIMEOUT_S)
                    stack.enter_context(lock)
                save(*arguments)
        except Exception as error:  # of a full disk, or of what is kept and damaged
            _log.warning("compiled kernels are not kept, so each start takes longer: %s", error)

    cache.load_overload, cache.save_overload = load_if_possible, save_if_possible
