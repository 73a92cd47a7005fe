"""Several replicas behind the face of one engine.

A request goes to one replica (`dispatch`). If that one is lost before any of the answer came, the
request goes to another; otherwise it fails, and says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from stallfree.core.budget import Squeezed
from stallfree.core.counter_random import mix
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.facts import EngineFacts
from stallfree.engine.outputs import Delta
from stallfree.engine.reading import EngineReading
from stallfree.engine.request_check import RequestCheck
from stallfree.engine.served import ReplicaState
from stallfree.engine.settings import MAX_SEED, EngineSettings
from stallfree.engine.tokenizer import Tokenizer
from stallfree.errors import (
    EngineStoppedError,
    ExecutorError,
    InvalidRequestError,
    NoReplicaError,
    ReplicaLostError,
)
from stallfree.replicas.dispatch import Dispatcher, no_replica
from stallfree.replicas.member import Member
from stallfree.replicas.roster import Roster
from stallfree.replicas.trace import FleetTrace

_ATTEMPTS = 3  # to run a request whose replicas are lost
_RECOVERY_S = 120.0  # how long a request that was accepted waits for a replica
_READING_S = 1.0  # how long a replica that is asked what it did is waited for
_POLL_S = 0.02


class ReplicatedEngine:
    """A `ServedEngine` of several replicas.

    Args:
        roster: of the replicas, all of them ready; closed when this is.
        settings: of each one's engine.
        tokenizer: of their model.

    Attributes:
        facts: of each one's engine; the least of what they have.
        tokenizer: of their model.
        error: what ended it; nothing does, as replicas that die are replaced.
        on_death: never called.
    """

    def __init__(self, roster: Roster, settings: EngineSettings, tokenizer: Tokenizer) -> None:
        self.error: BaseException | None = None
        self.on_death: Callable[[BaseException], None] | None = None
        self.tokenizer = tokenizer
        self._roster = roster
        self._seed, self._num_added = settings.seed, 0
        self._requests: set[str] = set()  # that run
        self._kept: set[str] = set()  # that may run again
        self._draining = self._aborting = False
        known = [member.facts for member in roster.ready if member.facts is not None]
        self.facts: EngineFacts = replace(
            known[0],
            max_model_len=min(each.max_model_len for each in known),
            kv_cache_tokens=min(each.kv_cache_tokens for each in known),
            load_s=max(each.load_s for each in known),
        )
        self._refuse = RequestCheck(self.facts, settings.tiers)
        block_size = self.facts.block_size if settings.prefix_caching else None
        self._dispatcher = Dispatcher(roster, block_size)

    @property
    def num_running(self) -> int:
        """Completions that hold KV blocks, as far as is known."""
        return sum(each.report.num_running for each in self._roster.members if each.report)

    @property
    def num_waiting(self) -> int:
        """Completions that wait for admission, as far as is known, and requests on their way."""
        members = self._roster.members
        known = sum(each.report.num_waiting for each in members if each.report)
        return known + sum(each.num_unseen for each in members)

    @property
    def squeezed(self) -> Squeezed:
        """What reading prompts cost against the latency target, in replicas that live."""
        own = [each.report.squeezed for each in self._roster.members if each.report]
        return Squeezed(sum(each.iterations for each in own), sum(each.over_s for each in own))

    @property
    def local(self) -> None:
        """Nothing: the engines are in other processes."""
        return

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """Those that are ready, and those that load."""
        return [each.state for each in self._roster.members]

    @property
    def is_ready(self) -> bool:
        """Whether a replica takes requests."""
        return bool(self._roster.ready)

    @property
    def health(self) -> Mapping[str, object]:
        """How many replicas there are to be, and how many are ready."""
        return {"replicas": self._roster.count, "ready_replicas": len(self._roster.ready)}

    def now(self) -> float:
        """This process's clock, in seconds."""
        return time.monotonic()

    async def readings(self) -> Mapping[str, EngineReading]:
        """What each replica that is ready did, by its place.

        One that does not answer in time is as it was when it last did, until it is lost.
        """
        members = self._roster.ready
        found = await asyncio.gather(*(each.reading(_READING_S) for each in members))
        pairs = zip(members, found, strict=True)
        return {str(member.index): reading for member, reading in pairs if reading is not None}

    def trace(self) -> FleetTrace:
        """Have each replica that is ready record from now on; no recording is under way."""
        return FleetTrace({each.index: each.trace() for each in self._roster.ready})

    def watch(self, place: int | None) -> Member:
        """The replica at `place`, or the first that is ready, to be looked at.

        Raises:
            NoReplicaError: it is not ready.
        """
        ready = {member.index: member for member in self._roster.ready}
        if place is None and ready:
            return ready[min(ready)]
        if place in ready:
            return ready[place]
        raise no_replica() if place is None else NoReplicaError(f"replica {place} is not ready")

    def start(self) -> None:
        """Take requests in this event loop from now on."""
        self._roster.start()

    def stop(self) -> None:
        """End all replicas; a second time does nothing."""
        self._draining = True
        self._roster.close()

    async def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
    ) -> None:
        """Raise what `generate` would raise for a bad request, without running it."""
        self._check_accepting()
        self._check(prompt_token_ids, params, targets)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta | None, None]:
        """Run a request on one replica, on others if that is lost before any of the answer came.

        Yields:
            See `ServedEngine.generate`.

        Raises:
            InvalidRequestError: the request is wrong; before anything is yielded.
            OverloadedError: too much waits at each replica; before any of the answer is yielded.
            NoReplicaError: no replica is ready; before any of the answer is yielded.
            ReplicaLostError: the replica was lost after a part of the answer.
            ExecutorError: one replica after another was lost.
            EngineStoppedError: the server is about to end.
        """
        if self._aborting or request_id not in self._kept:
            self._check_accepting()
        self._check(prompt_token_ids, params, targets)
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        self._requests.add(request_id)
        params = self._seeded(params)
        is_accepted = has_output = False
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                deltas = self._dispatcher.run(
                    request_id, prompt_token_ids, params, targets, cache_salt
                )
                try:
                    async with aclosing(deltas):
                        async for delta in deltas:
                            if delta is None and is_accepted:  # by another, which is lost
                                continue
                            is_accepted = True
                            has_output = has_output or delta is not None
                            yield delta
                    return
                except ReplicaLostError as error:
                    if has_output:
                        raise
                    if attempt == _ATTEMPTS:
                        message = f"the copies of the model that ran it were lost: {error}"
                        raise ExecutorError(message) from None
                await self.recover()
        finally:
            self._requests.discard(request_id)

    @contextmanager
    def keeping(self, request_ids: Iterable[str]) -> Iterator[None]:
        """Have requests count as under way until the end of the block, even between two runs.

        In it they may run again after they were lost, also while this drains.

        Raises:
            EngineStoppedError: the server is about to end.
        """
        self._check_accepting()
        own = frozenset(request_ids)
        self._kept |= own
        try:
            yield
        finally:
            self._kept -= own

    async def recover(self) -> None:
        """Wait, for a while, until a replica is ready.

        Raises:
            EngineStoppedError: the server is about to end.
        """
        deadline = time.monotonic() + _RECOVERY_S
        while not self.is_ready and time.monotonic() < deadline:
            if self._aborting:
                raise EngineStoppedError("the server is shutting down")
            await asyncio.sleep(_POLL_S)

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that run.

        Returns:
            False if some had to be aborted because `timeout_s` passed.
        """
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._requests or self._kept:
            if time.monotonic() >= deadline:
                self._aborting = True
                for member in self._roster.members:
                    member.abort_all("the server is shutting down")
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _check_accepting(self) -> None:
        if self._draining:
            raise EngineStoppedError("the server is shutting down and takes no new requests")

    def _check(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, targets: Targets
    ) -> None:
        if not self.is_ready:
            raise no_replica()
        self._refuse(prompt_token_ids, params, targets)

    def _seeded(self, params: SamplingParams) -> SamplingParams:
        """With the seed that one engine would draw: replicas that draw their own draw the same."""
        self._num_added += 1
        if params.seed is not None:
            return params
        drawn = mix(self._seed, self._num_added)
        return replace(params, seed=drawn if drawn <= MAX_SEED else max(drawn - 2**64, -MAX_SEED))
