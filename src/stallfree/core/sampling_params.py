"""What a request asks of the sampler: validated once, never changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from stallfree.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1_000
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_LOGIT_BIASES = 1_024
MAX_SEED = 2**63 - 1
MIN_RANDOM_TEMPERATURE = 1e-5  # below it nothing but the likeliest token has any chance

_INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    Attributes:
        n: completions of the prompt; they share its KV blocks.
        max_tokens: most output tokens; None runs to the end of the context.
        min_tokens: output tokens before an end token, stop token or stop string counts.
        temperature: 0 is greedy; higher is more random. At most 100.
        top_p: smallest set of most likely tokens whose probability reaches this, in (0, 1].
        top_k: the k most likely tokens; 0 or -1 means all.
        min_p: tokens at least this fraction as likely as the likeliest, in [0, 1].
        repetition_penalty: divides (or multiplies, if negative) the logits of tokens seen in
            prompt or output; in [0.01, 100]. From CTRL (arXiv 1909.05858).
        presence_penalty: subtracted once from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: subtracted for each time a token is in the output, in [-2, 2].
        seed: makes the request reproducible, whatever runs beside it; None draws one.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        stop: strings that end the output; they are not part of it.
        stop_token_ids: tokens that end the output; like end tokens they add no text.
        ignore_eos: go on past the model's end tokens.
        logprobs: most likely tokens to report at each output position (0: the sampled one only).
        prompt_logprobs: the same for each prompt position.

    Raises:
        InvalidRequestError: a value is out of its range; names the field, value and limit.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        _check_integers(self)
        _check_range("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_p", self.top_p, 0, 1, open_low=True)
        _check_range("top_k", self.top_k, -1, None)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _check_range("seed", self.seed, -MAX_SEED, MAX_SEED)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; the limit is "
                f"{MAX_STOP_TOKEN_IDS}",
                "stop_token_ids",
            )
        self._check_logit_bias()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; the limit is {MAX_STOP_STRINGS}", "stop"
            )
        for text in self.stop:
            if not isinstance(text, str):
                raise InvalidRequestError(f"stop holds {text!r}; it must hold texts", "stop")
            if not text:
                raise InvalidRequestError("stop holds an empty string", "stop")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"a stop string has {len(text)} characters; the limit is "
                    f"{MAX_STOP_STRING_CHARS}",
                    "stop",
                )

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIASES}",
                "logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias of token {token_id}", bias, -100, 100, param="logit_bias")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < MIN_RANDOM_TEMPERATURE


def _check_integers(params: SamplingParams) -> None:
    for name in _INTEGERS:
        value = getattr(params, name)
        if value is not None and type(value) is not int:
            raise InvalidRequestError(f"{name} is {value!r}; it must be a whole number", name)


def _check_range(
    name: str,
    value: float,
    low: float,
    high: float | None,
    *,
    open_low: bool = False,
    param: str | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name} is {value!r}; it must be a number", param or name)
    above = value > low if open_low else value >= low
    finite = isinstance(value, int) or math.isfinite(value)
    if finite and above and (high is None or value <= high):
        return
    bound = f"above {low}" if open_low else f"at least {low}"
    limit = bound if high is None else f"{bound} and at most {high}"
    raise InvalidRequestError(f"{name} is {value}; it must be {limit}", param or name)
