"""Results as files: JSON that holds everything and is read back, CSV with a row for a request."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from stallfree.bench.metrics import Slo, Summary, summarize
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError

_FORMAT = "stallfree_results"
_VERSION = 1
_COLUMNS = (
    *("number", "at_s", "planned_prompt_tokens", "planned_output_tokens", "prefix_id"),
    *("sent_s", "scheduled_s", "first_token_s", "end_s", "prompt_tokens", "output_tokens"),
    *("events", "ttft_s", "tpot_s", "max_gap_s", "e2e_s", "failure", "message"),
)


def write_json(path: Path, results: Results, slo: Slo | None = None) -> None:
    """Write results, with their summary for whoever reads the file without this package.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        _FORMAT: _VERSION,
        "summary": summary_values(summarize(results, slo)),
        "slo": None if slo is None else asdict(slo),
        "facts": _without_nan(results.facts),
        "end_s": results.end_s,
        "client_cpu_s": results.client_cpu_s,
        "is_complete": results.is_complete,
        "workload": asdict(results.workload),
        "records": [asdict(record) for record in results.records],
    }
    write_text(path, json.dumps(content, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Results:
    """Read what `write_json` wrote.

    Raises:
        ConfigError: the file cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON") from error
    if not isinstance(content, dict) or content.get(_FORMAT) != _VERSION:
        raise ConfigError(f"{path} holds no results of version {_VERSION}")
    try:
        return Results(
            workload=_workload(content["workload"]),
            records=[_record(each) for each in content["records"]],
            end_s=content["end_s"],
            client_cpu_s=content["client_cpu_s"],
            facts=content["facts"],
            is_complete=content["is_complete"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def write_csv(path: Path, results: Results) -> None:
    """Write a row for each request, without the times of all tokens but the first.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            for number, record in enumerate(results.records):
                writer.writerow(_row(number, record))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def summary_values(summary: Summary) -> dict[str, Any]:
    """A summary as JSON holds it: null where there is no number."""
    return {each.name: _without_nan(getattr(summary, each.name)) for each in fields(summary)}


def write_text(path: Path, text: str) -> None:
    """Write a file; raises ConfigError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _workload(values: dict[str, Any]) -> Workload:
    arrivals = tuple(Arrival(**each) for each in values["arrivals"])
    return Workload(arrivals, values["clients"], values["about"])


def _record(values: dict[str, Any]) -> Record:
    failure = values["failure"]
    return Record(
        **{
            **values,
            "arrival": Arrival(**values["arrival"]),
            "failure": None if failure is None else Failure(**failure),
        }
    )


def _row(number: int, record: Record) -> dict[str, object]:
    ended = record.end_s is not None and record.failure is None
    return {
        "number": number,
        "at_s": record.arrival.at_s,
        "planned_prompt_tokens": record.arrival.prompt_tokens,
        "planned_output_tokens": record.arrival.output_tokens,
        "prefix_id": record.arrival.prefix_id,
        "sent_s": record.sent_s,
        "scheduled_s": record.scheduled_s,
        "first_token_s": record.token_s[0] if record.token_s else None,
        "end_s": record.end_s,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "events": len(record.token_s),
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "max_gap_s": max(record.gaps_s, default=None),
        "e2e_s": record.end_s - record.sent_s if ended and record.end_s is not None else None,
        "failure": None if record.failure is None else record.failure.kind,
        "message": None if record.failure is None else record.failure.message,
    }
