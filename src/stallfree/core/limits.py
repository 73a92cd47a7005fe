"""What one iteration may hold: the token budget's answers, and what keeps a server going.

The budget says what its target allows; here that becomes limits which a policy keeps and which
leave nobody stuck. Nothing here chooses who runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple

from stallfree.core.budget import TokenBudget
from stallfree.core.load import Load
from stallfree.core.request import Request
from stallfree.core.token_costs import TokenCosts
from stallfree.core.waiting import WaitingQueue

_MOST_ADMISSIONS = 32  # in one iteration


class Limits(NamedTuple):
    """Limits of one iteration; None where there is none.

    Attributes:
        tokens: most tokens.
        admissions: most requests that may be admitted, `flex` aside.
        flex_decodes: the `flex` decodes that may run where no prompt of others does.
        flex_tokens: most tokens where they do.
        costs: of chunks, beyond their tokens; of the other decodes, so roughly where `flex` runs.
    """

    tokens: int | None
    admissions: int | None
    flex_decodes: Sequence[Request]
    flex_tokens: int | None
    costs: TokenCosts

    @property
    def most_tokens(self) -> int | None:
        """Most tokens, whoever runs."""
        return None if self.tokens is None else max(self.tokens, self.flex_tokens or 0)


def no_limits(load: Load) -> Limits:
    """Those of a policy without a budget."""
    return Limits(None, None, load.flex_decodes, None, TokenCosts())


def limits_of(
    budget: TokenBudget, load: Load, running: Collection[Request], waiting: WaitingQueue
) -> Limits:
    """Those that a budget sets.

    Args:
        budget: asked once.
        load: those of `running` that are ready to run.
        running: all admitted requests.
        waiting: those that may join them.
    """
    tokens = _tokens(budget, load, running)
    costs = budget.costs(load, tokens)
    num_ready = len(load.decodes) + len(load.flex_decodes) + len(load.prefills)
    everything = load if num_ready == len(running) else Load(running)
    first = islice(waiting.in_order((), True, is_flex=False), _MOST_ADMISSIONS)
    admissions = budget.admissions(everything, [request.num_tokens for request in first])
    has_flex = load.flex_decodes or waiting.has_flex or any(r.is_flex for r in load.prefills)
    if not has_flex:
        return Limits(tokens, admissions, load.flex_decodes, tokens, costs)
    count, flex_tokens = budget.flex(load)
    if not load.decodes:
        flex_tokens = max(flex_tokens, budget.tile_tokens)
    return Limits(tokens, admissions, load.flex_decodes[:count], flex_tokens, costs)


def _tokens(budget: TokenBudget, load: Load, running: Collection[Request]) -> int:
    """The budget, clamped at zero; a tile at least if there is no answer to hold up."""
    tokens = max(0, budget.tokens(load))
    if tokens or load.decodes or any(request.in_flight for request in running):
        return tokens
    return budget.tile_tokens
