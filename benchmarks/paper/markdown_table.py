"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NEAR = 0.2  # relative difference from a published value that needs no reason


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first row the titles."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def compared(published: float, ours: float, form: str, why: str) -> list[str]:
    """The cells of a comparison: the paper's value, ours, their ratio, and a reason if it is far.

    Args:
        published: the paper's value.
        ours: ours.
        form: of their numbers, such as `,.1f`.
        why: why they differ, which is shown where they differ by more than `NEAR`.
    """
    ratio = ours / published
    is_near = abs(ratio - 1) <= NEAR
    return [f"{published:{form}}", f"{ours:{form}}", f"{ratio:.2f}", "" if is_near else why]


COMPARED = ("paper", "ours", "ratio", "why, if over 20 % apart")
