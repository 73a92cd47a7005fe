"""Looking at an engine from outside: what it is, what holds now, and what happened of late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stallfree.engine.engine import Engine
from stallfree.engine.live_feed import LiveFeed, Record, load_of

RECORDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Sight:
    """What a watcher is told at once.

    Attributes:
        first: the number of the first record.
        records: see `LiveFeed`.
        state: what held just before the records.
        about: in the first sight, what the engine was built with and the requests that it holds.
    """

    first: int
    records: Sequence[Record]
    state: Record
    about: Record | None = None


class Watched(Protocol):
    """One engine, here or elsewhere."""

    @property
    def index(self) -> int | None:
        """Its place, if it is one of several copies of the model."""
        ...

    async def look(self, number: int | None) -> Sight:
        """Records from `number` on, at most `RECORDS_AT_ONCE`; for None the first sight, of none.

        Raises:
            ReplicaLostError: it was in another process, which was lost.
        """
        ...


class LiveView:
    """Watches an engine of this process, from now on: a `Watched`.

    Args:
        engine: whose thread has not started.
    """

    index = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._feed = LiveFeed(engine.clock.now)
        engine.observers.add(self._feed)

    async def look(self, number: int | None) -> Sight:
        """See `Watched`."""
        return self.sight(number)

    def sight(self, number: int | None) -> Sight:
        """See `Watched`. Safe to call from any thread."""
        history = self._feed.history
        if number is None:
            about = {"next": history.count, **self._settings()}
            first = history.first
            return Sight(first, (), self._state(), {**about, "requests": self._feed.live()})
        state = self._state()  # before the records, so that an end comes with all of them
        first, records = history.since(number, RECORDS_AT_ONCE)
        return Sight(first, records, state)

    def _state(self) -> Record:
        """What holds at the moment."""
        scheduler = self._engine.scheduler
        return {
            "now": self._engine.clock.now(),
            **load_of(scheduler),
            "preemptions": dict(scheduler.preemptions),
            "squeezed": scheduler.budget.squeezed.iterations,
        }

    def _settings(self) -> Record:
        """What the engine was built with."""
        engine = self._engine
        facts, scheduler = engine.facts, engine.scheduler
        return {
            "architecture": facts.architecture,
            "dtype": facts.dtype,
            "device": facts.device,
            "threads": facts.threads,
            "scheduler": facts.scheduler,
            "token_budget": facts.token_budget,
            "tbt_slo_s": facts.tbt_slo_s,
            "tiers": {
                name: {"tbt_s": targets.tbt_s, "ttft_s": targets.ttft_s}
                for name, targets in engine.tiers.items()
            },
            "max_model_len": facts.max_model_len,
            "max_num_seqs": facts.max_num_seqs,
            "num_blocks": scheduler.pool.num_blocks,
            "block_size": scheduler.pool.block_size,
        }
