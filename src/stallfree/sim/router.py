"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stallfree.bench.workload import Arrival
from stallfree.core import routing
from stallfree.errors import ConfigError
from stallfree.sim.replica import Replica

_AFFINE_FACTOR = 1.5  # of the least work, up to which a request goes where its prefix is


class Router(Protocol):
    """Chooses among replicas."""

    def choose(self, arrival: Arrival, replicas: Sequence[Replica]) -> int:
        """Index of the replica that shall take a request."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = -1

    def choose(self, arrival: Arrival, replicas: Sequence[Replica]) -> int:  # noqa: ARG002
        """The one after the last."""
        self._next = (self._next + 1) % len(replicas)
        return self._next


class LeastWork:
    """Whoever has the fewest tokens left to read and to make; of equals the first."""

    def choose(self, arrival: Arrival, replicas: Sequence[Replica]) -> int:  # noqa: ARG002
        """The least loaded."""
        work = [replica.tokens_left for replica in replicas]
        return work.index(min(work))


class PredictedWait:
    """Where the first token is predicted to come first: what `stallfree serve --replicas` does."""

    def choose(self, arrival: Arrival, replicas: Sequence[Replica]) -> int:
        """The soonest."""
        offers = [replica.offer(arrival.at_s) for replica in replicas]
        return routing.choose(offers, arrival.prompt_tokens)


class PrefixAffine:
    """Where the last request with the same beginning went, unless that one is much busier.

    Then, and for requests that share nothing, as `LeastWork`.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def choose(self, arrival: Arrival, replicas: Sequence[Replica]) -> int:
        """The one that knows the prefix."""
        work = [replica.tokens_left for replica in replicas]
        least = work.index(min(work))
        if arrival.prefix_id is None:
            return least
        place = self._places.get(arrival.prefix_id, least)
        slack = arrival.prompt_tokens + arrival.output_tokens
        if work[place] > _AFFINE_FACTOR * work[least] + slack:
            place = least
        self._places[arrival.prefix_id] = place
        return place


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-work": LeastWork,
    "predicted-wait": PredictedWait,
    "prefix-affine": PrefixAffine,
}


def make_router(name: str) -> Router:
    """A new router.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in ROUTERS:
        raise ConfigError(f"router is {name!r}; it must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
