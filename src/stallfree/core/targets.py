"""What a request is promised, and whom it goes before: its tier and its own deadlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

RANKS = {"priority": 0, "default": 1, "flex": 2}  # lower goes first


@dataclass(frozen=True, slots=True)
class Targets:
    """A request's place among others.

    Attributes:
        tier: a name in `RANKS`. `flex` takes what the others leave: it has no target for the time
            between its tokens, and pauses while prompts of others are read.
        tbt_s: most seconds from one token to the next; None: the server's, none for `flex`.
        ttft_s: most seconds to the first token, or None.
        user: whose it is, for fairness; empty if not known.
    """

    tier: str = "default"
    tbt_s: float | None = None
    ttft_s: float | None = None
    user: str = ""

    def __post_init__(self) -> None:
        if self.tier not in RANKS:
            raise ValueError(f"tier is {self.tier!r}; it must be one of {', '.join(RANKS)}")
        for name, value in (("tbt_s", self.tbt_s), ("ttft_s", self.ttft_s)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be finite and above 0")

    @property
    def rank(self) -> int:
        """Its place: those of a lower rank go first."""
        return RANKS[self.tier]

    @property
    def yields(self) -> bool:
        """Whether it takes only what the others leave."""
        return self.tier == "flex"

    def completed(self, tiers: Mapping[str, Targets]) -> Targets:
        """These targets, with those of its tier where it has none of its own."""
        tier = tiers.get(self.tier)
        if tier is None:
            return self
        return replace(
            self,
            tbt_s=tier.tbt_s if self.tbt_s is None else self.tbt_s,
            ttft_s=tier.ttft_s if self.ttft_s is None else self.ttft_s,
        )


DEFAULT_TARGETS = Targets()
