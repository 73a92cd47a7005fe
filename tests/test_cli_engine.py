"""`generate`, `chat` and `serve` with a real, tiny engine, and how each ends when interrupted."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_model
from typer.testing import CliRunner

from stallfree.cli.app import app
from stallfree.cli.chat import UNPRINTED
from stallfree.cli.chat_partners import LocalPartner, RemotePartner
from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.llm import LLM
from stallfree.errors import InvalidRequestError

COMMAND = [sys.executable, "-m", "stallfree.cli"]
KEY = "a-secret"
TIMEOUT_S = 60.0
HELLO = [{"role": "user", "content": "hello"}]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-qwen2")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), threads=1)


def generate(model: Path, *arguments: str, stdin: str | None = None) -> list[dict[str, Any]]:
    command = ["generate", str(model), "--threads", "1", "--temperature", "0", *arguments]
    result = CliRunner().invoke(app, command, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_generate_answers_arguments_in_order(model: Path, llm: LLM) -> None:
    answers = generate(model, "hello", "alpha beta", "--max-tokens", "6", "--ignore-eos")
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    expected = llm.generate(["hello", "alpha beta"], params, use_progress_bar=False)
    assert [answer["prompt"] for answer in answers] == ["hello", "alpha beta"]
    assert [answer["id"] for answer in answers] == [0, 1]
    assert [answer["outputs"][0]["text"] for answer in answers] == [
        output.outputs[0].text for output in expected
    ]
    assert answers[0]["outputs"][0]["finish_reason"] == "length"
    assert answers[0]["usage"] == {
        "prompt_tokens": len(expected[0].prompt_token_ids),
        "completion_tokens": 6,
    }


def test_generate_reads_jsonl_and_writes_a_file(model: Path, llm: LLM, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"prompt": llm.tokenizer.encode("hello"), "logprobs": 2, "prompt_logprobs": 0},
        {"id": "chat", "messages": HELLO, "n": 2},
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    files = ("--input", str(prompts), "--output", str(answers))
    assert generate(model, *files, "--max-tokens", "3", "--ignore-eos") == []
    ids, chat = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert ids["prompt"] == lines[0]["prompt"]
    assert [len(position["top"]) for position in ids["outputs"][0]["logprobs"]] == [2, 2, 2]
    assert ids["prompt_logprobs"][0] is None
    assert len(ids["prompt_logprobs"]) == len(ids["prompt"])
    assert chat["id"] == "chat"
    assert chat["messages"] == HELLO
    assert [output["index"] for output in chat["outputs"]] == [0, 1]
    assert chat["usage"]["prompt_tokens"] == len(llm.chat_prompt(HELLO))


def test_generate_reads_standard_input(model: Path) -> None:
    answers = generate(model, "--max-tokens", "1", "--no-progress", stdin="one\ntwo\n")
    assert [answer["prompt"] for answer in answers] == ["one", "two"]


def test_the_default_length_fits_the_context(model: Path) -> None:
    (answer,) = generate(model, "hello", "--max-model-len", "16", "--ignore-eos")
    assert sum(answer["usage"].values()) == 16


def test_generate_names_the_prompt_that_is_wrong(model: Path) -> None:
    command = ["generate", str(model), "fine", "x" * 5000]
    finished = subprocess.run(
        [*COMMAND, *command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert finished.returncode == 1
    assert "stallfree: prompt 1: the prompt has 5000 tokens" in finished.stderr
    assert finished.stdout == ""


class Terminal:
    """A command in a terminal of its own; everything it shows is kept."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""
        self._seen = 0  # what `wait_for` has looked at

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self, until: str) -> None:
        """Send SIGINT, again if nothing happens: one just before readline waits is lost."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.shown.find(until, self._seen) < 0:
            assert time.monotonic() < deadline, f"{until!r} was not shown after {self.shown!r}"
            self.process.send_signal(signal.SIGINT)
            while self._read(timeout_s=1.0) and self.shown.find(until, self._seen) < 0:
                pass
        self.wait_for(until)

    def wait_for(self, text: str) -> None:
        """Read until `text` is shown after what was waited for before."""
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._read(), f"{text!r} was not shown after {self.shown!r}"
        self._seen = at + len(text)

    def ends_with(self) -> int:
        """The exit code; all that is shown until then is read."""
        while True:
            try:
                assert self._read(), f"it did not end after {self.shown!r}"
            except OSError:  # the other end is closed
                return self.process.wait(TIMEOUT_S)

    def _read(self, timeout_s: float = TIMEOUT_S) -> bool:
        ready, _, _ = select.select([self._ours], [], [], timeout_s)
        if ready:
            self.shown += os.read(self._ours, 4096).decode(errors="replace")
        return bool(ready)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_ctrl_c_ends_generate_with_130(model: Path) -> None:
    arguments = ("generate", str(model), "hello", "--n", "64", "--max-tokens", "2000")
    with terminal(*arguments, "--ignore-eos", "--threads", "1") as shell:
        shell.wait_for("generating")
        shell.process.send_signal(signal.SIGINT)
        assert shell.ends_with() == 130
        assert "Traceback" not in shell.shown


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves_the_chat(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, max_position_embeddings=100_000)  # it talks for minutes
    with terminal("chat", str(model), "--ignore-eos", "--threads", "1") as shell:
        shell.wait_for("> ")
        shell.interrupt(until="(Ctrl-D or /exit leaves)")
        shell.wait_for("> ")  # else the terminal itself shows what is typed, too early
        shell.type("hello\r")
        shell.wait_for("hello\r\n")
        shell.wait_for(" ")  # of the answer
        shell.interrupt(until="(stopped)")
        shell.wait_for("> ")
        shell.type("/reset\r")
        shell.wait_for("(forgotten)")
        shell.wait_for("> ")
        shell.type("\x04")
        assert shell.ends_with() == 0
        assert "Traceback" not in shell.shown


def test_an_interrupted_answer_leaves_the_engine_idle(llm: LLM) -> None:
    partner = LocalPartner(llm, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    pieces = 0
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  (the loop is what is interrupted)
        for _ in partner.reply(HELLO):
            pieces += 1
            if pieces == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert pieces == 3
    assert not llm.engine.has_requests
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Server:
    """`stallfree serve`, ready; `shown` is what it printed by then."""

    def __init__(self, model: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", str(model), "--port", "0", "--threads", "1"],
            env=os.environ | {"STALLFREE_API_KEY": KEY},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.shown = ""
        for line in self.process.stderr:
            self.shown += line
            if "Ctrl-C drains" in line:
                break

    @property
    def url(self) -> str:
        (line,) = [line for line in self.shown.splitlines() if line.split()[:1] == ["URL"]]
        return line.split()[1]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    started = Server(model)
    try:
        yield started
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(TIMEOUT_S) == 0
    finally:
        started.process.kill()
        started.process.wait(TIMEOUT_S)
        assert started.process.stderr is not None
        started.process.stderr.close()


def test_serve_sums_up_what_it_serves(server: Server) -> None:
    for fact in (
        *("serves tiny-qwen2", "Qwen2ForCausalLM", "parameters, int8", "KV cache"),
        *("tokens in blocks of 16", "sarathi, at most 96 tokens an iteration"),
        *("2,048 tokens", "cpu, 1 thread;", f"{server.url.removesuffix('/v1')}/dashboard"),
    ):
        assert fact in server.shown
    assert KEY not in server.shown


def test_the_curl_line_works_when_pasted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STALLFREE_API_KEY", KEY)
    (line,) = [line for line in server.shown.splitlines() if line.startswith("curl ")]
    _, url, *options = shlex.split(os.path.expandvars(line))
    pairs = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in pairs if option == "-H")
    (data,) = [value for option, value in pairs if option == "-d"]
    request = urllib.request.Request(url, data.encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def chat(server: Server, stdin: str, *arguments: str, key: str = KEY) -> tuple[int, str, str]:
    finished = subprocess.run(
        [*COMMAND, "chat", "--url", server.url, "--temperature", "0", *arguments],
        env=os.environ | {"STALLFREE_API_KEY": key},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return finished.returncode, finished.stdout, finished.stderr


def test_chat_with_a_server_says_what_the_engine_says(server: Server, llm: LLM) -> None:
    code, answers, said = chat(server, "hello\n\n/reset\nhello\n/exit\nlost\n", "--max-tokens", "9")
    assert code == 0
    expected = llm.chat(HELLO, SamplingParams(max_tokens=9, temperature=0), use_progress_bar=False)
    text = expected.outputs[0].text.translate(UNPRINTED)
    assert answers == f"{text}\n(forgotten)\n{text}\n"
    assert said.startswith("Chat with tiny-qwen2.")


def test_chat_remembers_and_opens_with_the_system_message(server: Server) -> None:
    _, once, _ = chat(server, "hello\n", "--max-tokens", "9")
    _, twice, _ = chat(server, "hello\nhello\n", "--max-tokens", "9")
    assert twice.startswith(once)
    assert twice != once + once
    _, instructed, _ = chat(server, "hello\n", "--max-tokens", "9", "--system", "Be brief.")
    assert instructed != once


def test_chat_survives_a_refused_message(server: Server) -> None:
    code, answers, said = chat(server, "x" * 3000 + "\nhello\n", "--max-tokens", "5")
    assert code == 0
    assert "stallfree: " in said
    assert "(HTTP 400)" in said
    assert answers.endswith("\n")


def test_a_wrong_key_is_one_line_and_code_1(server: Server) -> None:
    code, _, said = chat(server, "hello\n", key="wrong")
    assert code == 1
    said, hint = said.split(": give ")
    assert said == "stallfree: the API key is wrong (HTTP 401)"
    assert hint == "--api-key, or set STALLFREE_API_KEY\n"


def test_an_unknown_model_is_refused(server: Server) -> None:
    partner = RemotePartner(server.url, "no-such-model", KEY, {})
    with pytest.raises(InvalidRequestError, match="no-such-model"):
        list(partner.reply(HELLO))
