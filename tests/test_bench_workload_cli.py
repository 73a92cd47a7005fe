"""`stallfree bench workload` and the flags of a workload."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from stallfree.bench.workload import Workload
from stallfree.bench.workload_file import load_workload, save_workload
from stallfree.cli.app import app
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.errors import ConfigError


def run(*arguments: str) -> Result:
    environment = {"COLUMNS": "120"}
    return CliRunner().invoke(app, ["bench", "workload", *arguments], env=environment)


def test_the_table_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    flags = ("--workload", "fixed:1000,20", "--arrivals", "fixed", "--qps", "4")
    finished = run(*flags, "--num-requests", "5", "--workload-seed", "3", "--save", str(path))
    assert finished.exit_code == 0, finished.output
    assert "5 requests of fixed:1000,20, fixed arrivals at 4/s, seed 3" in finished.output
    assert "5 requests in 1.0 s: 4 a second" in finished.output
    rows = [line.split() for line in finished.output.splitlines()]
    assert ["prompt", *["1,000"] * 5, "0", "5,000"] in rows
    assert ["both", *["1,020"] * 5, "0", "5,100"] in rows
    made = WorkloadSettings(
        lengths="fixed:1000,20", arrivals="fixed", qps=4.0, num_requests=5, workload_seed=3
    ).workload()
    assert load_workload(path) == made
    again = run("--replay", str(path))
    assert again.output == finished.output


def test_settings_come_from_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("workload: fixed:7,3\nnum-requests: 2\nclients: 1\n", encoding="utf-8")
    finished = run("--config", str(config))
    assert "2 requests from 1 client in a closed loop" in finished.output
    assert "1 request " in run("--config", str(config), "--num-requests", "1").output


def test_a_single_request_has_no_rate() -> None:
    assert "1 request at once" in run("--num-requests", "1").output


def test_help_explains_the_forms() -> None:
    text = " ".join(run("--help").output.replace("│", " ").split())
    for words in ("uniform:LOW-HIGH,LOW-HIGH", "gamma:BURSTINESS", "RATE", "--replay", "--save"):
        assert words in text


def test_it_is_scaled_to_the_context_of_a_model() -> None:
    settings = WorkloadSettings(lengths="fixed:3000,1000", num_requests=1)
    assert settings.workload().arrivals[0].prompt_tokens == 3000
    assert settings.workload(2000).arrivals[0].prompt_tokens == 1500
    both = WorkloadSettings(lengths="fixed:3000,1000", num_requests=1, max_total_tokens=400)
    assert both.workload(2000).arrivals[0].prompt_tokens == 300
    assert both.workload(200).arrivals[0].prompt_tokens == 150


def saved(folder: Path, workload: Workload) -> Path:
    save_workload(workload, folder / "w.jsonl")
    return folder / "w.jsonl"


def test_a_replay_at_another_rate_or_by_clients(tmp_path: Path) -> None:
    original = WorkloadSettings(num_requests=20).workload()
    path = saved(tmp_path, original)
    assert WorkloadSettings(replay=path).workload() == original
    at_rate = WorkloadSettings(replay=path, qps=7.0).workload()
    assert at_rate.arrivals == original.at_rate(7.0).arrivals
    assert at_rate.about == f"{original.about}, replayed at 7/s"
    by_clients = WorkloadSettings(replay=path, clients=3).workload()
    assert (by_clients.clients, by_clients.arrivals) == (3, original.arrivals)
    at_rate = WorkloadSettings(replay=saved(tmp_path, by_clients), qps=7.0).workload()
    assert (at_rate.clients, at_rate.arrivals) == (None, original.at_rate(7.0).arrivals)


def test_a_replay_must_fit_the_context(tmp_path: Path) -> None:
    path = saved(tmp_path, WorkloadSettings(lengths="fixed:30,10", num_requests=1).workload())
    assert WorkloadSettings(replay=path).workload(40).arrivals[0].prompt_tokens == 30
    with pytest.raises(ConfigError, match=r"a request of 40 tokens in total, but .* holds 39"):
        WorkloadSettings(replay=path).workload(39)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "fixed:1"], "workload is 'fixed:1'; write it as fixed:PROMPT,OUTPUT"),
        (["--arrivals", "now"], "arrivals is 'now'; it must be one of"),
        (["--qps", "0"], "qps is 0.0; it must be at least"),
        (["--qps", "nan"], "qps is nan; it must be finite"),
        (["--num-requests", "0"], "num_requests is 0; it must be at least 1"),
        (["--max-total-tokens", "1"], "max_total_tokens is 1; it must be at least 2"),
        (["--prefixes", "8"], "prefixes is '8'; write it as COUNT,TOKENS: 8,500"),
        (["--prefixes", "0,5"], "prefixes is 0; it must be at least 1"),
        (["--prefixes", "2,500", "--max-total-tokens", "400"], "leave no room for a prompt"),
        (["--replay", "w", "--prefixes", "1,1"], "prefixes is '1,1'; it cannot be set"),
        (["--clients", "0"], "clients is 0; it must be at least 1"),
        (["--clients", "2", "--qps", "3"], "clients is 2 and qps is 3; in a closed loop"),
        (["--clients", "2", "--arrivals", "fixed"], "arrivals is 'fixed'; a closed loop"),
        (["--replay", "w", "--workload", "fixed:1,1"], "workload is 'fixed:1,1'; it cannot be set"),
        (["--replay", "w", "--num-requests", "3"], "num_requests is 3; it cannot be set"),
        (["--replay", "none.jsonl"], "none.jsonl cannot be read"),
        (["--arrivals", "trace"], "arrivals is 'trace', but workload is 'openchat_sharegpt4'"),
        (["--save", "none/w.jsonl"], "none/w.jsonl cannot be written"),
    ],
)
def test_wrong_values_are_named(arguments: list[str], message: str) -> None:
    finished = run(*arguments)
    assert isinstance(finished.exception, ConfigError)
    assert message in str(finished.exception)
    assert not finished.output
