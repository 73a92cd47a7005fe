"""What prefix caching saves, live: 32 requests that share a prefix of 1,500 tokens, all at once.

    python benchmarks/prefix.py           # the demo model: about 5 minutes on two cores
    python benchmarks/prefix.py --quick   # a shorter prefix and fewer requests, stored nowhere

The same requests go to a server that keeps what it computed and to one that does not. Beside that,
the first server reads one such prefix alone, and 32 prompts that are only what each request adds:
together, the least that could be hoped for. That leaves out that each token attends to the prefix,
which no cache saves: so the requests are also sent with other words after the same prefix, which is
there then. Every prompt is new to the server but for what is
shared. Answers are greedy, so both servers must give the same. Prints a table, and writes
benchmarks/results/prefix.json; the exit code is 1 if answers differ or a request failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from load import READ_TIMEOUT_S, Target, make_prompt
from rich import box
from rich.console import Console
from rich.table import Table
from server import ServerError, machine_facts, serving
from stall import first_model

from stallfree.engine.settings import API_KEY_VARIABLE

ROOT = Path(__file__).parent.parent
AIM = 1.25  # times the least that could be hoped for
WARM_UP_WORDS, WARM_UP_SEED, PREFIX_SEED = 200, 2_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        requests: at once.
        prefix_words: that they share; about one token each.
        own_words: that each adds.
        output_tokens: of an answer.
        rounds: with other words each; the one in the middle is shown.
    """

    requests: int = 32
    prefix_words: int = 1500
    own_words: int = 32
    output_tokens: int = 16
    rounds: int = 5

    def prefix(self, number: int) -> str:
        """A prefix; no two begin alike."""
        return make_prompt(self.prefix_words, PREFIX_SEED + number)

    def own(self, number: int) -> list[str]:
        """What each request of a round adds."""
        first = number * self.requests
        return [make_prompt(self.own_words, first + place) for place in range(self.requests)]

    def sharing(self, number: int, own: int | None = None) -> list[str]:
        """The prompts of a round, or its prefix with what another one adds."""
        added = self.own(number if own is None else own)
        return [f"{self.prefix(number)} {each}" for each in added]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back of requests that were sent at once, and how long all of them took."""

    seconds: float
    texts: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int


def main() -> int:
    """Measure both servers."""
    options = _options()
    load = Load(requests=4, prefix_words=400, rounds=1) if options.quick else Load()
    try:
        caching = _run(options, load, caches=True)
        plain = _run(options, load, caches=False)
    except (ServerError, OSError) as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    differing = sum(
        one != other
        for one, other in zip(caching["sharing"][0]["texts"], plain["texts"], strict=True)
    )
    summary = summarize(caching, plain) | {"differing_answers": float(differing)}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "load": asdict(load),
        "summary": summary,
        "caching": caching,
        "plain": plain,
    }
    if not options.quick:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"wrote {options.json}", file=sys.stderr)
    Console().print(table(load, summary))
    return 1 if differing else 0


def summarize(caching: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """The round whose ratio to the least is the median, and how far the ratios of others are.

    Each ratio is of one round, so that a machine whose speed changes between rounds spoils none.
    """
    parts = [caching[name] for name in ("prefix", "short", "sharing", "known")]
    rounds = [tuple(part["seconds"] for part in each) for each in zip(*parts, strict=True)]
    rounds.sort(key=_ratio)
    middle = rounds[(len(rounds) - 1) // 2]
    prefix_s, short_s, sharing_s, known_s = middle
    return {
        "prefix_s": prefix_s,
        "short_s": short_s,
        "sharing_s": sharing_s,
        "known_s": known_s,
        "plain_s": plain["seconds"],
        "over_least": _ratio(middle),
        "over_parts": sharing_s / (prefix_s + known_s),
        "least_ratio": _ratio(rounds[0]),
        "greatest_ratio": _ratio(rounds[-1]),
        "speedup": plain["seconds"] / sharing_s,
        "cached_share": median(e["cached_tokens"] / e["prompt_tokens"] for e in caching["sharing"]),
    }


def _ratio(seconds: tuple[float, ...]) -> float:
    """Of the requests that share, to the least."""
    prefix_s, short_s, sharing_s, _ = seconds
    return sharing_s / (prefix_s + short_s)


def table(load: Load, summary: dict[str, float]) -> Table:
    """The times, and what the sharing requests took against the least."""
    made = Table(box=box.SIMPLE, caption=_caption(summary))
    for title in ("requests at once", "s", "against the least"):
        made.add_column(title, justify="left" if title.startswith("req") else "right")
    least_s = summary["prefix_s"] + summary["short_s"]
    for name, seconds in (
        (f"1 prefix of {load.prefix_words:,} words alone", summary["prefix_s"]),
        (f"{load.requests} short ones of {load.own_words} words", summary["short_s"]),
        ("both together: the least", least_s),
        (f"{load.requests} that share the prefix", summary["sharing_s"]),
        (f"{load.requests} where the prefix is known", summary["known_s"]),
        ("the same without caching", summary["plain_s"]),
    ):
        made.add_row(name, f"{seconds:,.2f}", f"{seconds / least_s:.2f}")
    return made


def _caption(summary: dict[str, float]) -> str:
    differing = summary["differing_answers"]
    answers = "the same answers" if not differing else f"{differing:.0f} answers differ"
    return (
        f"{summary['speedup']:.1f} times as fast as without caching, {answers}; "
        f"{summary['cached_share']:.0%} of the prompt tokens were cached; against the least in all "
        f"rounds: {summary['least_ratio']:.2f} to {summary['greatest_ratio']:.2f}, aim: {AIM}"
    )


def _run(options: argparse.Namespace, load: Load, *, caches: bool) -> dict[str, Any]:
    """All that one server is sent: every part and round, or the first round once."""
    arguments = [] if caches else ["--no-prefix-caching"]
    name = " ".join(["serve", *arguments])
    print(f"{name}: starting", file=sys.stderr)
    with serving([*arguments, *shlex.split(options.serve_args)]) as url:
        key = os.environ.get(API_KEY_VARIABLE)
        target = Target(url, first_model(Target(url, "", key)), key)
        _send(target, [make_prompt(WARM_UP_WORDS, WARM_UP_SEED)] * 2, load.output_tokens)
        if not caches:
            print(f"{name}: {load.requests} requests", file=sys.stderr)
            return asdict(_send(target, load.sharing(0), load.output_tokens))
        measured: dict[str, Any] = {"prefix": [], "short": [], "sharing": [], "known": []}
        for number in range(load.rounds):
            print(f"{name}: round {number + 1} of {load.rounds}", file=sys.stderr)
            alone = [load.prefix(load.rounds + number)]
            parts = {"prefix": (alone, 1), "short": (load.own(number), load.output_tokens)}
            parts["sharing"] = load.sharing(number), load.output_tokens
            parts["known"] = load.sharing(number, load.rounds + number), load.output_tokens
            for part, (prompts, max_tokens) in parts.items():
                measured[part].append(asdict(_send(target, prompts, max_tokens)))
        return measured


def _send(target: Target, prompts: Sequence[str], max_tokens: int) -> Answers:
    """Send all of them at once, and wait for the last."""

    def ask(prompt: str) -> dict[str, Any]:
        body = {
            "model": target.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{target.url}/v1/completions", json.dumps(body).encode(), target.headers
        )
        with urllib.request.urlopen(request, timeout=READ_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    with ThreadPoolExecutor(len(prompts)) as threads:
        started = time.perf_counter()
        answers = list(threads.map(ask, prompts))
        seconds = time.perf_counter() - started
    usages = [answer["usage"] for answer in answers]
    return Answers(
        seconds,
        tuple(answer["choices"][0]["text"] for answer in answers),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, and stored nowhere")
    parser.add_argument("--serve-args", default="", help="more flags for `stallfree serve`")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/prefix.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
