"""The tokenizer of a model: text to token ids and back, and chats to prompts.

A thin layer over a `tokenizers.Tokenizer`. Reading the model's files is in `tokenizer_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from stallfree.engine.chat_template import render_template
from stallfree.engine.tokenizer_files import read_tokenizer
from stallfree.errors import InvalidRequestError, TokenizerError
from stallfree.model.source import ModelSource

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes, decodes and renders chats; safe to use from several threads.

    Args:
        backend: what does the work; truncation and padding must be off.
        chat_template: the model's own, if it has one.
        special_tokens: texts of tokens with a role, such as `bos_token`, by role; chat templates
            see them under these names.

    Attributes:
        vocab_size: number of ids; all that are known are below it.
        special_ids: ids of the tokens that are not text, such as `<|im_end|>`.
        bos_token_id, eos_token_id: those of the roles, None where there is none.
        chat_template: as above.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._token_bytes = _ByteDecoder(backend.decoder)
        added = backend.get_added_tokens_decoder()
        self.chat_template = chat_template
        self.vocab_size = max(backend.get_vocab_size(), 1 + max(added, default=-1))
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id = self._role_id("bos_token")
        self.eos_token_id = self._role_id("eos_token")

    def _role_id(self, role: str) -> int | None:
        text = self._special_tokens.get(role)
        token_id: int | None = None if text is None else self._backend.token_to_id(text)
        return token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens that are spelled out in it are recognised.

        Lets other threads run meanwhile.

        Args:
            text: any text.
            add_special_tokens: add those that the model wants around a text, such as a first one.

        Raises:
            InvalidRequestError: the text is not valid Unicode.
        """
        try:
            # Unlike `encode`, this one releases the interpreter's lock, and skips the offsets.
            (encoding,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError:
            raise InvalidRequestError(
                "the text is not valid Unicode: it has half of a surrogate pair"
            ) from None
        token_ids: list[int] = encoding.ids
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that are not known have none."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text for display, special ones too; U+FFFD for parts of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, none if it is not known.

        Those of a sequence are its text, save that some tokenizers drop a space at its start.
        """
        token: str | None = self._backend.id_to_token(token_id)
        return b"" if token is None else self._token_bytes(token)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> str:
        """The prompt of a chat, special tokens included: encode it without adding any.

        Args:
            messages: as in the OpenAI API.
            chat_template: used instead of the model's own.
            **template_variables: what else the template shall see, such as `tools`;
                `add_generation_prompt` is true unless given here.

        Raises:
            InvalidRequestError: there is no template, it is broken, or fails on the messages.
        """
        return render_template(*self.chat_inputs(messages, chat_template, **template_variables))

    def chat_inputs(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> tuple[str, dict[str, Any]]:
        """The template of a chat and its variables: see `render_chat`.

        Raises:
            InvalidRequestError: there is no template.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise InvalidRequestError(
                "the model has no chat template; send a plain completion, or start the server "
                "with --chat-template",
                "messages",
            )
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        variables = {**defaults, **self._special_tokens, **template_variables}
        return template, {**variables, "messages": list(messages)}


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        TokenizerError: there is none, or it cannot be used.
    """
    files = read_tokenizer(source.path)
    tokenizer = Tokenizer(files.backend, files.chat_template, files.special_tokens)
    if tokenizer.vocab_size == 0:
        raise TokenizerError(f"the tokenizer of {source.path} has no tokens")
    return tokenizer


class _ByteDecoder:
    """Turns the spelling of a token in the vocabulary into the bytes that it stands for."""

    def __init__(self, decoder: tokenizers.decoders.Decoder | None) -> None:
        steps = _steps(decoder)
        kinds = {step.get("type") for step in steps}
        self._byte_of = _byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step.get("type") == "Replace" and "String" in step["pattern"]
        ] + [(step["replacement"], " ") for step in steps if step.get("type") == "Metaspace"]

    def __call__(self, token: str) -> bytes:
        if self._byte_of is not None:
            try:
                return bytes(map(self._byte_of.__getitem__, token))
            except KeyError:  # an added token, which is spelled as it is
                return token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _steps(decoder: tokenizers.decoders.Decoder | None) -> list[dict[str, Any]]:
    """The settings of a decoder, or of the ones it is a sequence of."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character in the vocabulary of a byte-level tokenizer.

    Bytes that are visible characters of Latin-1 stand for themselves, the others are numbered
    from character 256 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)).difference(visible))
    characters = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    return dict(zip(characters, [*visible, *hidden], strict=True))
