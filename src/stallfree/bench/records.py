"""What came of a workload: one record for each request, with the time of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from stallfree.bench.workload import Arrival, Workload


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request was not answered to its end.

    Attributes:
        kind: for tables: "refused" (status 429), "unavailable" (status 503, which a server answers
            with that has too much to do, or that starts or stops), "rejected" (another status),
            "unreachable" (no connection), "broken" (it ended in the middle), "garbage" (no event
            stream, one that cannot be read, or one without a token), "not_streaming" (the whole
            answer in one piece), "timeout".
        message: what is known of it.
    """

    kind: str
    message: str


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times in seconds from the start of the run.

    Attributes:
        arrival: what was to be sent.
        sent_s: when it was sent.
        token_s: when each token of the answer arrived.
        end_s: when the answer was complete or had failed; None if neither.
        scheduled_s: when the server began to work on it; None if it does not tell.
        prompt_tokens, output_tokens: as the server counted them; None if it does not tell.
        failure: what went wrong, if anything.
    """

    arrival: Arrival
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    scheduled_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    failure: Failure | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive tokens: every one is a sample of TBT."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first."""
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

    @property
    def scheduling_delay_s(self) -> float | None:
        """Arrival to first scheduled."""
        return None if self.scheduled_s is None else self.scheduled_s - self.sent_s


@dataclass(slots=True)
class Results:
    """A run, live or simulated.

    Attributes:
        workload: what was sent.
        records: in the order of sending; requests that an interrupted run did not send are missing.
        end_s: when the run ended, in seconds from its start.
        client_cpu_s: processor time of the load generator itself; None in a simulation.
        facts: what it depends on, for people: the endpoint, the model, the machine.
        is_complete: whether every request of the workload was sent and waited for.
    """

    workload: Workload
    records: list[Record]
    end_s: float
    client_cpu_s: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    is_complete: bool = True
