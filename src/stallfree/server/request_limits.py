"""What one request may ask for, by the server's settings.

Ranges that hold for everybody are `SamplingParams`' business; these can only be narrower.
"""

from __future__ import annotations

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.limit_settings import LimitSettings
from stallfree.errors import ContextLengthError, InvalidRequestError


class RequestLimits:
    """Checks requests against `settings`. Every error names the field, its value and the limit."""

    def __init__(self, settings: LimitSettings) -> None:
        self._settings = settings

    def check_params(self, params: SamplingParams, logprobs_field: str = "logprobs") -> None:
        """Check how a request wants its tokens chosen.

        Args:
            params: of the request.
            logprobs_field: what the request calls the number of most likely tokens.

        Raises:
            InvalidRequestError: a value is over its limit.
        """
        settings = self._settings
        _check_most("n", params.n, settings.max_n)
        _check_most(logprobs_field, params.logprobs, settings.max_logprobs)
        _check_most("prompt_logprobs", params.prompt_logprobs, settings.max_logprobs)
        if len(params.stop) > settings.max_stop_strings:
            raise InvalidRequestError(
                f"stop has {len(params.stop)} strings; the limit is {settings.max_stop_strings}",
                "stop",
            )
        longest = max(map(len, params.stop), default=0)
        if longest > settings.max_stop_string_chars:
            raise InvalidRequestError(
                f"a stop string has {longest} characters; the limit is "
                f"{settings.max_stop_string_chars}",
                "stop",
            )

    def check_num_prompts(self, num_prompts: int, n: int) -> None:
        """Check how many prompts a request has, and how many completions of each.

        Raises:
            InvalidRequestError: too many.
        """
        if num_prompts > self._settings.max_prompts:
            raise InvalidRequestError(
                f"prompt has {num_prompts} prompts; the limit of one request is "
                f"{self._settings.max_prompts}",
                "prompt",
            )
        if num_prompts * n > self._settings.max_completions:
            raise InvalidRequestError(
                f"{num_prompts} prompts with n {n} are {num_prompts * n} completions; the limit "
                f"of one request is {self._settings.max_completions}",
                "prompt",
            )

    def check_prompt_tokens(self, num_tokens: int, source: str) -> None:
        """Check how long a prompt is, which comes from the field `source`.

        Raises:
            ContextLengthError: too long.
        """
        limit = self._settings.max_prompt_tokens
        if limit is not None and num_tokens > limit:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the limit of this server is {limit}", source
            )


def _check_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise InvalidRequestError(f"{name} is {value}; the limit of this server is {most}", name)
