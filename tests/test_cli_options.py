"""Flags generated from settings, and the configuration file: who wins, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stallfree.cli.options import with_settings
from stallfree.cli.sampling import SamplingSettings
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.errors import ConfigError


class Command:
    """A command that keeps what it was called with."""

    def __init__(self) -> None:
        self.called_with: dict[str, Any] = {}
        self.app = typer.Typer()

        @self.app.command()
        @with_settings
        def run(
            engine: EngineSettings,
            server: ServerSettings,
            sampling: SamplingSettings,
            words: list[str] | None = None,
        ) -> None:
            """Do it."""
            self.called_with = {
                "engine": engine,
                "server": server,
                "sampling": sampling,
                "words": words,
            }

    def __call__(self, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        CliRunner().invoke(self.app, arguments, env=env, catch_exceptions=False)
        return self.called_with


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.delenv("STALLFREE_API_KEY", raising=False)
    return Command()


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_flags_all_is_default(command: Command) -> None:
    assert command() == {
        "engine": EngineSettings(),
        "server": ServerSettings(),
        "sampling": SamplingSettings(),
        "words": None,
    }


def test_flags_set_fields(command: Command) -> None:
    flags = ("--kv-cache-memory", "2GiB", "--drain-timeout", "5", "--stop", "a", "--stop", "b")
    called = command("some/model", *flags, "--words", "x", "--ignore-eos")
    assert called["engine"] == EngineSettings(model="some/model", kv_cache_memory_bytes=2 * 1024**3)
    assert called["server"] == ServerSettings(drain_timeout_s=5)
    assert called["sampling"] == SamplingSettings(stop=("a", "b"), ignore_eos=True)
    assert called["words"] == ["x"]


def test_only_what_was_given_is_given() -> None:
    assert SamplingSettings(top_k=3, temperature=0.0).given() == {"top_k": 3, "temperature": 0.0}


def test_the_file_has_the_names_of_the_flags(command: Command, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    text = f"""
        model: some/model
        token-budget: 64
        max_num_seqs: 4
        kv_cache_memory: 1GiB
        chat-template: {template}
        drain-timeout: 1
        stop: [a, b]
        revision:
    """
    called = command("--config", write(tmp_path, text))
    assert called["engine"] == EngineSettings(
        model="some/model", token_budget=64, max_num_seqs=4, kv_cache_memory_bytes=1024**3
    )
    assert called["server"] == ServerSettings(chat_template=template, drain_timeout_s=1)
    assert called["sampling"] == SamplingSettings(stop=("a", "b"))


def test_flag_wins_over_environment_over_file_over_default(
    command: Command, tmp_path: Path
) -> None:
    config = write(tmp_path, "api_key: file\nport: 1\nhost: file\nblock_size: 8")
    env = {"STALLFREE_API_KEY": "environment"}
    called = command("--config", config, "--port", "8000", env=env)
    assert called["server"] == ServerSettings(host="file", port=8000, api_key="environment")
    assert called["engine"].block_size == 8
    called = command("--config", config, "--api-key", "flag", env=env)
    assert called["server"].api_key == "flag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token_buget: 1", "'token_buget' is no setting; did you mean 'token_budget'?"),
        ("12: 1", ": 12 is no setting"),
        ("block_size: sixteen", "block_size is 'sixteen'; it must be a whole number"),
        ("block_size: '16'", "block_size is '16'; it must be a whole number"),
        ("block_size: yes", "block_size is True; it must be a whole number"),
        ("block_size:", "block_size is None; it must be a whole number"),
        ("scheduler: [vllm]", "scheduler is ('vllm',); it must be text"),
        ("stop: [1]", "stop is (1,); it must be a list of texts"),
        ("ignore_eos: 1", "ignore_eos is 1; it must be true or false"),
        ("kv-cache-memory: much", "kv_cache_memory: 'much' is not an amount of memory"),
        ("api_key: 12345", "api_key is of the wrong type; it must be text"),
        ("max-model-len: 4\nmax_model_len: 8", "'max_model_len' is there twice"),
        ("- a\n- b", "must hold `name: value` lines, not list"),
        ("a: [", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(command: Command, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command("--config", write(tmp_path, text))
    assert message in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_a_value_out_of_range_in_the_file_is_refused(command: Command, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block_size is 0; it must be at least 1"):
        command("--config", write(tmp_path, "block_size: 0"))


def test_an_empty_file_changes_nothing(command: Command, tmp_path: Path) -> None:
    assert command("--config", write(tmp_path, "# nothing\n"))["engine"] == EngineSettings()


def test_a_missing_or_binary_file_is_refused(command: Command, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        command("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        command("--config", str(tmp_path / "binary.yaml"))
