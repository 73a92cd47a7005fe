"""Chat templates that never end or fill the memory: they are ended, and the next one runs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_fixtures import MODEL, serve, tiny_engine, wait_until
from tiny import CHAT_TEMPLATE

from stallfree.engine import template_process
from stallfree.engine.chat_template import render_template
from stallfree.engine.template_process import TemplateProcess
from stallfree.errors import EngineStoppedError, InvalidRequestError

VARIABLES = {
    "messages": [{"role": "user", "content": "Grüße, \ud83d 🙂\n<b>"}],
    "add_generation_prompt": True,
    "tools": None,
}
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MACRO = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"


def _doubling(first: str, following: str) -> str:
    rounds = f"{{% for i in range(50) %}}{{% set n.x = {following} %}}{{% endfor %}}"
    return f"{{% set n = namespace(x={first}) %}}{rounds}"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    templates = TemplateProcess(timeout_s=2.0)
    yield templates
    templates.close()


def assert_alive(process: TemplateProcess) -> None:
    assert process.render(CHAT_TEMPLATE, VARIABLES) == render_template(CHAT_TEMPLATE, VARIABLES)


def test_renders_what_is_rendered_here(process: TemplateProcess) -> None:
    assert_alive(process)
    large = {**VARIABLES, "messages": [{"role": "user", "content": "é\n" * 500_000}]}
    assert process.render(CHAT_TEMPLATE, large) == render_template(CHAT_TEMPLATE, large)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such luck') }}", "refuses these messages: no such luck"),
        ("{% for m in messages %}", "broken at line 1"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ 'x' * 1000000000000 }}", "repeats"),
    ],
)
def test_fails_as_it_does_here(process: TemplateProcess, template: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        process.render(template, VARIABLES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        MACRO,
        _doubling("3", "n.x * n.x"),  # within single calls of C
    ],
    ids=["loops", "recursion", "squares"],
)
def test_a_template_that_takes_too_long(process: TemplateProcess, template: str) -> None:
    with pytest.raises(InvalidRequestError, match="took over 2 s") as caught:
        process.render(template, VARIABLES)
    assert caught.value.param == "messages"
    assert_alive(process)


@pytest.mark.parametrize(
    "template",
    [
        _doubling("'x'", "n.x ~ n.x"),
        _doubling("[1]", "[n.x, n.x]") + "{{ n.x }}",
        _doubling("[1]", "n.x + n.x"),
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x'.center(9999999999) }}",
        "{{ ('x' * 9999999).replace('x', 'y' * 9999999) }}",
    ],
    ids=["strings", "nested", "lists", "width", "method", "replace"],
)
def test_a_template_that_takes_too_much(process: TemplateProcess, template: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"MemoryError|too much|took over") as caught:
        process.render(template, VARIABLES)
    assert caught.value.param == "messages"
    assert_alive(process)


def test_the_process_is_made_anew(process: TemplateProcess) -> None:
    assert_alive(process)
    running = process._process
    assert running is not None
    running.kill()
    running.wait()
    assert_alive(process)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_it_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STALLFREE_API_KEY", "a-very-secret-key")
    process = TemplateProcess()
    process.start()
    running = process._process
    assert running is not None
    environment = Path(f"/proc/{running.pid}/environ").read_bytes()
    process.close()
    assert b"a-very-secret-key" not in environment


def test_closing_ends_what_runs() -> None:
    process = TemplateProcess()
    errors: list[Exception] = []

    def render() -> None:
        try:
            process.render(NESTED, VARIABLES)
        except InvalidRequestError as error:
            errors.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    wait_until(lambda: process._process is not None)
    time.sleep(0.1)
    process.close()
    thread.join(timeout=2.0)
    assert errors
    with pytest.raises(EngineStoppedError):
        process.render(CHAT_TEMPLATE, VARIABLES)


def test_it_ends_itself_if_the_server_is_gone() -> None:
    """The system ends it after so much time of a CPU, whoever waits for it or not."""
    read, write = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-m", template_process.__name__],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)],
    )
    os.close(read)
    os.write(write, template_process._line({"template": NESTED, "variables": {}, "cpu_s": 1}))
    os.close(write)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)


def test_a_server_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% if messages[0].content == 'loop' %}" + NESTED + "{% endif %}fine")
    monkeypatch.setattr(TemplateProcess.__init__, "__defaults__", (1.0,))
    with serve(tiny_engine(tmp_path), chat_template=template) as server:

        def chat(content: str) -> tuple[int, str]:
            messages = [{"role": "user", "content": content}]
            body = {"model": MODEL, "messages": messages, "max_tokens": 2}
            answer = server.post("/v1/chat/completions", body)
            return answer.status_code, answer.text

        answers: list[tuple[int, str]] = []
        endless = threading.Thread(target=lambda: answers.append(chat("loop")))
        endless.start()
        num_others = 0
        while endless.is_alive():
            answer = server.post("/v1/completions", {"model": MODEL, "prompt": "hi"})
            assert answer.status_code == 200
            num_others += 1
        assert num_others > 1
        ((status, text),) = answers
        assert status == 400
        assert "took over 1 s" in text
        assert chat("hi")[0] == 200
