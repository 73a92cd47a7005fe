"""The loads of `slo.py`: steady clients, prompts that arrive at random, and a busy neighbour.

All that is random comes from a seed: a load sends the same prompts at the same times each run.
The clients are threads of one process; at a hundred tokens a second they take a few hundredths of
a core, which each run notes (`Run.client_cpu_s`).
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from load import Record, Target, make_prompt, send

TIERS = ("priority", "default", "flex")
STEADY, ARRIVING = "steady", "arriving"  # kinds of records
WARM_UP_S = 3.0
RATE, SEED = 0.3, 4
BUSY = """
import os, time
parent = os.getppid()
while os.getppid() == parent:
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        pass
    time.sleep(0.05)
"""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that is sent at a set time, whatever else goes on.

    Attributes:
        at_s: when, in seconds from the start of the run.
        kind: for its record.
        prompt: its text.
        output_tokens: of its answer.
        extra: more fields of its body.
    """

    at_s: float
    kind: str
    prompt: str
    output_tokens: int
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """Clients that decode all the time, and prompts that arrive at random beside them.

    Attributes:
        clients: steady clients, each with one request after the other.
        prompt_words, output_tokens: size of a steady client's prompt and answer.
        rate: arriving prompts per second, with exponential gaps (Poisson arrivals).
        seconds: how long prompts arrive.
        least_words, most_words: bounds of an arriving prompt's length, drawn uniformly.
        long_output_tokens: of an arriving prompt's answer.
        seed: of the times, the lengths and the words. That of 4 draws about what is expected, 37
            prompts of 60,020 words in all; the mean of all seeds is 36 of 57,600.
    """

    clients: int = 8
    prompt_words: int = 20
    output_tokens: int = 128
    rate: float = RATE
    seconds: float = 120.0
    least_words: int = 200
    most_words: int = 3000
    long_output_tokens: int = 16
    seed: int = SEED

    def arrivals(self) -> list[Arrival]:
        """The arriving prompts in their order."""
        return [
            Arrival(at_s, ARRIVING, prompt, self.long_output_tokens)
            for at_s, prompt in _poisson(
                self.rate, self.seconds, (self.least_words, self.most_words), self.seed, ARRIVING
            )
        ]

    def steady_prompt(self, client: int, turn: int) -> str:
        """A steady client's prompt; no two are the same."""
        return make_prompt(self.prompt_words, _number(self.seed, STEADY, client, turn))

    def warm_up(self) -> MixedLoad:
        """A few seconds of something like it, with other prompts."""
        return replace(
            self,
            output_tokens=min(32, self.output_tokens),
            rate=1.0,
            seconds=WARM_UP_S,
            least_words=200,
            most_words=600,
            seed=self.seed + 1_000_000,
        )


@dataclass(frozen=True, slots=True)
class TierLoad:
    """Prompts of each service tier, arriving at random and together more than can be served.

    Attributes:
        priority_rate, default_rate, flex_rate: prompts per second, with exponential gaps.
        seconds: how long they arrive.
        least_words, most_words: bounds of a prompt's length, drawn uniformly.
        output_tokens: of an answer.
        seed: of the times, the lengths and the words.
    """

    priority_rate: float = 0.1
    default_rate: float = 0.35
    flex_rate: float = 0.2
    seconds: float = 90.0
    least_words: int = 200
    most_words: int = 1500
    output_tokens: int = 48
    seed: int = SEED

    def arrivals(self) -> list[Arrival]:
        """All prompts in their order; each one's kind is its tier."""
        rates = (self.priority_rate, self.default_rate, self.flex_rate)
        made = [
            Arrival(at_s, tier, prompt, self.output_tokens, {"service_tier": tier})
            for tier, rate in zip(TIERS, rates, strict=True)
            for at_s, prompt in _poisson(
                rate, self.seconds, (self.least_words, self.most_words), self.seed, tier
            )
        ]
        return sorted(made, key=lambda arrival: arrival.at_s)

    def warm_up(self) -> MixedLoad:
        """A few seconds of decodes and prompts without a tier."""
        return MixedLoad(seed=self.seed).warm_up()


@dataclass(slots=True)
class Run:
    """What a load saw.

    Attributes:
        records: of all requests, in the order of sending; times in seconds from the start.
        end_s: when the last arriving prompt was answered; steady clients go on until theirs are.
        client_cpu_s: processor time that the clients took themselves until then.
        neighbour_s: when the busy neighbour started, if there was one.
    """

    records: list[Record]
    end_s: float
    client_cpu_s: float = 0.0
    neighbour_s: float | None = None


def run_load(
    target: Target, load: MixedLoad | TierLoad, neighbour_after_s: float | None = None
) -> Run:
    """Send a whole load and wait for its end.

    Args:
        target: where to.
        load: what.
        neighbour_after_s: when a process starts that takes half a core, and goes on to the end.
    """
    arrivals = load.arrivals()
    records: list[Record] = []
    over = threading.Event()
    with _neighbour(neighbour_after_s) as began:
        cpu_s, started = time.process_time(), time.perf_counter()

        def arrive(arrival: Arrival) -> None:
            time.sleep(max(0.0, arrival.at_s - (time.perf_counter() - started)))
            about = (arrival.prompt, arrival.output_tokens, started, arrival.kind, arrival.extra)
            records.append(send(target, *about))

        def keep_asking(load: MixedLoad, client: int) -> None:
            for turn in count():
                prompt = load.steady_prompt(client, turn)
                record = send(target, prompt, load.output_tokens, started, STEADY)
                records.append(record)
                if record.error or over.is_set():
                    return

        clients = []
        if isinstance(load, MixedLoad):
            places = range(load.clients)
            clients = [_thread(keep_asking, load, place) for place in places]
        for thread in [_thread(arrive, arrival) for arrival in arrivals]:
            thread.join()
        over.set()
        end_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    for thread in clients:
        thread.join()
    neighbour_s = began[0] - started if began else None
    return Run(sorted(records, key=lambda record: record.sent_s), end_s, cpu_s, neighbour_s)


def _poisson(
    rate: float, seconds: float, words: tuple[int, int], seed: int, name: str
) -> Iterator[tuple[float, str]]:
    """Times and prompts; with another rate or other lengths, the same draws are stretched."""
    gaps, lengths = random.Random(f"{seed} {name} gaps"), random.Random(f"{seed} {name} lengths")
    at_s = 0.0
    for number in count():
        at_s += gaps.expovariate(1.0) / rate
        if at_s > seconds:
            return
        low, high = words
        num_words = low + int(lengths.random() * (high - low + 1))
        yield at_s, make_prompt(num_words, _number(seed, name, number))


def _number(*parts: object) -> int:
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


def _thread(function: object, *arguments: object) -> threading.Thread:
    assert callable(function)
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


@contextmanager
def _neighbour(after_s: float | None) -> Iterator[Sequence[float]]:
    """A process that takes half a core from `after_s` on; gives the time of its start, once known.

    It spins for 50 ms and sleeps for 50 ms, on whichever core it is put, and ends with the block.
    """
    began: list[float] = []
    if after_s is None:
        yield began
        return
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        processes.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", BUSY]))
        began.append(time.perf_counter())

    timer = threading.Timer(after_s, start)
    timer.start()
    try:
        yield began
    finally:
        timer.cancel()
        timer.join()
        for process in processes:
            process.kill()
            process.wait()
