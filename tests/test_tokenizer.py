"""Tokenizers: text, ids and bytes, and what a model folder or the demo model says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import MESSAGES, TEXTS, byte_level_tokenizer, load, save_tokenizer
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.errors import InvalidRequestError, TokenizerError
from stallfree.model.demo import assemble
from stallfree.model.source import open_model


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "model")


@given(text=st.text())
def test_byte_level_tokens_add_up_to_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    assert byte_level.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(byte_level: Tokenizer) -> None:
    tokens = {byte_level.token_bytes(i) for i in range(byte_level.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= tokens


def test_special_tokens(byte_level: Tokenizer) -> None:
    text = "<|im_start|>hi<|im_end|>"
    ids = byte_level.encode(text)
    assert {ids[0], ids[-1]} <= byte_level.special_ids
    assert byte_level.decode(ids) == "hi"
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert byte_level.token_text(ids[0]) == "<|im_start|>"


def test_parts_of_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🙃")
    assert len(ids) > 1
    assert byte_level.token_text(ids[0]) == "\ufffd"
    assert b"".join(map(byte_level.token_bytes, ids)).decode() == "🙃"


def test_ids_that_are_not_known(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.token_text(10**6) == ""
    assert byte_level.decode([10**6]) == ""


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("a\ud800b")


def test_ids_of_added_tokens_may_leave_gaps() -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "c": 9}, merges=[]))
    backend.add_special_tokens([AddedToken("c", special=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 10
    assert tokenizer.special_ids == {9}
    assert tokenizer.token_bytes(5) == b""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)


def test_a_tokenizer_with_a_metaspace_decoder() -> None:
    backend = Backend(models.BPE(vocab={"▁a": 0, "b": 1, "<0x41>": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_bytes(i) for i in range(3)] == [b" a", b"b", b"<0x41>"]


def test_a_tokenizer_without_a_decoder() -> None:
    tokenizer = Tokenizer(Backend(models.BPE(vocab={"▁é": 0}, merges=[])))
    assert tokenizer.token_bytes(0) == "▁é".encode()


def test_from_a_folder(folder: Path) -> None:
    tokenizer, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer.eos_token_id == theirs.eos_token_id
    assert tokenizer.vocab_size == len(theirs)


def _set(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 }}",
        [{"name": "other", "template": "2"}, {"name": "default", "template": "{{ 1 }}"}],
    ],
)
def test_the_chat_template_of_a_folder(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _set(folder / "tokenizer_config.json", chat_template=template)
    assert load(folder).render_chat(MESSAGES) == "1"
    (folder / "chat_template.jinja").write_text("{{ 3 }}")
    assert load(folder).render_chat(MESSAGES) == "3"


def test_truncation_and_padding_are_off(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode("hello world, hello")) == "hello world, hello"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer: none of tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load(folder)


def test_a_tokenizer_of_nothing(folder: Path) -> None:
    Backend(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match="no tokens"):
        load(folder)


def test_code_that_comes_with_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    _set(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "bomb.BombTokenizer"]},
        tokenizer_class="BombTokenizer",
    )
    (folder / "bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    assert load(folder).encode("hello")  # with the class that the kind of model has
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.model
def test_the_tokenizer_of_the_demo_model() -> None:
    tokenizer = load_tokenizer(open_model(None))
    assert tokenizer.vocab_size == 151_936
    assert tokenizer.eos_token_id == 151_645
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    prompt = tokenizer.render_chat(MESSAGES)
    assert prompt == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[0] == 151_644
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_encodes_as_in_transformers() -> None:
    path = assemble()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = load_tokenizer(open_model(None))
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        assert tokenizer.render_chat(messages) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
