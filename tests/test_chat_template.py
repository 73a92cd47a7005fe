"""Chat templates: rendered as transformers does, in a sandbox, and refused where they fail."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from tiny_tokenizers import MESSAGES, byte_level_tokenizer, load, save_tokenizer

from stallfree.engine.tokenizer import Tokenizer
from stallfree.errors import InvalidRequestError

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


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "model")


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
    assert load(folder).render_chat(MESSAGES, "{{ messages | length }}") == "1"


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
        ("{{ 10 ** 1000000000 }}", "power"),
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
