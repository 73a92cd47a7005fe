"""Log probabilities in OpenAI's two formats, and vLLM's one for prompts.

Every token of the output has an entry, an end token included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stallfree.engine.tokenizer import Tokenizer
from stallfree.executor.output import PositionLogprobs

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks
REPLACEMENT = "\ufffd"


def chat_logprobs(
    tokenizer: Tokenizer, positions: Sequence[PositionLogprobs] | None
) -> dict[str, Any] | None:
    """The `logprobs` of a chat choice; None if none were asked for."""
    if positions is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {
            **entry(position.token_id, position.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in position.top],
        }
        for position in positions
    ]
    return {"content": content}


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Iterable[PositionLogprobs | None]
) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of vLLM: for each position the tokens by id, None for the first."""
    return [None if position is None else _by_id(tokenizer, position) for position in positions]


def _by_id(tokenizer: Tokenizer, position: PositionLogprobs) -> dict[str, Any]:
    ranked: dict[int, tuple[float, int | None]] = {
        token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(position.top, 1)
    }
    ranked.setdefault(position.token_id, (position.logprob, None))
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, (logprob, rank) in ranked.items()
    }


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, piece by piece.

    A token's text offset is where it starts in the text of the choice, in characters; one that
    starts inside a character has that character's offset. Tokens that are no whole characters are
    named by their bytes, as OpenAI does, because `top_logprobs` needs names that differ.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_characters = 0  # that the tokens so far began

    def prompt(
        self,
        token_ids: Sequence[int],
        text: str,
        positions: Sequence[PositionLogprobs | None],
    ) -> dict[str, list[Any]]:
        """The entries of an echoed prompt, whose text is `text`."""
        entries = _empty()
        for token_id, position in zip(token_ids, positions, strict=True):
            width = self._tokenizer.token_bytes(token_id)
            if token_id in self._tokenizer.special_ids:  # in the text, or added to the tokens
                name = self._tokenizer.token_text(token_id)
                width = name.encode() if text.startswith(name, self._num_characters) else b""
            elif self._num_characters == 0 and not text.startswith(" "):
                width = width.removeprefix(b" ")  # the space that SentencePiece begins with
            self._add(entries, token_id, position, width)
        self._num_characters = len(text)
        return entries

    def output(self, positions: Iterable[PositionLogprobs]) -> dict[str, list[Any]]:
        """The entries of new tokens."""
        entries = _empty()
        for position in positions:
            special = position.token_id in self._tokenizer.special_ids
            width = b"" if special else self._tokenizer.token_bytes(position.token_id)
            self._add(entries, position.token_id, position, width)
        return entries

    def _add(
        self,
        entries: dict[str, list[Any]],
        token_id: int,
        position: PositionLogprobs | None,
        width: bytes,
    ) -> None:
        inside = bool(width) and _continues(width[0])
        entries["tokens"].append(self._name(token_id))
        entries["text_offset"].append(max(0, self._num_characters - inside))
        entries["token_logprobs"].append(None if position is None else _finite(position.logprob))
        entries["top_logprobs"].append(None if position is None else self._top(position))
        self._num_characters += sum(not _continues(byte) for byte in width)

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that is there, by their text."""
        top: dict[str, float] = {}
        for token_id, logprob in (*position.top, (position.token_id, position.logprob)):
            top.setdefault(self._name(token_id), _finite(logprob))
        return top

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if REPLACEMENT not in text:
            return text
        token = self._tokenizer.token_bytes(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def joined(*pieces: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Consecutive entries as one."""
    return {name: [entry for piece in pieces for entry in piece[name]] for name in _empty()}


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character."""
    return byte & 0xC0 == 0x80


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
