"""What each stage of a pipeline did when, and why it idled in between."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from stallfree.core.batch import Batch
from stallfree.core.bubbles import Bubble, StageUse, Work, bubble_between
from stallfree.errors import ConfigError
from stallfree.executor.line_file import LineFile
from stallfree.executor.trace_event import bar

_KEPT_GAPS = 64  # stretches without work that may still explain a gap


class StageLog:
    """Adds up busy and idle time, and writes a trace of it if asked.

    All times are in seconds, by the monotonic clock of one machine.

    Args:
        num_stages: of the pipeline.
        trace_file: written as Chrome's trace events, which Perfetto opens too: a row for each
            stage, a bar for each batch and for each gap.

    Attributes:
        stages: what each did so far.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, num_stages: int, trace_file: Path | None = None) -> None:
        self.stages = [StageUse() for _ in range(num_stages)]
        self._free_at: list[float | None] = [None] * num_stages
        self._batches: dict[int, tuple[Work, int]] = {}  # by id, with their decodes
        self._starved_since: float | None = None
        self._starved: deque[tuple[float, float]] = deque(maxlen=_KEPT_GAPS)
        self._file = None if trace_file is None else _open(trace_file)

    def submitted(self, batch_id: int, batch: Batch, now: float) -> None:
        """A batch was sent to the first stage; ids count up."""
        if self._starved_since is not None:
            self._starved.append((self._starved_since, now))
            self._starved_since = None
        self._batches[batch_id] = Work.of(batch), batch.num_decodes
        self._batches.pop(batch_id - 2 * len(self.stages) - 2, None)

    def starved(self, now: float) -> None:
        """There was room for a batch, but nothing to run."""
        if self._starved_since is None:
            self._starved_since = now

    def ran(self, stage: int, batch_id: int, started_s: float, ended_s: float) -> None:
        """A batch went through a stage."""
        use, free_at = self.stages[stage], self._free_at[stage]
        if free_at is not None and started_s > free_at:
            self._idled(stage, batch_id, free_at, started_s)
        use.busy_s += ended_s - started_s
        self._free_at[stage] = ended_s
        work, num_decodes = self._batches[batch_id]
        name = f"{num_decodes} decodes, {work.prefill_tokens} tokens of prompts"
        self._trace(stage, name, started_s, ended_s, {"batch": batch_id})

    def restarted(self) -> None:
        """All stages begin anew, with batches that count from zero."""
        self._free_at = [None] * len(self.stages)
        self._batches.clear()

    def close(self) -> None:
        """Finish the trace."""
        if self._file is not None:
            self._file.add("{}]\n")
            self._file = None

    def _idled(self, stage: int, batch_id: int, since: float, until: float) -> None:
        spans = [*self._starved]
        if self._starved_since is not None:
            spans.append((self._starved_since, until))
        without_work = sum(max(0.0, min(b, until) - max(a, since)) for a, b in spans)
        reason = self._reason(stage, batch_id)
        idle_s = self.stages[stage].idle_s
        idle_s[Bubble.NO_WORK] += without_work
        idle_s[reason] += until - since - without_work
        if without_work > (until - since) / 2:
            reason = Bubble.NO_WORK
        self._trace(stage, f"idle: {reason.value}", since, until, {"bubble": reason.name})

    def _reason(self, stage: int, batch_id: int) -> Bubble:
        """The first stage waits for the oldest batch in flight; others for this one to come."""
        first = batch_id - len(self.stages) if stage == 0 else batch_id - 1
        compared = [self._batches[i][0] for i in range(first, batch_id + 1) if i in self._batches]
        return bubble_between(compared)

    def _trace(
        self, stage: int, name: str, start_s: float, end_s: float, args: dict[str, object]
    ) -> None:
        if self._file is None:
            return
        event = bar(name, stage, start_s, end_s, args)
        self._file.add(json.dumps(event) + ",\n")


def _open(path: Path) -> LineFile:
    try:
        return LineFile(path, "[\n")
    except OSError as error:
        raise ConfigError(f"trace_file is {path}: {error.strerror}") from error
