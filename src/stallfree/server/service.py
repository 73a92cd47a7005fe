"""What the endpoints share: the engine, its tokenizer, and checks that need the model.

Text is tokenized in threads, so that a huge prompt stops neither the event loop nor the short
ones. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import Targets
from stallfree.engine.chat_template import compile_template
from stallfree.engine.served import ServedEngine
from stallfree.engine.settings import ServerSettings
from stallfree.engine.template_process import TemplateProcess
from stallfree.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    TokenizerError,
)
from stallfree.server.errors import ApiError
from stallfree.server.fields import shown
from stallfree.server.keys import Keyring
from stallfree.server.protocol import ChatMessage
from stallfree.server.request_limits import RequestLimits

LARGE_SIZE = 65_536
TEXT_THREADS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is ready to run; `text` is what `echo` repeats."""

    token_ids: Sequence[int]
    text: str


class Service:
    """One engine as the endpoints see it.

    Attributes:
        settings: of the server.
        keys: that requests must carry, if any.
        limits: of what a request may ask for.
        templates: runs chat templates.
        draining: whether requests are refused because the server is about to end.
        ends_at_once: whether the server ends without waiting for the engine's iteration.

    Raises:
        ConfigError: the chat template or the API keys cannot be used.
    """

    def __init__(self, engine: ServedEngine, settings: ServerSettings) -> None:
        self.settings = settings
        self.keys = Keyring.of(settings)
        self.limits = RequestLimits(settings)
        self.templates = TemplateProcess()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_model_len = engine.facts.max_model_len
        self.vocab_size = engine.facts.vocab_size
        self.model_name = settings.served_model_name or engine.facts.model_name
        self.created = int(time.time())
        self.draining = False
        self.ends_at_once = False
        self._chat_template = _read_template(settings)
        self._short_texts = ThreadPoolExecutor(TEXT_THREADS, "stallfree-text")
        self._large_texts = ThreadPoolExecutor(1, "stallfree-large-text")
        self._template_texts = ThreadPoolExecutor(1, "stallfree-template-text")

    def reload(self) -> None:
        """Read again what may change while the server runs: the API keys."""
        if self.keys is not None:
            self.keys.reload()

    @property
    def status(self) -> str:
        """`ok` while requests are taken, else why not: `starting`, `draining` or `dead`."""
        if self.engine.error is not None:
            return "dead"
        if self.draining:
            return "draining"
        return "ok" if self.engine.is_ready else "starting"

    def check_ready(self) -> None:
        """Raise EngineStoppedError if no request can be taken."""
        if self.engine.error is not None:
            raise EngineStoppedError("the engine has failed; the server is about to end")
        if self.draining:
            raise EngineStoppedError("the server is about to end and takes no more requests")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) if `name` is given and is not the model served."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {shown(name)} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def check(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        targets: Targets,
        source: str = "prompt",
    ) -> None:
        """Refuse what the engine would refuse, and what is too long here, before anything runs.

        Args:
            prompts: what is to run.
            params: with these.
            targets: and these.
            source: the field that the prompts come from.

        Raises:
            InvalidRequestError: a token id does not exist.
            ContextLengthError: a prompt and its output are too long.
            EngineStoppedError: the engine takes no more requests.
        """
        try:
            for prompt in prompts:
                self.limits.check_prompt_tokens(len(prompt.token_ids), source)
                await self.engine.check(prompt.token_ids, params, targets)
        except InvalidRequestError as error:
            if error.param == "prompt":
                error.param = source
            raise

    async def prompt(self, prompt: str | list[Any], special_tokens: bool, echo: bool) -> Prompt:
        """Tokenize a prompt, or check one that is token ids; its text is only there for `echo`.

        Raises:
            InvalidRequestError: it is empty, or a token id does not exist.
            ContextLengthError: it has more token ids than the context, or than a prompt may have.
        """
        if isinstance(prompt, str):
            return Prompt(await self.encode(prompt, special_tokens), prompt)
        self.limits.check_prompt_tokens(len(prompt), "prompt")
        self.check_token_ids(prompt, "prompt")
        return Prompt(prompt, await self.decode(prompt) if echo else "")

    async def chat_prompt(self, messages: Sequence[ChatMessage], special_tokens: bool) -> Prompt:
        """Put messages into the chat template and tokenize them.

        Raises:
            InvalidRequestError: there is no template, or it refuses them, fails, or takes too long.
        """
        template, variables = self.tokenizer.chat_inputs(
            [message.variables() for message in messages], self._chat_template
        )
        text = await asyncio.get_running_loop().run_in_executor(
            self._template_texts, self.templates.render, template, variables
        )
        token_ids = await self.in_thread(
            len(text), lambda: self.tokenizer.encode(text, special_tokens)
        )
        return Prompt(token_ids, text)

    async def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Tokenize `text`; raises InvalidRequestError if it is empty."""
        if not text:
            raise InvalidRequestError("prompt is empty; it must have at least 1 token", "prompt")
        return await self.in_thread(len(text), lambda: self.tokenizer.encode(text, special_tokens))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included."""
        return await self.in_thread(
            len(token_ids), lambda: self.tokenizer.decode(token_ids, skip_special_tokens=False)
        )

    def check_token_ids(self, token_ids: list[Any], param: str) -> None:
        """Refuse what is not a list of token ids of this model, no longer than its context.

        Raises:
            InvalidRequestError: the list is empty or holds something else.
            ContextLengthError: it is too long.
        """
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty; it must have at least 1 token", param)
        if len(token_ids) > self.max_model_len:
            raise ContextLengthError(
                f"{param} has {len(token_ids)} tokens; the context is {self.max_model_len} tokens",
                param,
            )
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{param} has the token id {shown(token_id)}; ids are 0 to "
                    f"{self.vocab_size - 1}",
                    param,
                )

    async def in_thread(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread; `size` in tokens or characters."""
        pool = self._large_texts if size > LARGE_SIZE else self._short_texts
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _read_template(settings: ServerSettings) -> str | None:
    if settings.chat_template is None:
        return None
    try:
        template = settings.chat_template.read_text(encoding="utf-8")
        compile_template(template)
    except (OSError, UnicodeDecodeError, TokenizerError) as error:
        raise ConfigError(
            f"chat_template {settings.chat_template} cannot be used: {error}"
        ) from None
    return template
