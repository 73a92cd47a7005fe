"""The settings of a server that has several copies of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stallfree.engine.flags import Flag, check_range, parse_duration

MAX_REPLICAS = 256


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """The part of `ServerSettings` that copies the model.

    Raises:
        ConfigError: a value is out of range; names it and the limit.
    """

    replicas: Annotated[
        int,
        Flag(
            "Copies of the model, on Ray Serve: on a running Ray cluster, or one of this machine's "
            "own. A request goes where its first token is predicted to come first.",
            "REPLICAS",
            panel="Several processes",
        ),
    ] = 1
    replica_timeout_s: Annotated[
        float,
        Flag(
            "How long a copy of the model may be silent before it counts as lost.",
            "TIME",
            name="replica_timeout",
            parse=parse_duration,
            panel="Several processes",
        ),
    ] = 10.0

    def __post_init__(self) -> None:
        check_range("replicas", self.replicas, 1, MAX_REPLICAS)
        check_range("replica_timeout_s", self.replica_timeout_s, 2)
