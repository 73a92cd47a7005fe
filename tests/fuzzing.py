"""What the fuzz tests share: how many examples they try, and how they damage bytes.

`STALLFREE_FUZZ_EXAMPLES` is how many, 150 unless it is set: a night's run may try millions.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("STALLFREE_FUZZ_EXAMPLES", "150"))

_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

Edit = tuple[str, float, bytes]

EDITS: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=16),
            st.sampled_from(_NUMBERS).map(lambda number: struct.pack("<Q", number)),
            st.sampled_from([b"{", b"[", b'"', b"}", b"null", b"-1", b"1e400", b"[" * 5000]),
        ),
    ),
    min_size=1,
    max_size=5,
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([10**40, -1, 0, 2**63, float("nan"), float("inf"), "", "x" * 300]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def fuzzed(share: float = 1.0) -> settings:
    """Settings of a fuzz test that tries this share of the examples."""
    return settings(
        max_examples=max(10, int(EXAMPLES * share)),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def damaged(data: bytes, edits: Sequence[Edit], length: int | None = None) -> bytes:
    """`data` after edits at shares of its first `length` bytes."""
    changed = bytearray(data)
    for kind, share, payload in edits:
        at = int(share * min(len(changed), length or len(changed)))
        match kind:
            case "replace":
                changed[at : at + len(payload)] = payload
            case "insert":
                changed[at:at] = payload
            case "delete":
                del changed[at : at + len(payload)]
            case _:
                del changed[at:]
    return bytes(changed)


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of a JSON value is."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path, *(deeper for key, part in items for deeper in json_paths(part, (*path, key)))]


def with_part(value: Any, path: Sequence[Any], part: Any) -> Any:
    """A JSON value with another part at `path`."""
    if not path:
        return part
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = with_part(value[path[0]], path[1:], part)
    return changed
