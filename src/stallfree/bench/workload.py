"""A workload: which requests arrive when, and how many tokens each reads and answers with."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that is to be sent.

    Attributes:
        at_s: when, in seconds from the start of the run.
        prompt_tokens, output_tokens: its size.
        prefix_id: requests with the same number begin alike, such as turns of one conversation;
            None if it shares nothing.
        prefix_tokens: how many of its prompt's tokens are shared; None, with a `prefix_id`: all but
            the last few.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_id: int | None = None
    prefix_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival.

    Attributes:
        arrivals: all of them.
        clients: None for an open loop, where each is sent at its time, whatever else goes on.
            Otherwise so many clients take them in their order, each the next one as soon as its
            last one is answered, and `at_s` is not looked at.
        about: what it was made from, for people.
    """

    arrivals: tuple[Arrival, ...]
    clients: int | None = None
    about: str = ""

    def at_rate(self, requests_per_s: float) -> Workload:
        """The same requests with their arrival times stretched to another mean rate.

        Raises:
            ValueError: they all arrive at once, or the rate is not above 0.
        """
        first, last = self.arrivals[0].at_s, self.arrivals[-1].at_s
        if not requests_per_s > 0 or last <= first:
            raise ValueError(f"{len(self.arrivals)} requests cannot arrive at {requests_per_s}/s")
        factor = (len(self.arrivals) - 1) / requests_per_s / (last - first)
        arrivals = tuple(replace(each, at_s=each.at_s * factor) for each in self.arrivals)
        return replace(self, arrivals=arrivals)
