"""Chrome's trace events, which Perfetto opens too: bars in rows, rows in groups.

The format is the "Trace Event Format" of the Chromium project.
"""

from __future__ import annotations

from collections.abc import Mapping


def bar(
    name: str,
    row: int,
    start_s: float,
    end_s: float,
    args: Mapping[str, object],
    *,
    group: int = 0,
) -> dict[str, object]:
    """Something that took a while.

    Args:
        name: written in it.
        row: where it is drawn; bars of one row must not overlap.
        start_s: in seconds, by any clock that all bars share.
        end_s: likewise.
        args: shown when it is selected.
        group: of the row.
    """
    return {
        "name": name,
        "ph": "X",
        "pid": group,
        "tid": row,
        "ts": round(start_s * 1e6),
        "dur": round((end_s - start_s) * 1e6),
        "args": dict(args),
    }


def group_name(group: int, name: str) -> dict[str, object]:
    """What a group of rows is called."""
    return {"name": "process_name", "ph": "M", "pid": group, "args": {"name": name}}


def row_name(group: int, row: int, name: str) -> dict[str, object]:
    """What a row is called."""
    return {"name": "thread_name", "ph": "M", "pid": group, "tid": row, "args": {"name": name}}
