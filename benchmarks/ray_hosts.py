"""A Ray cluster of two hosts that serves one model, and one host is cut off in mid-stream.

    python benchmarks/ray_hosts.py      # as root on Linux, some ten minutes; let nothing else run

The "hosts" are the network namespaces of `network.py`, each with a Ray node of one processor that
is started again whenever it ends, as a service manager would. The demo model is served twice: as
two replicas, and as a pipeline of two stages with `--restart-workers`. Clients stream answers all
the time; the cable is down for a minute. Told are what the clients saw, when they and `/health`
knew of it, and when all was well again after the cable was back. Prints a table; results go to
benchmarks/results/ray_hosts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from network import ADDRESSES, HOSTS, INTERFACE, ip, run_inside
from rich import box
from rich.console import Console
from rich.table import Table
from server import ServerError, free_port, machine_facts, running, serve_command

ROOT = Path(__file__).parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RAY_PORT = 6399
COMMON = ("--threads", "1", "--max-model-len", "1024", "--kv-cache-memory", "256MiB")
MODES = {
    "two replicas": ("--replicas", "2"),
    "pipeline of two stages": (
        *("--pipeline-parallel-size", "2", "--distributed-executor", "ray", "--dtype", "float32"),
        *("--restart-workers", "--worker-timeout", "15s"),
    ),
}
CLIENTS = 4
OUTPUT_TOKENS = 32
FIRST_ANSWER_S = 60.0
CUT_S = 60.0
RECOVERY_S = 240.0


@dataclass
class Seen:
    """What clients saw: when answers ended, and how.

    Attributes:
        ends: seconds on the clock of `time.monotonic`, and an error or None.
        longest_gap_s: between two tokens of one answer.
    """

    ends: list[tuple[float, str | None]] = field(default_factory=list)
    longest_gap_s: float = 0.0

    def since(self, start: float, stop: float) -> list[tuple[float, str | None]]:
        """What ended in between."""
        return [(at, error) for at, error in self.ends if start <= at < stop]


def main() -> int:
    """Run all on a network that is laid for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/ray_hosts.json")
    parser.add_argument("--model", help="a folder or file; the demo model if left out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        return run_inside()
    model = [options.model] if options.model else []
    runs = {name: run([*model, *COMMON, *own]) for name, own in MODES.items()}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]).removesuffix(" --inside"),
        "machine": machine_facts(),
        "cut_s": CUT_S,
        "runs": runs,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console().print(table(runs))
    return 0


def run(arguments: list[str]) -> dict[str, Any]:
    """Serve so, cut the second host off, and join it again."""
    print(shlex.join(arguments), file=sys.stderr)
    port = free_port()
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    environment = {**os.environ, **own, "RAY_ADDRESS": f"{ADDRESSES[0]}:{RAY_PORT}"}
    with (
        cluster({**os.environ, **own}),
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        running(serve_command(arguments, port), port, log, environment) as url,
        clients(url) as seen,
    ):
        if wait_for(lambda: has_answered(seen, 0.0), FIRST_ANSWER_S) is None:
            raise ServerError(f"no answer came: {seen.ends[:3]}")
        cut_at = time.monotonic()
        ip("-n", HOSTS[1], "link", "set", INTERFACE, "down")
        told_s = wait_for(lambda: not is_whole(url), CUT_S)
        time.sleep(max(0.0, cut_at + CUT_S - time.monotonic()))
        ip("-n", HOSTS[1], "link", "set", INTERFACE, "up")
        back_at = time.monotonic()
        whole_s = wait_for(lambda: is_whole(url) and has_answered(seen, back_at), RECOVERY_S)
        log.seek(0)
        lines = [line.strip() for line in log if " ERROR " in line or " WARNING " in line]
    during = seen.since(cut_at, back_at)
    errors = Counter(error for _, error in seen.since(cut_at, time.monotonic()) if error)
    return {
        "answers_during_cut": sum(error is None for _, error in during),
        "failed": sum(errors.values()),
        "errors": errors.most_common(5),
        "first_error_s": next((at - cut_at for at, error in during if error), None),
        "health_s": told_s,
        "longest_gap_s": seen.longest_gap_s,
        "recovered_s": whole_s,
        "log": lines[-20:],
    }


@contextmanager
def cluster(environment: dict[str, str]) -> Iterator[None]:
    """A Ray node on each host, started again whenever it ends.

    Args:
        environment: of the nodes; who joins them needs its token.
    """
    common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=80000000", "--block"]
    first = [*RAY, "start", "--head", f"--node-ip-address={ADDRESSES[0]}", f"--port={RAY_PORT}"]
    second = [*RAY, "start", f"--address={ADDRESSES[0]}:{RAY_PORT}"]
    second = ["ip", "netns", "exec", HOSTS[1], *second, f"--node-ip-address={ADDRESSES[1]}"]
    stop = threading.Event()
    nodes: dict[str, subprocess.Popen[bytes]] = {}

    def supervise(name: str, command: list[str]) -> None:
        while not stop.is_set():
            nodes[name] = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            nodes[name].wait()
            stop.wait(2)

    threads = [
        threading.Thread(
            target=supervise, args=("first", [*first, "--include-dashboard=false", *common])
        ),
        threading.Thread(target=supervise, args=("second", [*second, *common])),
    ]
    try:
        threads[0].start()
        time.sleep(10)
        threads[1].start()
        time.sleep(10)
        yield
    finally:
        stop.set()
        for node in nodes.values():
            node.terminate()
        for thread in threads:
            thread.join(30)


@contextmanager
def clients(url: str) -> Iterator[Seen]:
    """Clients that stream one answer after another."""
    seen, stop = Seen(), threading.Event()
    models = httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).json()
    model = models["data"][0]["id"]

    def work(index: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            error = stream(url, model, f"Question {index}.{turn}: why is the sky blue?", seen)
            seen.ends.append((time.monotonic(), error))
            if error is not None:
                stop.wait(1)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(RECOVERY_S)


def stream(url: str, model: str, prompt: str, seen: Seen) -> str | None:
    """Read an answer to its end; what went wrong, or None."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
    body |= {"ignore_eos": True, "stream": True}
    last = None
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, timeout=RECOVERY_S, trust_env=False
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                return f"{answer.status_code}: {answer.json()['error']['message']}"
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return str(event["error"]["message"])
                now = time.monotonic()
                seen.longest_gap_s = max(seen.longest_gap_s, now - (last or now))
                last = now
    except httpx.HTTPError as error:
        return repr(error)
    return None


def has_answered(seen: Seen, since: float) -> bool:
    """Whether an answer has come whole since then."""
    return any(error is None for _, error in seen.since(since, time.monotonic()))


def is_whole(url: str) -> bool:
    """Whether the server answers, and misses nothing."""
    try:
        health = httpx.get(f"{url}/health", timeout=5, trust_env=False).json()
    except httpx.HTTPError:
        return False
    return bool(health["status"] == "ok" and health.get("ready_replicas") == health.get("replicas"))


def wait_for(condition: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until a condition came true; None if it did not in time."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(0.2)
    return None


def table(runs: dict[str, Any]) -> Table:
    """What was seen, by the way to serve."""
    made = Table(title=f"cut off for {CUT_S:g} s", title_justify="left", box=box.SIMPLE)
    made.add_column("")
    for name in runs:
        made.add_column(name)
    rows = {
        "answers that came whole meanwhile": "answers_during_cut",
        "answers that failed": "failed",
        "first error after": "first_error_s",
        "/health says so after": "health_s",
        "longest gap between two tokens": "longest_gap_s",
        "all well after the cable was back": "recovered_s",
    }
    for title, key in rows.items():
        values = [own[key] for own in runs.values()]
        made.add_row(title, *(_shown(value, key.endswith("_s")) for value in values))
    made.add_row(
        "what was said", *("\n".join(e for e, _ in own["errors"]) for own in runs.values())
    )
    return made


def _shown(value: float | None, is_time: bool) -> str:
    if value is None:
        return "never"
    return f"{value:,.1f} s" if is_time else f"{value}"


if __name__ == "__main__":
    sys.exit(main())
