"""What a request must be before it is queued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import Targets
from stallfree.engine.facts import EngineFacts
from stallfree.errors import ContextLengthError, InvalidRequestError


class RequestCheck:
    """Refuses what cannot be run. It reads only what never changes.

    Args:
        facts: of the engine, whose context and KV cache limit a request.
        tiers: targets of each tier.
    """

    def __init__(self, facts: EngineFacts, tiers: Mapping[str, Targets]) -> None:
        self._facts, self._tiers = facts, tiers

    def __call__(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, targets: Targets
    ) -> int:
        """Most output tokens that a request may have.

        Raises:
            InvalidRequestError: the request cannot be run; ContextLengthError if it is too long.
        """
        if not prompt_token_ids:
            raise InvalidRequestError(
                "the prompt is empty; it must have at least 1 token", "prompt"
            )
        self._check_targets(targets)
        self._check_ids("prompt", prompt_token_ids)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        num_prompt = len(prompt_token_ids)
        longest = min(self._facts.max_model_len, self._facts.kv_cache_tokens + 1)
        if num_prompt >= longest:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; the context is {longest} tokens, of which "
                "the output needs at least 1",
                "prompt",
            )
        max_tokens = params.max_tokens or longest - num_prompt
        if num_prompt + max_tokens > longest:
            raise ContextLengthError(
                f"max_tokens is {max_tokens} and the prompt has {num_prompt} tokens: together "
                f"more than the context of {longest}; max_tokens can be {longest - num_prompt}",
                "max_tokens",
            )
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}; the context leaves {max_tokens}", "min_tokens"
            )
        return max_tokens

    def _check_targets(self, targets: Targets) -> None:
        """Refuse a target that cannot be kept, or that would close the server to others."""
        if targets.tbt_s is None:
            return
        given = f"tbt_slo_ms is {targets.tbt_s * 1000:g}"
        reason = None
        if self._facts.tbt_slo_s is None:
            reason = (
                "this server keeps no target for the time between tokens: it must be started with "
                "--tbt-slo"
            )
        elif targets.yields:
            reason = "requests of tier flex wait for others, so they have no such target"
        else:
            own = (tier.tbt_s for tier in self._tiers.values() if tier.tbt_s is not None)
            tightest = min(own, default=self._facts.tbt_slo_s)
            if targets.tbt_s < tightest:
                reason = f"this server keeps {tightest * 1000:g} ms at the least"
        if reason is not None:
            raise InvalidRequestError(f"{given}; {reason}", "tbt_slo_ms")

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        ids = list(token_ids)
        wrong = next((i for i in ids if type(i) is not int), None)
        if wrong is not None:
            raise InvalidRequestError(f"{name} holds {wrong!r}; token ids are whole numbers", name)
        if ids and not (min(ids) >= 0 and max(ids) < self._facts.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self._facts.vocab_size)
            raise InvalidRequestError(
                f"{name} holds token id {bad}; the vocabulary is 0 to {self._facts.vocab_size - 1}",
                name,
            )
