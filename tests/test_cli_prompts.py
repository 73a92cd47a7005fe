"""Prompts of `stallfree generate`: arguments, JSONL, standard input, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stallfree.cli.prompts import PromptLine, from_file, from_stream, from_texts
from stallfree.core.sampling_params import SamplingParams
from stallfree.errors import ConfigError

FLAGS: dict[str, Any] = {"max_tokens": 8}
PARAMS = SamplingParams(max_tokens=8)


def write(folder: Path, text: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_texts() -> None:
    assert from_texts(["a", "b c"], FLAGS) == [
        PromptLine(0, PARAMS, prompt="a"),
        PromptLine(1, PARAMS, prompt="b c"),
    ]


def test_jsonl_with_prompts_messages_ids_and_sampling(tmp_path: Path) -> None:
    text = (
        '{"prompt": "a\\u2028b"}\n\n'
        '{"id": "x", "prompt": [1, 2], "temperature": 0, "stop": "end"}\r\n'
        '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": null,'
        ' "logit_bias": {"12": -1}}\n'
    )
    assert from_file(write(tmp_path, text), FLAGS) == [
        PromptLine(0, PARAMS, prompt="a\u2028b"),
        PromptLine("x", SamplingParams(max_tokens=8, temperature=0, stop=("end",)), prompt=(1, 2)),
        PromptLine(
            2,
            SamplingParams(max_tokens=None, logit_bias={12: -1}),
            messages=({"role": "user", "content": "hi"},),
        ),
    ]


def test_standard_input_is_one_prompt_a_line() -> None:
    lines = from_stream("first one\r\n\n  indented\n[1, 2]\n", FLAGS)
    assert [line.prompt for line in lines] == ["first one", "  indented", "[1, 2]"]


def test_standard_input_may_be_jsonl() -> None:
    lines = from_stream('\n{"prompt": "a"}\n{"prompt": "b"}\n', FLAGS)
    assert [line.prompt for line in lines] == ["a", "b"]


def test_standard_input_is_text_if_its_first_line_is_no_object() -> None:
    lines = from_stream("{not json}\nb\n", FLAGS)
    assert [line.prompt for line in lines] == ["{not json}", "b"]


def test_nothing_is_no_prompt() -> None:
    assert from_stream("\n \n", FLAGS) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object with `prompt` or `messages`"),
        ("{}", "must hold either `prompt` or `messages`"),
        ('{"prompt": "a", "messages": []}', "must hold either `prompt` or `messages`"),
        ('{"prompt": ""}', "prompt must be text or token ids, and not empty"),
        ('{"prompt": []}', "prompt must be text or token ids"),
        ('{"prompt": [1, true]}', "prompt must be text or token ids"),
        ('{"prompt": {"a": 1}}', "prompt must be text or token ids"),
        ('{"messages": []}', "messages must be objects with a role"),
        ('{"messages": ["hi"]}', "messages must be objects with a role"),
        ('{"messages": [{"content": "hi"}]}', "messages must be objects with a role"),
        ('{"prompt": "a", "max_token": 1}', "did you mean 'max_tokens'?"),
        ('{"prompt": "a", "max_tokens": "many"}', "max_tokens is 'many'"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0; it must be at least 1"),
        ('{"prompt": "a", "temperature": NaN}', "temperature is nan"),
        ('{"prompt": "a", "stop": [1]}', "stop.0 is 1"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(write(tmp_path, '{"prompt": "good"}\n' + line + "\n"), FLAGS)
    assert "prompts.jsonl, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ConfigError, match="the flags: top_p is 2"):
        from_texts(["a"], {"top_p": 2.0})


def test_an_empty_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        from_texts(["a", ""], FLAGS)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        from_file(tmp_path / "none.jsonl", FLAGS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        from_file(tmp_path / "binary", FLAGS)
