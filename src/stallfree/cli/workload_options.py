"""The flags that say which requests are sent when, of every command that sends them or simulates.

What specs mean is known in `bench/lengths.py` and `bench/arrivals.py`, which check them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from stallfree.bench.arrivals import ARRIVALS_HELP
from stallfree.bench.lengths import LENGTHS_HELP, MAX_TOKENS
from stallfree.bench.workload import Workload
from stallfree.bench.workload_file import load_workload
from stallfree.bench.workloads import Recipe, stretched
from stallfree.engine.flags import Flag, check_range, check_types, settings_of
from stallfree.errors import ConfigError

MAX_REQUESTS = 1_000_000
_PANEL = "Workload"
_NOT_WITH_REPLAY = (
    *("lengths", "arrivals", "num_requests", "max_total_tokens", "workload_seed"),
    "prefixes",
)


@dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """Which requests are sent when.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two exclude each other.
    """

    lengths: Annotated[
        str,
        Flag(
            f"Lengths of prompts and answers: {LENGTHS_HELP}", "SPEC", name="workload", panel=_PANEL
        ),
    ] = "openchat_sharegpt4"
    arrivals: Annotated[
        str, Flag(f"When requests arrive: {ARRIVALS_HELP}", "SPEC", panel=_PANEL)
    ] = "poisson"
    qps: Annotated[
        float | None,
        Flag(
            "Mean number of requests a second. Another rate stretches the same requests in time.",
            "RATE",
            unset="1; of a trace's times or a saved workload, its own",
            panel=_PANEL,
        ),
    ] = None
    clients: Annotated[
        int | None,
        Flag(
            "Closed loop: so many clients, each of which sends the next request as soon as its "
            "last one is answered.",
            "CLIENTS",
            unset="an open loop: requests are sent at their times",
            panel=_PANEL,
        ),
    ] = None
    prefixes: Annotated[
        str | None,
        Flag(
            "Let each prompt begin with one of COUNT texts of TOKENS tokens, drawn at random, and "
            "go on with what --workload gives: system prompts, or documents that are asked about.",
            "COUNT,TOKENS",
            unset="no two prompts begin alike",
            panel=_PANEL,
        ),
    ] = None
    num_requests: Annotated[int, Flag("How many requests.", "REQUESTS", panel=_PANEL)] = 100
    max_total_tokens: Annotated[
        int | None,
        Flag(
            "Scale all lengths by the same factor so that the longest request there can be has as "
            "many tokens of prompt and answer together. lognormal draws longer ones again instead.",
            "TOKENS",
            unset="what the model's context holds, if that is known",
            panel=_PANEL,
        ),
    ] = None
    workload_seed: Annotated[int, Flag("Seeds gaps and lengths.", "SEED", panel=_PANEL)] = 0
    replay: Annotated[
        Path | None,
        Flag(
            "A workload that `stallfree bench workload --save` wrote, instead of a new one; only "
            "--qps or --clients may go with it.",
            "FILE.jsonl",
            unset="a new one",
            panel=_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range("num_requests", self.num_requests, 1, MAX_REQUESTS)
        check_range("max_total_tokens", self.max_total_tokens, 2)
        check_range("clients", self.clients, 1)
        check_range("qps", self.qps, 1e-6, 1e6)
        self._shared()
        if self.clients is not None and self.qps is not None:
            raise ConfigError(
                f"clients is {self.clients} and qps is {self.qps:g}; in a closed loop the answers "
                "set the rate, so give one of the two"
            )
        changed = {
            setting.field: (setting.name, value)
            for setting in settings_of(type(self))
            if (value := getattr(self, setting.field)) != setting.default
        }
        if self.clients is not None and "arrivals" in changed:
            raise ConfigError(f"arrivals is {self.arrivals!r}; a closed loop with clients has none")
        for field in _NOT_WITH_REPLAY if self.replay is not None else ():
            if field in changed:
                name, value = changed[field]
                raise ConfigError(f"{name} is {value!r}; it cannot be set for a replay")

    def workload(self, max_model_len: int | None = None) -> Workload:
        """The workload, for a model whose context holds so many tokens; None if it is not known.

        Raises:
            ConfigError: a spec or a file is wrong, or a request of a replay exceeds the context.
        """
        if self.replay is not None:
            return self._replayed(self.replay, max_model_len)
        limits = [each for each in (self.max_total_tokens, max_model_len) if each is not None]
        recipe = Recipe(
            lengths=self.lengths,
            arrivals=self.arrivals,
            num_requests=self.num_requests,
            requests_per_s=self.qps,
            clients=self.clients,
            max_total_tokens=min(limits, default=None),
            seed=self.workload_seed,
            prefixes=self._shared(),
        )
        return recipe.make()

    def _shared(self) -> tuple[int, int] | None:
        """How many prefixes there are, and tokens of each; raises ConfigError if they are none."""
        if self.prefixes is None:
            return None
        count, comma, tokens = (part.strip() for part in self.prefixes.partition(","))
        if not (comma and count.isdecimal() and tokens.isdecimal()):
            raise ConfigError(f"prefixes is {self.prefixes!r}; write it as COUNT,TOKENS: 8,500")
        check_range("prefixes", int(count), 1, MAX_REQUESTS)
        check_range("tokens of prefixes", int(tokens), 1, MAX_TOKENS)
        return int(count), int(tokens)

    def _replayed(self, path: Path, max_model_len: int | None) -> Workload:
        saved = load_workload(path)
        longest = max(each.prompt_tokens + each.output_tokens for each in saved.arrivals)
        if max_model_len is not None and longest > max_model_len:
            raise ConfigError(
                f"{path} holds a request of {longest:,} tokens in total, but the model's context "
                f"holds {max_model_len:,}"
            )
        if self.clients is not None:
            about = f"{saved.about}, replayed by {self.clients} clients"
            return replace(saved, clients=self.clients, about=about)
        if self.qps is not None:
            about = f"{saved.about}, replayed at {self.qps:g}/s"
            return replace(stretched(saved, self.qps), clients=None, about=about)
        return saved
