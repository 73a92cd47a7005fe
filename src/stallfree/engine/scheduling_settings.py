"""The settings of scheduling: who runs when, within which targets, and who is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stallfree.core.policies import POLICIES
from stallfree.core.targets import RANKS, Targets
from stallfree.core.waiting import PREFILL_ORDERS
from stallfree.engine.flags import Flag, check_choice, check_range, parse_duration
from stallfree.errors import ConfigError

MIN_SLO_S = 0.001


@dataclass(frozen=True, slots=True)
class SchedulingSettings:
    """The part of `EngineSettings` that decides who runs when.

    Raises:
        ConfigError: a value is out of range; names it and the limit.
    """

    scheduler: Annotated[
        str,
        Flag(f"How requests are batched: {', '.join(POLICIES)}.", "NAME", panel="Scheduling"),
    ] = "sarathi"
    token_budget: Annotated[
        int | None,
        Flag(
            "Most tokens an iteration holds, decodes first: smaller keeps the time between "
            "tokens shorter, larger reads prompts faster.",
            "TOKENS",
            unset="96 on a CPU in int8, 64 in floats, 512 on a CUDA GPU",
            panel="Scheduling",
        ),
    ] = None
    tbt_slo_s: Annotated[
        float | None,
        Flag(
            "Target for the time between two tokens of an answer, 200ms or 0.2s: each iteration "
            "takes as much of the prompts as keeps it. Instead of a token budget.",
            "TIME",
            name="tbt_slo",
            unset="the token budget alone decides",
            parse=parse_duration,
            panel="Scheduling",
        ),
    ] = None
    ttft_slo_s: Annotated[
        float | None,
        Flag(
            "Target for the time to the first token, such as 2s: what edf orders by, and what "
            "admission compares with.",
            "TIME",
            name="ttft_slo",
            unset="no target",
            parse=parse_duration,
            panel="Scheduling",
        ),
    ] = None
    tier: Annotated[
        tuple[str, ...],
        Flag(
            "Targets of a service tier: priority:tbt=100ms,ttft=2s. May be repeated. Requests name "
            "their tier in service_tier; priority goes first, flex takes what the others leave "
            "and needs no targets.",
            "TIER:TARGETS",
            panel="Scheduling",
        ),
    ] = ()
    prefill_order: Annotated[
        str,
        Flag(
            "Whose prompt is read first within a tier: fcfs, first come; edf, earliest deadline "
            "of the first token; srpf, shortest remaining prefill, where a second of waiting is "
            "worth 100 tokens.",
            "ORDER",
            panel="Scheduling",
        ),
    ] = "fcfs"
    fair: Annotated[
        bool,
        Flag(
            "Let users take turns, by the tokens that each got so far. A user is what requests "
            "name as user or safety_identifier.",
            "",
            panel="Scheduling",
        ),
    ] = False
    max_queued_requests: Annotated[
        int | None,
        Flag(
            "Most requests that wait; one more is refused with status 429.",
            "REQUESTS",
            unset="no limit",
            panel="Scheduling",
        ),
    ] = None
    max_queued_tokens: Annotated[
        int | None,
        Flag(
            "Most tokens of the prompts that wait; a prompt that would make it more is refused "
            "with status 429.",
            "TOKENS",
            unset="no limit",
            panel="Scheduling",
        ),
    ] = None
    admit_within_slo: Annotated[
        float | None,
        Flag(
            "Refuse a request at once, with status 429, if its first token is predicted to come "
            "later than this many times its target. Needs tbt-slo.",
            "FACTOR",
            unset="all are admitted",
            panel="Scheduling",
        ),
    ] = None
    max_num_seqs: Annotated[
        int,
        Flag("Most requests that run at once; the others wait.", "REQUESTS", panel="Scheduling"),
    ] = 128
    max_model_len: Annotated[
        int | None,
        Flag(
            "Longest context, prompt and answer together.",
            "TOKENS",
            unset="what the model and the KV cache allow",
            panel="Scheduling",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_choice("scheduler", self.scheduler, tuple(POLICIES))
        check_choice("prefill_order", self.prefill_order, tuple(PREFILL_ORDERS))
        check_range("token_budget", self.token_budget, 1)
        check_range("tbt_slo_s", self.tbt_slo_s, MIN_SLO_S)
        if self.tbt_slo_s is not None and self.token_budget is not None:
            raise ConfigError(
                f"token_budget is {self.token_budget} and tbt_slo is {self.tbt_slo_s} s: "
                "the one is chosen from the other; give one of them"
            )
        check_range("max_num_seqs", self.max_num_seqs, 1)
        check_range("max_model_len", self.max_model_len, 2)
        check_range("ttft_slo_s", self.ttft_slo_s, MIN_SLO_S)
        check_range("max_queued_requests", self.max_queued_requests, 1)
        check_range("max_queued_tokens", self.max_queued_tokens, 1)
        check_range("admit_within_slo", self.admit_within_slo, 0.1)
        if self.admit_within_slo is not None and self.tbt_slo_s is None:
            raise ConfigError(
                f"admit_within_slo is {self.admit_within_slo}, but without tbt_slo nothing is "
                "predicted; give that too"
            )
        if self.tbt_slo_s is not None and not POLICIES[self.scheduler].never_pauses:
            raise ConfigError(
                f"tbt_slo is of no use with scheduler {self.scheduler!r}, whose iterations do not "
                "all hold every decode and keep a budget; use sarathi"
            )
        for name, targets in self.tiers.items():
            if targets.tbt_s is not None and self.tbt_slo_s is None:
                raise ConfigError(f"tier {name} has a tbt, but there is no tbt_slo; give that too")

    @property
    def tiers(self) -> dict[str, Targets]:
        """The targets of each tier: the server's, where it has none of its own."""
        made = {
            name: Targets(name, tbt_s=self.tbt_slo_s, ttft_s=self.ttft_slo_s)
            for name in ("priority", "default")
        }
        own: dict[str, Targets] = {}
        for text in self.tier:
            targets = _parse_tier(text)
            if targets.tier in own:
                raise ConfigError(
                    f"tier {targets.tier} is given twice; give all its targets at once"
                )
            own[targets.tier] = targets.completed(made)
        return made | own


def _parse_tier(text: str) -> Targets:
    """Read `priority:tbt=100ms,ttft=2s`."""
    name, _, rest = text.partition(":")
    if name not in RANKS:
        raise ConfigError(f"tier is {text!r}; it must begin with one of {', '.join(RANKS)}")
    found: dict[str, float] = {}
    for part in rest.split(","):
        target, _, value = part.strip().partition("=")
        if target not in ("tbt", "ttft") or target in found:
            example = f"{name}:ttft=2s" if name == "flex" else f"{name}:tbt=100ms,ttft=2s"
            raise ConfigError(f"tier is {text!r}; write it as {example}")
        found[target] = parse_duration(value)
        check_range(f"{target} of tier {name}", found[target], MIN_SLO_S)
    if name == "flex" and "tbt" in found:
        raise ConfigError(f"tier is {text!r}; flex takes what others leave, so it has no tbt")
    return Targets(name, tbt_s=found.get("tbt"), ttft_s=found.get("ttft"))
