"""What a simulated run depends on, how it ends, and what is printed as it was typed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from stallfree.bench.capacity import Criterion
from stallfree.bench.files import read_json
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.workload import Arrival, Workload
from stallfree.bench.workload_file import save_workload
from stallfree.cli.app import app
from stallfree.cli.bench_serve import print_report
from stallfree.cli.simulated_system import SimulatedSystem
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.core.step_time import StepTimeModel
from stallfree.engine.profile import Profile
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.errors import ConfigError

MISTRAL = ("--model", "mistral-7b", "--device", "a100-80gb")
LOAD = ("--workload", "fixed:300,8", "--num-requests", "12")


def invoke(*flags: str) -> Result:
    return CliRunner().invoke(app, list(flags))


def write_profile(path: Path) -> Path:
    model = StepTimeModel(0.02, (1, 512), (0.1,), 1e-8, 1e-7, 1e-5, scatter=(0.9, 1.0, 1.1))
    path.write_text(json.dumps(asdict(Profile(model, tile_tokens=8))))
    return path


def facts_of(folder: Path, *flags: str) -> dict[str, object]:
    output = folder / "run.json"
    result = invoke("simulate", *LOAD, *flags, "--output", str(output))
    assert result.exit_code == 0, result.output
    return dict(read_json(output).facts)


def test_a_simulation_that_fails_a_request_says_so_in_its_exit_code() -> None:
    assert invoke("simulate", *MISTRAL, *LOAD).exit_code == 0
    result = invoke("simulate", *MISTRAL, *LOAD, "--kv-cache-tokens", "64")
    assert result.exit_code == 1
    assert "failed: rejected" in result.output


def test_a_simulation_tells_what_it_depends_on(tmp_path: Path) -> None:
    split = ("--tensor-parallel-size", "4", "--no-one-node", "--kv-cache-tokens", "50000")
    scheduling = ("--token-budget", "256", "--prefill-order", "srpf")
    place = ("--replicas", "2", "--router", "round-robin")
    facts = facts_of(tmp_path, *MISTRAL, *split, *scheduling, *place)
    assert facts.pop("system") != facts_of(tmp_path, *MISTRAL, *split[:2])["system"]
    assert facts == {
        "model": "mistral-7b",
        "device": "a100-80gb",
        "split": "TP4 x PP1",
        "one_node": False,
        "launch_us": 0.0,
        "sequence_us": 0.0,
        "kv_cache_tokens": 50000,
        "max_model_len": 32768,
        "scheduler": "sarathi",
        "token_budget": 256,
        "prefill_order": "srpf",
        "replicas": 2,
        "router": "round-robin",
    }


def test_one_name_is_one_system(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile.json")
    before = facts_of(tmp_path, "--profile", str(profile))
    assert facts_of(tmp_path, "--profile", str(profile)) == before
    profile.write_text(profile.read_text().replace("0.02", "0.03"))
    after = facts_of(tmp_path, "--profile", str(profile))
    assert after.pop("system") != before.pop("system")
    assert after == before


def test_a_profile_has_its_own_nodes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is_one_node is False; step times have their own"):
        SystemSettings(profile=tmp_path / "x.json", is_one_node=False)


def test_each_seed_has_a_scatter_of_its_own(tmp_path: Path) -> None:
    arrivals = tuple(Arrival(0.1 * place, 300, 8) for place in range(12))
    replay = tmp_path / "saved.jsonl"
    save_workload(Workload(arrivals), replay)
    system = SystemSettings(profile=write_profile(tmp_path / "profile.json"))
    workload, loosest = WorkloadSettings(replay=replay), Criterion(60.0, 600.0)

    def times(seed: int) -> list[list[float]]:
        made = SimulatedSystem(system, SchedulingSettings(), workload, 2, "round-robin", loosest)
        return [record.token_s for record in made.measure(10.0, seed).records]

    assert times(1) == times(1)
    runs = [times(seed) for seed in range(3)]
    assert all(runs[place] != runs[place - 1] for place in range(3))


def test_a_run_of_a_search_is_one_of_simulate(tmp_path: Path) -> None:
    profile, output = write_profile(tmp_path / "profile.json"), tmp_path / "run.json"
    even = WorkloadSettings(lengths="fixed:300,8", arrivals="fixed", num_requests=12)
    system, loosest = SystemSettings(profile=profile), Criterion(60.0, 600.0)
    made = SimulatedSystem(system, SchedulingSettings(), even, 2, "least-work", loosest)
    same = ("--profile", str(profile), *LOAD, "--arrivals", "fixed", "--replicas", "2")
    for seed in (0, 5):
        given = ("--qps", "4", "--workload-seed", str(seed), "--output", str(output))
        assert invoke("simulate", *same, *given).exit_code == 0
        assert read_json(output).records == made.measure(4.0, seed).records


def test_a_path_is_printed_as_it_is(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "[red]profile.json")
    result = invoke("plan", "--profile", str(profile), *LOAD, "--slo-tbt", "5s")
    assert result.output.splitlines()[-1] == f"1 replica: 1 x {profile}"


def test_a_table_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(Arrival(0.0, 10, 3), end_s=1.0, failure=Failure("[red]odd", "it is"))
    print_report(Console(width=100), Results(Workload((record.arrival,)), [record], 1.0), None)
    assert "failed: [red]odd" in capsys.readouterr().out
