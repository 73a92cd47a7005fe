"""The settings of logs and traces, and a server process that is given some."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from tiny import save_tiny_model
from typer.testing import CliRunner

from stallfree.cli.options import with_settings
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"log_format": "xml"}, "log_format is 'xml'; it must be one of text, json"),
        ({"log_level": "INFO"}, "log_level is 'INFO'; it must be one of debug, info, warning"),
        ({"log_prompts": 1}, "log_prompts is 1; it must be true or false"),
        ({"otlp_endpoint": "localhost:4318"}, "otlp_endpoint is 'localhost:4318'; it must be a"),
        ({"otlp_endpoint": "http://"}, "otlp_endpoint is 'http://'; it must be a URL"),
        ({"otlp_endpoint": "http://[::1"}, "otlp_endpoint is 'http://[::1'; it must be a URL"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), "http://variable:4318"), (("--otlp-endpoint", "http://flag:1"), "http://flag:1")],
)
def test_the_standard_variable_is_read(arguments: tuple[str, ...], expected: str) -> None:
    called: list[ServerSettings] = []
    app = typer.Typer()

    @app.command()
    @with_settings
    def run(server: ServerSettings) -> None:
        """Do it."""
        called.append(server)

    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://variable:4318"}
    CliRunner().invoke(app, list(arguments), env=variables, catch_exceptions=False)
    assert called[0].otlp_endpoint == expected


def test_a_server_process_logs_as_it_is_told(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "stallfree.cli", "serve", str(model), "--port", "0"]
    command += ["--threads", "1", "--dtype", "float32", "--kv-cache-memory", "4MiB"]
    command += ["--log-format", "json", "--log-prompts"]
    log = tmp_path / "log.txt"
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            body = {"model": "tiny", "prompt": "The quick\nbrown fox", "max_tokens": 3}
            body |= {"ignore_eos": True}
            answer = httpx.post(
                f"{found[0]}/v1/completions",
                json=body,
                headers={"X-Request-Id": "mine"},
                timeout=60,
                trust_env=False,
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    entries = [json.loads(each) for each in log.read_text().splitlines() if each.startswith("{")]
    (line,) = [entry for entry in entries if "request_id" in entry]  # others may be warnings
    assert (line["request_id"], line["status"], line["output_tokens"]) == ("mine", 200, 3)
    assert line["prompts"] == ["The quick\nbrown fox"]
    assert line["outputs"] == [answer.json()["choices"][0]["text"]]
