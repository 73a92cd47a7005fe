"""A soak: everything at once for half an hour, at twice what the server can do.

    python benchmarks/soak.py                  # 30 minutes, the demo model
    python benchmarks/soak.py --minutes 1

Good requests of every kind arrive at random at twice the rate that a closed loop finished before; a
quarter of their clients leave, and those of tier `flex`, which takes what the others leave, give
up after two minutes. Half as many hostile ones come with them. Meanwhile a few
well-behaved clients of tier `priority` ask one thing after another. The promises:

- no crash, and no iteration that failed; whatever comes in gets the status it should;
- every request that was accepted ends in exactly one way, by the server's account and the clients';
- the server's memory at the end is within 2 % of what it was after a tenth of the time;
- the P99 of the time between tokens of the `priority` clients is within the target, in every
  sixth of the time;
- afterwards nothing is left: no request, block, stream, task or file.

Prints a table last and exits with 1 if a promise was broken. Results go to
benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from load import Target, make_prompt, percentile
from rich.console import Console
from server import ServerError, free_port, machine_facts, running
from soak_client import FINISHED, Account, Answer, Steady, exchange
from soak_report import outcomes, promises, table
from soak_traffic import Sending, good, hostile
from stall import first_model

ROOT = Path(__file__).parent.parent
WATCHED = Path(__file__).with_name("watched_server.py")
# A KV cache that has been filled by the end of the warm-up: its pages are taken when they are used.
SERVE = "--tbt-slo {slo_ms}ms --max-queued-requests 64 --max-model-len 2048"
SERVE += " --kv-cache-memory 256MiB"
LOAD, HOSTILE = 2.0, 0.5  # good requests by the capacity; hostile ones by the good ones
PROBE_CLIENTS, MOST_OPEN = 16, 400
WINDOWS = 6
SAMPLES = 200  # of the memory
LEFT_OVER = ("known", "streams", "integrity", "blocks", "tasks", "files", "threads", "wrong")


class Soak:
    """One run against a server.

    Args:
        url: of the server.
        options: of the command line.
    """

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url, self._options = url, options
        self._model = first_model(Target(url, ""))
        self._draws = random.Random(options.seed)
        self.account = Account()
        self.steady = [Steady() for _ in range(options.clients)]
        self.memory: list[tuple[float, int]] = []
        self.num_unsent = 0

    async def run(self) -> dict[str, Any]:
        """Find the capacity, then send for as long as asked; all that was measured."""
        before = await self._settled()
        capacity = await self._capacity()
        _say(f"the closed loop finishes {capacity:.2f} requests a second")
        seconds = self._options.minutes * 60
        began_s = time.monotonic()
        end_s = began_s + seconds
        tasks = [
            asyncio.create_task(self._steady(place, end_s)) for place in range(len(self.steady))
        ]
        tasks.append(asyncio.create_task(self._sample(seconds, end_s)))
        await self._send_all(LOAD * capacity, end_s)
        await asyncio.gather(*tasks)
        after = await self._settled()
        return {
            "seed": self._options.seed,
            "seconds": seconds,
            "capacity_per_s": capacity,
            "sent": self.account.num_sent,
            "unsent": self.num_unsent,
            "outcomes": [[*key, count] for key, count in sorted(self.account.outcomes.items())],
            "client_finished": self.account.finished,
            "client_uncertain": self.account.uncertain,
            "unexpected": self.account.wrong,
            "server": {name: after[name] for name in ("added", "refused", "ended", "iterations")},
            "failed_iterations": after["failed_iterations"],
            "left_over": {n: [before[n], after[n]] for n in LEFT_OVER if before[n] != after[n]},
            "memory_bytes": [[at_s - began_s, size] for at_s, size in self.memory],
            "priority": self._latency(began_s, seconds),
        }

    async def _capacity(self) -> float:
        """Good requests that are finished in a second when some are always there."""
        end_s = time.monotonic() + self._options.probe_s
        probe = Account()

        async def client() -> None:
            while time.monotonic() < end_s:
                await self._send(self._good(may_leave=False), probe)

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(PROBE_CLIENTS)))
        self.account.finished += probe.finished
        self.account.uncertain += probe.uncertain
        self.account.wrong |= probe.wrong
        return max(probe.of(FINISHED), 1) / (time.monotonic() - started)

    def _good(self, *, may_leave: bool = True) -> Sending:
        while True:
            words, tokens = self._options.words, self._options.tokens
            sending = good(self._draws, self._model, most_words=words, most_tokens=tokens)
            if may_leave or sending.leaves_after_s is None:
                return sending

    async def _send(self, sending: Sending, account: Account) -> None:
        answer = Answer()
        account.note(sending, await exchange(self._url, sending, answer), answer)

    async def _send_all(self, rate: float, end_s: float) -> None:
        """Send good and hostile requests at random times, whatever comes of those before."""
        open_ones: set[asyncio.Task[None]] = set()
        at_s = time.monotonic()
        while True:
            at_s += self._draws.expovariate(rate * (1 + HOSTILE))
            if at_s >= end_s:
                break
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            is_hostile = self._draws.random() < HOSTILE / (1 + HOSTILE)
            sending = hostile(self._draws, self._model) if is_hostile else self._good()
            if len(open_ones) >= MOST_OPEN:
                self.num_unsent += 1
                continue
            task = asyncio.create_task(self._send(sending, self.account))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)
        await asyncio.gather(*open_ones)

    async def _steady(self, place: int, end_s: float) -> None:
        number = 0
        while time.monotonic() < end_s:
            number += 1
            prompt = make_prompt(20, 1000 * place + number)
            own = self.steady[place]
            await own.run(self._url, self._model, [prompt], self._options.tokens, self.account)

    async def _sample(self, seconds: float, end_s: float) -> None:
        while time.monotonic() < end_s:
            state = await self._watch()
            self.memory.append((time.monotonic(), state["rss_bytes"]))
            await asyncio.sleep(seconds / SAMPLES)

    async def _watch(self) -> dict[str, Any]:
        def get() -> dict[str, Any]:
            with urllib.request.urlopen(f"{self._url}/watch", timeout=120) as answer:
                state: dict[str, Any] = json.load(answer)
            return state

        return await asyncio.to_thread(get)

    async def _settled(self) -> dict[str, Any]:
        """The state of the server once it idles and nothing changes any more."""
        state: dict[str, Any] = {}
        for _ in range(600):
            previous, state = state, await self._watch()
            same = all(state[name] == previous.get(name) for name in LEFT_OVER)
            if same and not state["live"]:
                break
            await asyncio.sleep(0.5)
        return state

    def _latency(self, began_s: float, seconds: float) -> dict[str, Any]:
        """Percentiles of the well-behaved clients, of all and of each window, in milliseconds."""
        gaps = [gap for each in self.steady for gap in each.gaps]
        windows: list[list[float]] = [[] for _ in range(WINDOWS)]
        for at_s, gap in gaps:
            place = int((at_s - began_s) / seconds * WINDOWS)
            windows[min(place, WINDOWS - 1)].append(gap)
        first = [value for each in self.steady for value in each.first_tokens_s]
        every = [gap for _, gap in gaps]
        return {
            "clients": len(self.steady),
            "tokens": len(every),
            "tbt_p50_ms": 1000 * percentile(every, 0.5),
            "tbt_p99_ms": 1000 * percentile(every, 0.99),
            "tbt_max_ms": 1000 * max(every, default=0.0),
            "tbt_p99_ms_by_window": [1000 * percentile(each, 0.99) for each in windows],
            "ttft_p50_ms": 1000 * percentile(first, 0.5),
            "ttft_p99_ms": 1000 * percentile(first, 0.99),
        }


def main() -> int:
    """Run it; 1 if a promise was broken or the server ended."""
    options = _options()
    port = free_port()
    model = [options.model] if options.model else []
    arguments = shlex.split(SERVE.format(slo_ms=options.slo_ms) + " " + options.serve_args)
    command = [sys.executable, str(WATCHED), "serve", *model, *arguments, "--port", str(port)]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "server_arguments": shlex.join([*model, *arguments]),
        "target_ms": options.slo_ms,
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            with running(command, port, log) as url:
                result |= asyncio.run(Soak(url, options).run())
        except (ServerError, OSError) as error:  # it did not start, or is there no more
            log.seek(0)
            print(f"{error}\n{log.read()[-4000:]}", file=sys.stderr)
            return 1
        log.seek(0)
        _, *tracebacks = log.read().split("Traceback")
        result |= {"tracebacks": len(tracebacks), "first_traceback": "".join(tracebacks[:1])[:4000]}
    result["promises"] = promises(result, options.slo_ms)
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    console = Console()
    console.print(outcomes(result))
    console.print(table(result))
    return 0 if all(is_kept for is_kept, _ in result["promises"].values()) else 1


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--probe-s", type=float, default=30.0, help="to find the capacity")
    parser.add_argument("--clients", type=int, default=2, help="well-behaved ones")
    parser.add_argument("--words", type=int, default=600, help="most of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="most of an answer")
    parser.add_argument("--slo-ms", type=float, default=200.0, help="between tokens")
    parser.add_argument("--seed", type=int, default=0, help="of all that is sent")
    parser.add_argument("--model", help="folder, GGUF or hub id (default: the demo model)")
    parser.add_argument("--serve-args", default="", help="more flags for `stallfree serve`")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/soak.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
