"""Tokenizers from folders and GGUF files, their cache, and chat templates."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_level_vocabulary, write_gguf
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from stallfree.engine import tokenizer_files
from stallfree.engine.tokenizer import Tokenizer, load_tokenizer
from stallfree.errors import InvalidRequestError, TokenizerError
from stallfree.model.demo import assemble
from stallfree.model.source import ModelSource, open_model
from stallfree.model.weights import SafetensorsWeights

MESSAGES = [{"role": "user", "content": "hello world"}]
TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces\n\n\ttab ",
    "naïve café, 你好 世界! 🙂👩‍👩‍👧",
    "e\u0301 combining",
    "def f(x):\n    return x * 123456\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|not_a_token|> \u0000 \x7f",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache, save for tests of the demo model, which is large."""
    folder = tmp_path / "cache"
    if "model" not in request.keywords:
        monkeypatch.setenv("STALLFREE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny.train_tokenizer(400).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _source(path: Path) -> ModelSource:
    """A source with weights that these tests never touch."""
    return ModelSource(
        "tiny", path, {}, frozenset(), SafetensorsWeights.__new__(SafetensorsWeights)
    )


def _load(path: Path) -> Tokenizer:
    return load_tokenizer(_source(path))


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


def _gguf(folder: Path, metadata: Mapping[str, Any]) -> Path:
    return write_gguf(folder / "tiny.gguf", extra=metadata)


# Text, ids, bytes


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(tiny.train_tokenizer(400).backend_tokenizer)


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


# GGUF


def test_byte_level_from_gguf(tmp_path: Path) -> None:
    tokenizer = _load(_gguf(tmp_path, byte_level_vocabulary()))
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
    tokenizer = _load(_gguf(tmp_path, _sentencepiece_metadata()))
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
    tokenizer = _load(_gguf(tmp_path, _sentencepiece_metadata(**extra)))
    tokens = _sentencepiece_metadata()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("hello w")
    assert [tokens[i] for i in ids] == ["hello", "▁w"]
    assert tokenizer.decode(ids) == "hello w"
    assert tokenizer.decode(tokenizer.encode(" w")) == " w"


def test_tokens_around_a_text(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": True}
    tokenizer = _load(_gguf(tmp_path, byte_level_vocabulary() | extra))
    ids = tokenizer.encode("h")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|endoftext|>h<|im_end|>"


def test_llama3_takes_whole_words_and_starts_with_bos(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "llama-bpe"}
    tokens = vocabulary["tokenizer.ggml.tokens"]
    tokens[-1] = "hex"  # in the vocabulary, and no merge makes it
    tokens[tokens.index("<|endoftext|>")] = "<|begin_of_text|>"
    del vocabulary["tokenizer.ggml.add_bos_token"]
    tokenizer = _load(_gguf(tmp_path, vocabulary))
    assert [tokens[i] for i in tokenizer.encode("hex")] == ["<|begin_of_text|>", "hex"]
    assert all(token_id < len(tokens) for token_id in tokenizer.encode("<|endoftext|>"))
    assert tokenizer.vocab_size == len(tokens)


def test_every_digit_on_its_own(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "smollm"}
    vocabulary["tokenizer.ggml.merges"].append("1 2")
    vocabulary["tokenizer.ggml.tokens"][-1] = "12"
    assert len(_load(_gguf(tmp_path, vocabulary)).encode("12")) == 2


def test_a_split_that_is_not_known_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _load(_gguf(tmp_path, byte_level_vocabulary() | {"tokenizer.ggml.pre": "martian"}))
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
    path = _gguf(tmp_path, byte_level_vocabulary() | change)
    with pytest.raises(TokenizerError, match=match):
        _load(path)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        _load(write_gguf(tmp_path / "tiny.gguf"))


# Folders


def test_from_a_folder(folder: Path) -> None:
    tokenizer, theirs = _load(folder), AutoTokenizer.from_pretrained(folder)
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
    assert _load(folder).render_chat(MESSAGES) == "1"
    (folder / "chat_template.jinja").write_text("{{ 3 }}")
    assert _load(folder).render_chat(MESSAGES) == "3"


def test_truncation_and_padding_are_off(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = _load(folder)
    assert tokenizer.decode(tokenizer.encode("hello world, hello")) == "hello world, hello"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer: none of tokenizer\.json"):
        _load(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        _load(folder)


def test_a_tokenizer_of_nothing(folder: Path) -> None:
    Backend(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match="no tokens"):
        _load(folder)


def test_code_that_comes_with_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    _set(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "bomb.BombTokenizer"]},
        tokenizer_class="BombTokenizer",
    )
    (folder / "bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    assert _load(folder).encode("hello")  # with the class that the kind of model has
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        _load(folder)
    assert not (tmp_path / "exploded").exists()


# The cache


def _entries(cache: Path) -> list[Path]:
    return list((cache / "tokenizers").iterdir())


def _never(*_: object) -> Any:
    raise AssertionError("must not be called")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_the_second_start_converts_nothing(
    folder: Path, tmp_path: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder if kind == "folder" else _gguf(tmp_path, byte_level_vocabulary())
    first = _load(path)
    assert len(_entries(cache)) == 1
    monkeypatch.setattr(tokenizer_files, "_convert_folder", _never)
    monkeypatch.setattr(tokenizer_files, "convert_gguf", _never)
    second = _load(path)
    for text in TEXTS:
        assert second.encode(text) == first.encode(text)
    assert second.render_chat(MESSAGES) == first.render_chat(MESSAGES)
    assert second.special_ids == first.special_ids
    assert second.eos_token_id == first.eos_token_id


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_change_of_the_model_is_noticed(
    folder: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _load(folder)
    os.utime(folder / name, (1, 1))
    monkeypatch.setattr(tokenizer_files, "_convert_folder", _never)
    with pytest.raises(AssertionError):
        _load(folder)


def test_damaged_entries_are_made_anew(folder: Path, cache: Path) -> None:
    expected = _load(folder).encode("hello world")
    (entry,) = _entries(cache)
    data = entry.read_bytes()
    middle = len(data) // 2
    for damaged in (
        b"",
        b"\n\n",
        data[:5],
        data[:middle],
        data[:middle] + b"\0" + data[middle + 1 :],
        b"00000000" + data[8:],
        data.replace(b"fingerprint", b"fingerprinT"),
    ):
        entry.write_bytes(damaged)
        assert _load(folder).encode("hello world") == expected
        assert entry.read_bytes() == data


def test_a_cache_that_cannot_be_written(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    assert _load(folder).encode("hello")
    assert "not kept" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_old_entries_are_dropped(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "_MAX_ENTRIES", 1)
    _load(folder)
    (old,) = _entries(cache)
    os.utime(old, (1, 1))
    _load(_gguf(tmp_path, byte_level_vocabulary()))
    assert len(_entries(cache)) == 1
    assert not old.exists()


# Chats

TEMPLATES = [
    tiny.CHAT_TEMPLATE,
    "{{ bos_token }}|{{ eos_token }}|{{ no_such_thing }}|{{ messages | tojson }}",
    "{{ tools | tojson(indent=2) if tools else 'none' }}{{ documents is none }}{{ extra }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    """{%- set ns = namespace(n=0) -%}
  {%- for m in messages %}{% set ns.n = ns.n + 1 %}
{% endfor %}
{{ ns.n }}
""",
    """{% for m in messages %}
    {% generation %}
  {{ m.content }}{% set x = 1 %}{{ x }}
    {% endgeneration %}
{% endfor %}""",
    """{% macro m(x) %}[{{ x.content.split(' ')[0] | upper | trim }}]{% endmacro %}
{{ m(messages[0]) }}{{ m(messages[-1]) }}""",
    "{{ dict(a=1).items() | list }}{{ range(3) | list }}{{ messages[0]['role'] ~ '<>&' }}",
    "{{ strftime_now('%Y') | length }}{{ '-' * 3 }}{{ messages[0].content[::-1] }}",
    "{% if not messages[0].tool_calls %}{{ add_generation_prompt }}{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers_does(byte_level: Tokenizer, template: str) -> None:
    theirs = tiny.train_tokenizer(400)
    tokenizer = Tokenizer(theirs.backend_tokenizer, template, theirs.special_tokens_map)
    messages = [{"role": "system", "content": "Be <brief>."}, *MESSAGES]
    tools = [{"type": "function", "function": {"name": "f", "description": 'é "quoted"'}}]
    for variables in ({}, {"tools": tools, "extra": "x"}, {"add_generation_prompt": False}):
        arguments = {"add_generation_prompt": True, **variables}
        expected = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, **arguments
        )
        assert tokenizer.render_chat(messages, **variables) == expected


def test_a_template_of_the_request_comes_first(folder: Path) -> None:
    assert _load(folder).render_chat(MESSAGES, "{{ messages | length }}") == "1"


def test_without_a_template(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        byte_level.render_chat(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}", "broken at line 1"),
        ("\n\n{{ messages[ }}", "broken at line 3"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{% include 'other' %}", "fails"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "template"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses .*: Roles must alternate"),
        ("{{ raise_exception(messages) }}", "refuses"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ no_such_thing | tojson }}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 'x' * 1000000000000 }}", "repeats"),
        ("{{ 1000000000000 * [1] }}", "repeats"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{% for i in range(10000000000) %}x{% endfor %}", "range"),
    ],
)
def test_templates_that_fail(byte_level: Tokenizer, template: str, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        byte_level.render_chat(MESSAGES, template)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ''.format_map({}).__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].clear() }}",
    ],
)
def test_templates_cannot_get_out_of_the_sandbox(byte_level: Tokenizer, template: str) -> None:
    messages = [dict(MESSAGES[0])]
    with suppress(InvalidRequestError):
        assert byte_level.render_chat(messages, template) == ""
    assert messages == MESSAGES


# The demo model


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
