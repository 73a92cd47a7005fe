"""Reading a table from a CSV file with a header line, its rows with their line numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stallfree.errors import ConfigError

_MAX_LISTED = 20  # columns of a file that an error names
_MAX_LISTED_CHARS = 60  # of each


class TableRow(NamedTuple):
    """A row: the number of the line that it ends in, and its values by column."""

    line: int
    values: Mapping[str, str | None]


def listed(columns: Sequence[str]) -> str:
    """Columns as an error tells of them, in their order; not all, if they are very many."""
    if not columns:
        return "no columns"
    more = len(columns) - _MAX_LISTED
    names = ", ".join(name[:_MAX_LISTED_CHARS] for name in columns[:_MAX_LISTED])
    return f"{names} and {more} more" if more > 0 else names


def read_table(path: Path) -> tuple[list[str], list[TableRow]]:
    """The columns and the rows of a file.

    Raises:
        ConfigError: the file cannot be read, or is no CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            return columns, [TableRow(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except csv.Error as error:
        raise ConfigError(f"{path}: after line {reader.line_num}: {error}") from error
