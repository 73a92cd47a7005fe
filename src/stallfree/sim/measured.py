"""Step times from a table of measured iterations: a CSV file with a row for each.

Columns: `seconds`, and of what the iteration held, each 0 where it is missing: `prefill_tokens` of
a chunk that begins at `prefill_start` of its prompt, and `decodes` at a mean context of
`decode_context` tokens. Several chunks have no start but `prefill_context`: what each of their
tokens attends to, added up. `sampled` rows are the decodes and one of the chunk, unless they are
given. `stallfree serve --iteration-file` writes such a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from stallfree.bench.table_file import listed, read_table
from stallfree.core.step_time import BatchShape, StepTimeModel, chunk_context, fit
from stallfree.errors import ConfigError

_SECONDS = "seconds"
_COUNTS = (
    *("prefill_tokens", "prefill_start", "decodes", "decode_context"),
    *("prefill_context", "sampled"),
)


def read_times(path: Path) -> StepTimeModel:
    """A step-time model that is fitted to the rows of a file.

    Raises:
        ConfigError: the file cannot be read, a value is none, or there are too few sizes of
            iterations to fit to.
    """
    iterations = read_iterations(path)
    try:
        return fit(iterations)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_iterations(path: Path) -> list[tuple[BatchShape, float]]:
    """What each iteration of a file held, and its seconds.

    Raises:
        ConfigError: the file cannot be read, or a value is none.
    """
    columns, table = read_table(path)
    known, given = {_SECONDS, *_COUNTS}, set(columns)
    if _SECONDS not in given or not given & {"prefill_tokens", "decodes"}:
        raise ConfigError(
            f"{path}: there must be a column {_SECONDS}, and prefill_tokens or decodes; there may "
            f"be {', '.join(sorted(known))}; this file has {listed(columns)}"
        )
    if given - known:
        raise ConfigError(
            f"{path}: unknown columns {listed(sorted(given - known))}; known are "
            f"{', '.join(sorted(known))}"
        )
    return [_sample(path, line, values) for line, values in table]


def _sample(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[BatchShape, float]:
    values = {}
    for name in (_SECONDS, *_COUNTS):
        text = row.get(name) or "0"
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = math.nan
        is_count = name != _SECONDS
        if not 0 <= values[name] < math.inf or (is_count and values[name] % 1):
            what = "a whole number" if is_count else "a number of seconds"
            raise ConfigError(f"{path}, line {line}: {name} is {text!r}; it must be {what}")
    tokens, start, decodes, context, products, sampled = (int(values[name]) for name in _COUNTS)
    if (not tokens and not decodes) or not values[_SECONDS]:
        raise ConfigError(f"{path}, line {line}: an iteration holds something and takes time")
    shape = BatchShape(
        tokens + decodes,
        products if row.get("prefill_context") else chunk_context(start, tokens),
        decodes * context,
        sampled if row.get("sampled") else decodes + bool(tokens),
    )
    return shape, values[_SECONDS]
