"""Reading the prompts of `generate`: from arguments, a JSONL file or standard input.

Each prompt comes with the sampling parameters of its line. Everything is checked before a model is
loaded; only the length of a prompt needs the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stallfree.cli.config_file import suggestion
from stallfree.core.sampling_params import SamplingParams
from stallfree.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_CONTENT = ("prompt", "messages")
_NAMES = (*_CONTENT, "id", *(item.name for item in fields(SamplingParams)))


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt and how to answer it.

    Attributes:
        id: what the line called itself, else its number from 0; given back with the answer.
        params: how to sample.
        prompt: a text or token ids, unless there are messages.
        messages: a chat, unless there is a prompt.
    """

    id: object
    params: SamplingParams
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


def from_texts(texts: Iterable[str], sampling: Mapping[str, Any]) -> list[PromptLine]:
    """Prompts that are plain texts, all sampled alike.

    Raises:
        ConfigError: a sampling parameter is out of range, or a prompt is empty.
    """
    params = _sampling_params(sampling, "the flags")
    lines = []
    for number, text in enumerate(texts):
        if not text:
            raise ConfigError(f"prompt {number} is empty")
        lines.append(PromptLine(number, params, prompt=text))
    return lines


def from_file(path: Path, sampling: Mapping[str, Any]) -> list[PromptLine]:
    """Prompts of a JSONL file.

    Raises:
        ConfigError: the file cannot be read or a line of it is wrong; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    return _from_jsonl(text.split("\n"), sampling, str(path))


def from_stream(text: str, sampling: Mapping[str, Any]) -> list[PromptLine]:
    """Prompts of standard input: JSONL if its first line is an object, else one prompt a line.

    Raises:
        ConfigError: a line is wrong; names it.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and _is_object(lines[0]):
        return _from_jsonl(text.split("\n"), sampling, "standard input")
    return from_texts((line.rstrip("\r") for line in lines), sampling)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _from_jsonl(lines: Sequence[str], sampling: Mapping[str, Any], name: str) -> list[PromptLine]:
    prompts: list[PromptLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            fields_of_line = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields_of_line, dict):
            raise ConfigError(f"{where} must be an object with `prompt` or `messages`")
        prompts.append(_read_line(fields_of_line, sampling, where, len(prompts)))
    return prompts


def _read_line(
    line: dict[str, Any], sampling: Mapping[str, Any], where: str, number: int
) -> PromptLine:
    for name in line:
        if name not in _NAMES:
            raise ConfigError(
                f"{where}: {name!r} is no field of a prompt{suggestion(name, _NAMES)}"
            )
    if ("prompt" in line) == ("messages" in line):
        raise ConfigError(f"{where} must hold either `prompt` or `messages`")
    own = {name: value for name, value in line.items() if name not in (*_CONTENT, "id")}
    params = _sampling_params({**sampling, **own}, where)
    label = line.get("id", number)
    if "messages" in line:
        return PromptLine(label, params, messages=_messages(line["messages"], where))
    return PromptLine(label, params, prompt=_prompt(line["prompt"], where))


def _prompt(content: object, where: str) -> str | tuple[int, ...]:
    if isinstance(content, str) and content:
        return content
    if isinstance(content, list) and content and all(type(item) is int for item in content):
        return tuple(content)
    raise ConfigError(f"{where}: prompt must be text or token ids, and not empty")


def _messages(content: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(content, list) and content and all(_is_message(item) for item in content):
        return tuple(content)
    raise ConfigError(f"{where}: messages must be objects with a role, and at least one")


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str)


def _sampling_params(values: Mapping[str, Any], where: str) -> SamplingParams:
    from pydantic import ValidationError

    if isinstance(values.get("stop"), str):
        values = {**values, "stop": (values["stop"],)}
    try:
        return _sampling_adapter().validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].replace("Input should", "it must")
        raise ConfigError(f"{where}: {name} is {first['input']!r}; {reason}") from error
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from error


@cache
def _sampling_adapter() -> TypeAdapter[SamplingParams]:
    from pydantic import TypeAdapter

    return TypeAdapter(SamplingParams)
