"""The request bodies, as OpenAI defines them, with the extensions of vLLM that are common.

Ranges are `SamplingParams`' business, and whether a token id exists is the model's: neither is
checked here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, FailFast, Field, WithJsonSchema, model_validator

from stallfree.core.sampling_params import MAX_LOGPROBS, SamplingParams
from stallfree.core.targets import RANKS, Targets
from stallfree.server.fields import Content, LogitBias, Prompts, Stop, refusal, shown
from stallfree.server.validation import Body

DEFAULT_COMPLETION_TOKENS = 16
MAX_MESSAGES = 4_096
MAX_USER_CHARS = 256  # that count
MAX_CACHE_SALT_CHARS = 256

CacheSalt = Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)]


class StreamOptions(Body):
    """What a stream carries beside the text."""

    IGNORED = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class SamplingBody(Body):
    """The fields that completions and chat completions share."""

    IGNORED = frozenset({"metadata", "store"})

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: LogitBias = {}
    stop: Stop = ()
    stop_token_ids: Annotated[list[int], FailFast()] = []
    ignore_eos: bool | None = None
    skip_special_tokens: Literal[True] | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    tbt_slo_ms: Annotated[float | None, Field(ge=1)] = None
    ttft_slo_ms: Annotated[float | None, Field(ge=1)] = None
    cache_salt: CacheSalt | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("is only allowed with stream", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def tier(self) -> str:
        """The tier that is served: what is left to us, or not known here, is the default one."""
        tier = self.service_tier
        return tier if tier in RANKS else "default"

    @property
    def tier_shown(self) -> dict[str, str]:
        """What the response says of its tier, if one was asked for."""
        return {} if self.service_tier is None else {"service_tier": self.tier}

    def targets(self, owner: str = "") -> Targets:
        """Whom the request goes before, and its own deadlines.

        Args:
            owner: the name of its API key, which has no slash, or empty. Users are those of one
                key, so that no client can pass for one of another key.
        """
        user = (self.user or self.safety_identifier or "")[:MAX_USER_CHARS]
        return Targets(
            self.tier,
            tbt_s=None if self.tbt_slo_ms is None else self.tbt_slo_ms / 1000,
            ttft_s=None if self.ttft_slo_ms is None else self.ttft_slo_ms / 1000,
            user=f"{owner}/{user}" if owner and user else owner or user,
        )

    def salt(self, owner: str) -> str | None:
        """With whom the request shares what was computed: those of the same key and salt."""
        return f"{owner}/{self.cache_salt or ''}" if owner else self.cache_salt

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """What the engine is asked for.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        fields = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in fields.items() if value is not None},
        )


_SAMPLING_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


class CompletionRequest(SamplingBody):
    """The body of `/v1/completions`."""

    UNSUPPORTED = {"suffix": ()}

    prompt: Prompts
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        n = 1 if self.n is None else self.n
        if self.best_of not in (None, n):
            raise refusal(f"is {shown(self.best_of)}; only n ({n}) is supported", "best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise refusal("is not supported with stream; echo is", "prompt_logprobs")
        return self

    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(
            max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs
        )


class ChatMessage(Body):
    """One message of a chat."""

    IGNORED = frozenset({"annotations"})
    UNSUPPORTED = {
        "tool_calls": ([],),
        "function_call": (),
        "audio": (),
        "refusal": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def variables(self) -> dict[str, str]:
        """The message as a chat template sees it; templates do not know the role developer."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(SamplingBody):
    """The body of `/v1/chat/completions`."""

    IGNORED = SamplingBody.IGNORED | {
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
    UNSUPPORTED = {
        "audio": (),
        "chat_template": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("is only allowed with logprobs", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refusal("and max_completion_tokens differ; send one of them", "max_tokens")
        return self

    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        most = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens=most, logprobs=logprobs, prompt_logprobs=None)


class TokenizeRequest(Body):
    """The body of `/tokenize`: a prompt, or the messages of a chat."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: str | None = None
    prompt: str | None = None
    messages: Messages = []
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise refusal("or messages is required, and not both", "prompt")
        return self


class DetokenizeRequest(Body):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[
        list[Any],
        WithJsonSchema(
            {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
        ),
    ]
