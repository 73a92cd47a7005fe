"""What a front and a replica tell each other, over one connection.

A replica says `Hello` at once, is told `Welcome`, and says `Ready` when its model is loaded, or
`Failed`; then `Events`, for each iteration one, and when nothing happens as a sign of life. It is
sent `Submit` and `Abort`. It answers `Measure` with `Measured`, `Look` with `Looked`, and `Record`,
then `StopRecording`, with `Recorded` messages. The end of the connection is the end of the replica:
whatever comes in its place is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stallfree.core.budget import Squeezed
from stallfree.core.routing import Offer
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import Targets
from stallfree.engine.facts import EngineFacts
from stallfree.engine.live_view import Sight
from stallfree.engine.outputs import Delta
from stallfree.engine.reading import EngineReading
from stallfree.engine.trace import Event
from stallfree.errors import StallfreeError

HEARTBEAT_S = 0.5  # the longest that a replica is silent


@dataclass(frozen=True, slots=True)
class Place:
    """Where replicas find their front, and the key that they know each other by."""

    host: str
    port: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """A replica is there, and begins to load the model.

    Attributes:
        host: name of its machine.
        pid: its process.
    """

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """It is to load the model.

    Attributes:
        is_first: whether all replicas start now; if not, it comes in place of one that was lost.
    """

    is_first: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """It takes requests."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be built."""

    error: StallfreeError


@dataclass(frozen=True, slots=True)
class Submit:
    """A request.

    Attributes:
        number: counts up from zero.
        name: of the front for it.
    """

    number: int
    name: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    targets: Targets
    cache_salt: str | None


@dataclass(frozen=True, slots=True)
class Abort:
    """Its client has left."""

    number: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request waits or runs."""

    number: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request does neither."""

    number: int
    error: StallfreeError


@dataclass(frozen=True, slots=True)
class Output:
    """What an iteration added to a request."""

    number: int
    delta: Delta


@dataclass(frozen=True, slots=True)
class Report:
    """How a replica is.

    Attributes:
        offer: to the next request.
        last: number of the last request that the offer takes into account; -1 for none.
        num_running, num_waiting: completions.
        squeezed: see `AsyncEngine.squeezed`.
    """

    offer: Offer
    last: int
    num_running: int
    num_waiting: int
    squeezed: Squeezed


@dataclass(frozen=True, slots=True)
class Events:
    """What happened since the last.

    Attributes:
        items: in their order.
        report: as of now.
        sent_at: by the replica's clock.
    """

    items: tuple[Accepted | Refused | Output, ...]
    report: Report
    sent_at: float


@dataclass(frozen=True, slots=True)
class Measure:
    """It is asked what its engine did and what that holds."""


@dataclass(frozen=True, slots=True)
class Measured:
    """That, as of when it was asked."""

    reading: EngineReading


@dataclass(frozen=True, slots=True)
class Look:
    """It is looked at: see `Watched`."""

    number: int | None


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen."""

    sight: Sight


@dataclass(frozen=True, slots=True)
class Record:
    """It is to record a trace; it records no other. Numbers count up from zero."""

    number: int


@dataclass(frozen=True, slots=True)
class StopRecording:
    """It is to send what it has recorded."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A part of a trace.

    Attributes:
        number: of the trace.
        events: of Chrome's traces, by the replica's clock.
        is_last: whether no part comes after it; it has no events then.
        is_cut: in the last, whether the trace lacks something.
    """

    number: int
    events: Sequence[Event] = ()
    is_last: bool = False
    is_cut: bool = False
