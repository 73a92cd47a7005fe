"""Reading a trace of requests from a CSV file with a header line.

The columns are those of Vidur's traces: `num_prefill_tokens`, `num_decode_tokens` and, where times
are known, `arrived_at` in seconds. Others are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from stallfree.bench.table_file import listed, read_table
from stallfree.errors import ConfigError

_PROMPT, _OUTPUT, _TIME = "num_prefill_tokens", "num_decode_tokens", "arrived_at"


class TraceRow(NamedTuple):
    """One request of a trace; `at_s` is in seconds, None if it is not known."""

    at_s: float | None
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[TraceRow]:
    """The requests of a trace in the order of their arrival, if times are known.

    A length of 0 becomes 1: such a request cannot be sent.

    Raises:
        ConfigError: the file cannot be read, holds no requests, lacks a column, or a value is no
            number or below 0; names the line.
    """
    columns, table = read_table(path)
    missing = [column for column in (_PROMPT, _OUTPUT) if column not in columns]
    if missing:
        raise ConfigError(
            f"{path}: there is no column {' and none '.join(missing)}; a trace has {_PROMPT}, "
            f"{_OUTPUT} and, if times are known, {_TIME}; this file has {listed(columns)}"
        )
    rows = [_row(path, line, values, _TIME in columns) for line, values in table]
    if not rows:
        raise ConfigError(f"{path} holds no requests")
    return sorted(rows, key=lambda row: row.at_s or 0.0)


def _row(path: Path, line: int, row: Mapping[str, str | None], has_time: bool) -> TraceRow:
    def number(column: str) -> float:
        text = row[column]
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf or (column != _TIME and not value.is_integer()):
            kind = "a number" if column == _TIME else "a whole number"
            raise ConfigError(
                f"{path}: line {line}: {column} is {text!r}; it must be {kind} of at least 0"
            )
        return value

    at_s = number(_TIME) if has_time else None
    return TraceRow(at_s, max(1, int(number(_PROMPT))), max(1, int(number(_OUTPUT))))
