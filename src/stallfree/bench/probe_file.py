"""Probes on disk: one line of JSON each, written as soon as it is measured.

One file may hold the probes of many searches; each reads its own. It knows no SLO.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from stallfree.bench.probe import Probe
from stallfree.errors import ConfigError

_log = logging.getLogger(__name__)


class ProbeFile:
    """The probes of one system under one workload, kept in a file.

    Args:
        path: the file; made if there is none.
        facts: all that a probe depends on but its rate and its seed: the system, the workload.

    Attributes:
        num_others: probes of other systems or workloads in the file; they stay there.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Path, facts: Mapping[str, object]) -> None:
        self.path = path
        self.num_others = 0
        self._facts = facts
        self._search = fingerprint(facts)
        self._is_known = False  # whether the facts themselves are in the file
        self._is_cut = False  # whether its last line has no end
        self._probes = {(probe.qps, probe.seed): probe for probe in self._read()}

    def __iter__(self) -> Iterator[Probe]:
        return iter(self._probes.values())

    def add(self, probe: Probe) -> None:
        """Write a probe; it is on disk when this returns.

        Raises:
            ConfigError: the file cannot be written.
        """
        lines = [json.dumps({"search": self._search, "probe": probe.as_json()})]
        if not self._is_known:
            facts = json.dumps({"search": self._search, "facts": self._facts}, default=str)
            lines.insert(0, facts)
        if self._is_cut:
            lines.insert(0, "")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._is_known, self._is_cut = True, False
        self._probes[probe.qps, probe.seed] = probe

    def _read(self) -> Iterator[Probe]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:  # a file that cannot be written is known at once
                file.seek(0)
                content = file.read().decode("utf-8", errors="replace")
        except OSError as error:
            raise self._refused(error) from error
        self._is_cut = not content.endswith("\n") and content != ""
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                probe = self._probe(line) if line.strip() else None
            except ValueError as error:
                _log.warning("line %d of %s is damaged and left out: %s", number, self.path, error)
                continue
            if probe is not None:
                yield probe

    def _probe(self, line: str) -> Probe | None:
        """The probe of a line; None if it holds facts, or the probe of another search."""
        entry = json.loads(line)
        if not isinstance(entry, dict) or not ("facts" in entry or "probe" in entry):
            raise ValueError("it holds no probe")
        is_own = entry.get("search") == self._search
        if "facts" in entry:
            self._is_known |= is_own
            return None
        probe = Probe.from_json(entry["probe"])
        self.num_others += not is_own
        return probe if is_own else None

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path} cannot be read and written: {error.strerror}")


def fingerprint(facts: Mapping[str, object]) -> str:
    """A short name of facts: the same for the same facts, in whatever order."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
