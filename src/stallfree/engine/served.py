"""What a server needs of an engine: one in this process, or several copies behind one face."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from stallfree.core.budget import Squeezed
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.engine import Engine
from stallfree.engine.facts import EngineFacts
from stallfree.engine.live_view import Watched
from stallfree.engine.outputs import Delta
from stallfree.engine.reading import EngineReading
from stallfree.engine.tokenizer import Tokenizer
from stallfree.engine.trace import Trace


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """How a copy of the model is, as its front sees it.

    Attributes:
        index: its place; whoever replaces it has the same.
        is_ready: whether it takes requests.
        num_running: completions that hold KV blocks.
        num_waiting: those that wait for admission, and requests on their way.
        wait_s: predicted until a new request would be read, in seconds; None if not known.
    """

    index: int
    is_ready: bool
    num_running: int
    num_waiting: int
    wait_s: float | None


class ServedEngine(Protocol):
    """Runs requests for asynchronous callers.

    Attributes:
        error: what ended it, if it died.
        on_death: called with `error`, from any thread.
    """

    error: BaseException | None
    on_death: Callable[[BaseException], None] | None

    @property
    def facts(self) -> EngineFacts:
        """What it was built with."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its model."""
        ...

    @property
    def num_running(self) -> int:
        """Completions that hold KV blocks."""
        ...

    @property
    def num_waiting(self) -> int:
        """Completions that wait for admission."""
        ...

    @property
    def squeezed(self) -> Squeezed:
        """What reading prompts cost against the latency target so far."""
        ...

    @property
    def local(self) -> Engine | None:
        """The engine, to be watched, if it is one in this process."""
        ...

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """The copies of the model, if it is several."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether requests can run at the moment."""
        ...

    @property
    def health(self) -> Mapping[str, object]:
        """What `/health` says beside the counts."""
        ...

    def now(self) -> float:
        """Its clock, in seconds: `Delta.scheduled_at` is of this one."""
        ...

    async def readings(self) -> Mapping[str, EngineReading]:
        """What each copy of the model did, by its place; what one engine did, by no name."""
        ...

    def trace(self) -> Trace:
        """Record from now on; there is no recording under way."""
        ...

    def watch(self, place: int | None) -> Watched:
        """What the live page shows: of the copy of the model at `place`, or of any.

        Raises:
            InvalidRequestError: there are no copies.
            NoReplicaError: it is not ready.
        """
        ...

    def start(self) -> None:
        """Begin to take requests; called in the event loop of those who ask."""
        ...

    def stop(self) -> None:
        """End it; what still runs is dropped. Called once, in any thread."""
        ...

    async def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
    ) -> None:
        """Raise what `generate` would raise for a bad request, without running it."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta | None, None]:
        """Run a request; closing the iterator aborts it.

        Yields:
            None once it is accepted, then the deltas of its n completions as they come; each ends
            with a `finish_reason`.

        Raises:
            InvalidRequestError: the request is wrong; before anything is yielded.
            OverloadedError: too much waits; before anything is yielded.
            EngineError: it cannot be taken, or cannot be finished.
        """
        ...

    def keeping(self, request_ids: Iterable[str]) -> AbstractContextManager[None]:
        """Have requests count as under way until the end of the block, even between two runs.

        In it they may run again after they were lost, also while the engine drains.

        Raises:
            EngineStoppedError: the engine takes no more requests.
        """
        ...

    async def recover(self) -> None:
        """Wait, for a while, until requests can run again after one was lost.

        Raises:
            EngineStoppedError: the server is about to end.
        """
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that run.

        Returns:
            False if some had to be aborted because `timeout_s` passed.
        """
        ...
