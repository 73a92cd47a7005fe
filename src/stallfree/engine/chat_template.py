"""Chat templates: Jinja programs that come with a model and turn messages into a prompt.

They are foreign code, so they run in Jinja's sandbox and what they write is bounded. The names
they see are those that the `transformers` library gives them. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stallfree.errors import InvalidRequestError, TokenizerError

MAX_PROMPT_CHARACTERS = 1 << 24
MAX_POWER_BITS = 1 << 14


def compile_template(template: str) -> Template:
    """Check and compile a template.

    Raises:
        TokenizerError: its syntax is wrong.
    """
    try:
        return _compile(template)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"the chat template is broken at line {error.lineno}: {error.message}"
        ) from None
    except (TemplateError, RecursionError, ValueError) as error:
        raise TokenizerError(f"the chat template is broken: {error}") from None


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """Run a template.

    Raises:
        InvalidRequestError: the template is broken, refuses the messages, fails on them, does
            something that the sandbox forbids, or writes over `MAX_PROMPT_CHARACTERS`.
    """
    pieces: list[str] = []
    size = 0
    try:
        for piece in compile_template(template).generate(variables):
            size += len(piece)
            if size > MAX_PROMPT_CHARACTERS:
                raise SecurityError(
                    f"it writes more than the {MAX_PROMPT_CHARACTERS:,} characters allowed"
                )
            pieces.append(piece)
    except _RefusedError as error:
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {error.message}", "messages"
        ) from None
    except TokenizerError as error:
        raise InvalidRequestError(str(error), "messages") from None
    except Exception as error:  # it is a program: anything may go wrong in it
        raise InvalidRequestError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}",
            "messages",
        ) from None
    return "".join(pieces)


class _RefusedError(TemplateError):
    """A template called `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}`, which marks what the assistant said, for training; it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds repetitions of a sequence, and powers.

    Jinja computes what is constant when it compiles, but for the operators that are watched here.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            return _power(left, right)
        for sequence, times in ((left, right), (right, left)):
            if (
                isinstance(sequence, str | list | tuple)
                and isinstance(times, int)
                and len(sequence) * times > MAX_PROMPT_CHARACTERS
            ):
                raise SecurityError(f"it repeats a sequence {times:,} times")
        return super().call_binop(context, operator, left, right)


def _power(left: Any, right: Any) -> Any:
    both_whole = isinstance(left, int) and isinstance(right, int)
    if both_whole and left.bit_length() * right > MAX_POWER_BITS:
        raise SecurityError(f"it computes a power of more than {MAX_POWER_BITS:,} bits")
    return left**right


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a prompt, where Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
