"""Building a tokenizer from the metadata of a GGUF file.

The `transformers` library does the conversion; here its result is made to say what the file says:
the tokens around a text, the space before it, and no token that the model does not have.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from stallfree.errors import TokenizerError
from stallfree.model.gguf_header import GgufHeader
from stallfree.model.gguf_parser import read_header

_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Ways of splitting text, and what they imply where the file does not say.
_PLAIN_SPLITS = (None, "default", "gpt-2", "gpt2")
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "codeshell")  # each digit on its own
# A word that is in the vocabulary is taken whole, without merges; texts start with bos.
_LLAMA3_SPLITS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")

_log = logging.getLogger(__name__)


def convert_gguf(path: Path) -> tuple[tokenizers.Tokenizer, str | None, dict[str, str]]:
    """The tokenizer of a GGUF file, its chat template, and the texts of special tokens by role.

    Raises:
        TokenizerError: there is no tokenizer, or none that can be built.
        WeightFileError: the file cannot be read.
    """
    header = read_header(path)
    tokens = header.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing")
    special_tokens = {}
    for role, key in _ROLES.items():
        token_id = header.get(key, int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise TokenizerError(f"{path}: {key} is {token_id}, of {len(tokens)} tokens")
        special_tokens[role] = tokens[token_id]
    try:
        state = _adapted(_convert(header, tokens), header, tokens, special_tokens)
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the metadata may be wrong in any way
        raise TokenizerError(
            f"the tokenizer of {path} cannot be built: {type(error).__name__}: {error}"
        ) from error
    return backend, header.get("tokenizer.chat_template", str), special_tokens


def _convert(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    """What `transformers` makes of the metadata, as the JSON of the `tokenizers` library."""
    from transformers.integrations.gguf import convert_gguf_tokenizer  # slow to import

    description: dict[str, Any] = {
        "tokenizer_type": header.get("tokenizer.ggml.model", str),
        "pre_tokenizer_type": header.get("tokenizer.ggml.pre", str),
        "tokens": tokens,
        "token_type": header.integers("tokenizer.ggml.token_type").tolist(),
    }
    scores = header.metadata.get("tokenizer.ggml.scores")
    if scores is not None:
        if not isinstance(scores, np.ndarray):
            raise TypeError("tokenizer.ggml.scores is not an array of numbers")
        description["scores"] = scores.tolist()
    if "tokenizer.ggml.merges" in header.metadata:
        description["merges"] = header.strings("tokenizer.ggml.merges")
    backend, _ = convert_gguf_tokenizer(header.get("general.architecture", str), description)
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _adapted(
    state: dict[str, Any], header: GgufHeader, tokens: list[str], special_tokens: dict[str, str]
) -> dict[str, Any]:
    """The state, with what the conversion leaves out put in, and what it adds taken out."""
    split = header.get("tokenizer.ggml.pre", str)
    is_byte_level = header.get("tokenizer.ggml.model", str) == "gpt2"
    # The classes of the library come with special tokens of their own.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < len(tokens)]
    if is_byte_level and split in _LLAMA3_SPLITS:
        state["model"]["ignore_merges"] = True
    if is_byte_level and split in _DIGIT_SPLITS:
        digits = {"type": "Digits", "individual_digits": True}
        pieces = [digits, state["pre_tokenizer"]]
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pieces}
    elif is_byte_level and split not in _PLAIN_SPLITS and not _splits(state["pre_tokenizer"]):
        _log.warning(
            "%s: how its tokenizer splits text (%r) is not known; it is split as for GPT-2",
            header.path,
            split,
        )
    if header.get("tokenizer.ggml.add_space_prefix", bool) is False:
        _drop_space_prefix(state)
    by_default = not is_byte_level or split in _LLAMA3_SPLITS
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool)
    template = ["$A"]
    if (by_default if add_bos is None else add_bos) and "bos_token" in special_tokens:
        template.insert(0, special_tokens["bos_token"])
    if header.get("tokenizer.ggml.add_eos_token", bool) and "eos_token" in special_tokens:
        template.append(special_tokens["eos_token"])
    state["post_processor"] = _around(template, tokens)
    return state


def _splits(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether text is split by a regular expression of the model."""
    return any(piece["type"] == "Split" for piece in pre_tokenizer.get("pretokenizers", ()))


def _drop_space_prefix(state: dict[str, Any]) -> None:
    if (state["pre_tokenizer"] or {}).get("type") == "Metaspace":
        state["pre_tokenizer"]["prepend_scheme"] = "never"
        steps = state["decoder"]["decoders"]
        state["decoder"]["decoders"] = [step for step in steps if step["type"] != "Strip"]


def _around(template: list[str], tokens: list[str]) -> dict[str, Any]:
    """The post-processor that puts special tokens around a text, `$A` in `template`."""
    pieces: list[dict[str, Any]] = []
    special: dict[str, Any] = {}
    for token in template:
        if token == "$A":
            pieces.append({"Sequence": {"id": "A", "type_id": 0}})
        else:
            pieces.append({"SpecialToken": {"id": token, "type_id": 0}})
            special[token] = {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, second],
        "special_tokens": special,
    }
