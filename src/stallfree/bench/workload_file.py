"""A workload as a file: JSON lines, a header and then one request each, for exact replays.

Python writes a float with as many digits as it takes to read the same one again.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError

_VERSION = 1
_FORMAT = "stallfree_workload"
_MAX = 10**15


def save_workload(workload: Workload, path: Path) -> None:
    """Write a workload.

    Raises:
        ConfigError: the file cannot be written.
    """
    header = {
        _FORMAT: _VERSION,
        "num_requests": len(workload.arrivals),
        "clients": workload.clients,
        "about": workload.about,
    }
    lines = [header, *(_line(each) for each in workload.arrivals)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def load_workload(path: Path) -> Workload:
    """Read a workload that `save_workload` wrote.

    Raises:
        ConfigError: the file cannot be read, is damaged or something else; names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    header = _object(path, 1, lines[0]) if lines else {}
    if header.get(_FORMAT) != _VERSION:
        raise ConfigError(f"{path}: line 1 is no header of a workload of version {_VERSION}")
    count = _whole(path, 1, header, "num_requests")
    clients = None
    if header.get("clients") is not None:
        clients = _whole(path, 1, header, "clients")
    if not isinstance(header.get("about"), str):
        raise ConfigError(f"{path}: line 1: about must be text")
    arrivals = [_arrival(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    if len(arrivals) != count:
        raise ConfigError(
            f"{path} ends at line {len(lines)} with {len(arrivals)} requests; its header says "
            f"{count}"
        )
    for number, (earlier, later) in enumerate(pairwise(arrivals), start=3):
        if later.at_s < earlier.at_s:
            raise ConfigError(f"{path}: line {number} arrives before the line above it")
    return Workload(tuple(arrivals), clients, header["about"])


def _line(arrival: Arrival) -> dict[str, object]:
    line: dict[str, object] = {
        "at_s": arrival.at_s,
        "prompt_tokens": arrival.prompt_tokens,
        "output_tokens": arrival.output_tokens,
    }
    shared = {"prefix_id": arrival.prefix_id, "prefix_tokens": arrival.prefix_tokens}
    return line | {name: value for name, value in shared.items() if value is not None}


def _arrival(path: Path, number: int, line: bytes) -> Arrival:
    values = _object(path, number, line)
    at_s = values.get("at_s")
    if not isinstance(at_s, int | float) or isinstance(at_s, bool) or not 0 <= at_s <= _MAX:
        raise ConfigError(f"{path}: line {number}: at_s must be seconds of at least 0")
    prefix_id = values.get("prefix_id")
    if prefix_id is not None and type(prefix_id) is not int:
        raise ConfigError(f"{path}: line {number}: prefix_id must be a whole number")
    prefix_tokens = None
    if values.get("prefix_tokens") is not None:
        prefix_tokens = _whole(path, number, values, "prefix_tokens")
    return Arrival(
        float(at_s),
        _whole(path, number, values, "prompt_tokens"),
        _whole(path, number, values, "output_tokens"),
        prefix_id,
        prefix_tokens,
    )


def _whole(path: Path, number: int, values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= _MAX:
        raise ConfigError(f"{path}: line {number}: {name} must be a whole number of at least 1")
    return value


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: line {number} is not JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: line {number} must be a JSON object")
    return value
