"""Tokenizers that are built from the vocabularies of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_level_vocabulary, write_gguf
from tiny_tokenizers import MESSAGES, TEXTS, load, save_gguf

from stallfree.errors import TokenizerError


def _sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    """A vocabulary as Llama 2 has it, for GGUF: bytes, pieces with scores, and no merges."""
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "ll", "he", "▁w", "llo", "hello", "▁hello"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *pieces,
            "<|tool|>",
        ],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }


def test_byte_level_from_gguf(tmp_path: Path) -> None:
    tokenizer = load(save_gguf(tmp_path, byte_level_vocabulary()))
    tokens = byte_level_vocabulary()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("hello world<|im_end|>")
    assert [tokens[i] for i in ids] == ["hello", "Ġworld", "<|im_end|>"]
    assert tokenizer.vocab_size == len(tokens)
    assert {tokens[i] for i in tokenizer.special_ids} == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }
    assert tokens[tokenizer.eos_token_id or 0] == "<|im_end|>"
    assert tokens[tokenizer.bos_token_id or 0] == "<|endoftext|>"
    assert tokenizer.render_chat(MESSAGES) == (
        "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_sentencepiece_from_gguf(tmp_path: Path) -> None:
    tokenizer = load(save_gguf(tmp_path, _sentencepiece_metadata()))
    tokens = _sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("hello")] == ["<s>", "▁hello"]
    assert [tokens[i] for i in tokenizer.encode("hello", add_special_tokens=False)] == ["▁hello"]
    assert tokenizer.vocab_size == len(tokens)
    for text in ("hello world", "é 🙂\n", "<|tool|>", "w  hello "):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == (
            text.removeprefix(" ")
        )
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(3 + 0xE9) == b"\xe9"


def test_a_sentencepiece_vocabulary_without_a_space_prefix(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = load(save_gguf(tmp_path, _sentencepiece_metadata(**extra)))
    tokens = _sentencepiece_metadata()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("hello w")
    assert [tokens[i] for i in ids] == ["hello", "▁w"]
    assert tokenizer.decode(ids) == "hello w"
    assert tokenizer.decode(tokenizer.encode(" w")) == " w"


def test_tokens_around_a_text(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": True}
    tokenizer = load(save_gguf(tmp_path, byte_level_vocabulary() | extra))
    ids = tokenizer.encode("h")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|endoftext|>h<|im_end|>"


def test_llama3_takes_whole_words_and_starts_with_bos(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "llama-bpe"}
    tokens = vocabulary["tokenizer.ggml.tokens"]
    tokens[-1] = "hex"  # in the vocabulary, and no merge makes it
    tokens[tokens.index("<|endoftext|>")] = "<|begin_of_text|>"
    del vocabulary["tokenizer.ggml.add_bos_token"]
    tokenizer = load(save_gguf(tmp_path, vocabulary))
    assert [tokens[i] for i in tokenizer.encode("hex")] == ["<|begin_of_text|>", "hex"]
    assert all(token_id < len(tokens) for token_id in tokenizer.encode("<|endoftext|>"))
    assert tokenizer.vocab_size == len(tokens)


def test_every_digit_on_its_own(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "smollm"}
    vocabulary["tokenizer.ggml.merges"].append("1 2")
    vocabulary["tokenizer.ggml.tokens"][-1] = "12"
    assert len(load(save_gguf(tmp_path, vocabulary)).encode("12")) == 2


def test_a_split_that_is_not_known_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(save_gguf(tmp_path, byte_level_vocabulary() | {"tokenizer.ggml.pre": "martian"}))
    assert "'martian'" in caplog.text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer.ggml.model": "martian"}, "martian"),
        ({"tokenizer.ggml.model": 7}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["h"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["x y z"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, "cannot be built"),
        ({"tokenizer.ggml.scores": "none"}, "cannot be built"),
        ({"tokenizer.ggml.token_type": "none"}, "cannot be built"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, of 300 tokens"),
    ],
)
def test_broken_vocabularies(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = save_gguf(tmp_path, byte_level_vocabulary() | change)
    with pytest.raises(TokenizerError, match=match):
        load(path)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load(write_gguf(tmp_path / "tiny.gguf"))
