"""The command line as a process: help, exit codes, broken pipes. Nothing here loads a model."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "stallfree.cli"]
HEAVY = {"torch", "transformers", "numpy", "fastapi", "uvicorn", "tokenizers", "huggingface_hub"}


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    program = "import sys, stallfree.cli.app; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert not HEAVY & set(loaded.stdout.split())


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_version(arguments: list[str]) -> None:
    assert run(*arguments).stdout == f"stallfree {version('stallfree')}\n"


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_lists_the_engine_flags_with_units_and_defaults(command: str) -> None:
    finished = run(command, "--help")
    assert finished.returncode == 0
    for flag in (
        *("--scheduler", "--token-budget", "--max-num-seqs", "--max-model-len", "--dtype"),
        *("--kv-cache-memory", "--block-size", "--device", "--threads", "--seed", "--revision"),
        *("--config", "sarathi", "TOKENS", "2GiB"),
    ):
        assert flag in finished.stdout


def test_help_has_defaults_with_their_units() -> None:
    shown = " ".join(run("serve", "--help").stdout.replace("│", " ").split())
    for default in ("[default: 1MiB]", "[default: 30s]", "[default: 1000]"):
        assert default in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--scheduler", "sarthi"], "scheduler is 'sarthi'; it must be one of sarathi"),
        (["serve", "--kv-cache-memory", "much"], "'much' is not an amount of memory"),
        (["serve", "--drain-timeout", "1h"], "'1h' is not a time; write it as 200ms or 0.2s"),
        (["serve", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["serve", "--config", "none.yaml"], "none.yaml cannot be read: No such file"),
        (["generate", "m", "prompt", "--top-p", "2"], "the flags: top_p is 2.0"),
        (["generate", "m", "prompt", "--input", "x.jsonl"], "both as arguments and by --input"),
        (["generate", "m"], "standard input holds no prompt"),
        (["generate", "m", "prompt", "--output", "none/x"], "there is no folder none"),
        (["chat", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["chat", "--url", "http://x", "--block-size", "8"], "--block-size is for an engine in"),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    finished = run(*arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("stallfree: ")
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_an_empty_key_opens_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STALLFREE_API_KEY", "")
    finished = run("serve", "no-such-model", "--port", "0")
    assert finished.returncode == 2
    assert finished.stderr == "stallfree: STALLFREE_API_KEY is empty; unset it to need no key\n"
    finished = run("serve", "no-such-model", "--port", "0", "--api-key", "a-key")
    assert "no-such-model" in finished.stderr


@pytest.mark.parametrize("arguments", [["serve", "--port", "many"], ["serve", "--no-such-flag"]])
def test_a_wrong_flag_is_code_2(arguments: list[str]) -> None:
    finished = run(*arguments)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


def test_a_taken_port_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        finished = run("serve", "no-such-model", "--port", str(port))
    assert finished.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in finished.stderr


def test_a_chat_without_a_server_is_one_line_and_code_1() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening: connections are refused
        finished = run("chat", "--url", f"127.0.0.1:{free.getsockname()[1]}")
    assert finished.returncode == 1
    assert finished.stderr.startswith("stallfree: no server answers at http://127.0.0.1:")
    assert "Traceback" not in finished.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [*COMMAND, "generate", "--help"], stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        process.stdout.close()
        process.wait(60)
        errors.seek(0)
        assert errors.read() == ""
