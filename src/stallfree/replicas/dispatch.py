"""Sends a request to the replica that `core.routing` chooses, to the next if that one refuses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from stallfree.core import routing
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import Targets
from stallfree.engine.outputs import Delta
from stallfree.errors import NoReplicaError, OverloadedError
from stallfree.replicas.member import Member
from stallfree.replicas.prefixes import blocks_of
from stallfree.replicas.roster import Roster


class Dispatcher:
    """Runs requests on replicas that are ready.

    Args:
        roster: of the replicas.
        block_size: tokens of a KV block, where replicas keep what prompts begin with; None where
            they do not.
    """

    def __init__(self, roster: Roster, block_size: int | None) -> None:
        self._roster = roster
        self._block_size = block_size

    async def run(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets,
        cache_salt: str | None,
    ) -> AsyncGenerator[Delta | None, None]:
        """Run a request on the best replica, or on the next if that has too much to do.

        Yields:
            See `ServedEngine.generate`.

        Raises:
            OverloadedError: too much waits at each replica; before anything is yielded.
            NoReplicaError: no replica is ready; before anything is yielded.
            ReplicaLostError: the replica was lost.
        """
        blocks: list[int] = []
        if self._block_size is not None:
            blocks = blocks_of(prompt_token_ids, self._block_size, cache_salt)
        tried: set[Member] = set()
        refusal: OverloadedError | None = None
        while member := self._choose(len(prompt_token_ids), blocks, tried):
            tried.add(member)
            deltas = member.run(
                request_id, prompt_token_ids, params, targets, blocks, cache_salt=cache_salt
            )
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        yield delta
                return
            except OverloadedError as error:
                refusal = refusal or error
        raise refusal or no_replica()

    def _choose(self, num_tokens: int, blocks: Sequence[int], tried: set[Member]) -> Member | None:
        """The replica whose first token is predicted to come first, of those not tried."""
        members = [each for each in self._roster.ready if each not in tried]
        if not members:
            return None
        return members[routing.choose([each.offer(blocks) for each in members], num_tokens)]


def no_replica() -> NoReplicaError:
    """What a request is told when nobody can run it."""
    return NoReplicaError("no copy of the model is ready; one is being started")
