"""The commands that simulate: simulate, plan and bench simulated-capacity, on tiny workloads."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from stallfree.bench.files import read_json
from stallfree.cli.app import app, run
from stallfree.core.step_time import StepTimeModel
from stallfree.engine.profile import Profile
from stallfree.errors import ConfigError
from stallfree.sim.system import DEFAULT_TOKEN_BUDGET

MISTRAL = ("--model", "mistral-7b", "--device", "a100-80gb")
LOAD = ("--workload", "fixed:300,8", "--num-requests", "12")
COMMANDS = {
    "simulate": ("simulate",),
    "plan": ("plan", "--slo-tbt", "1s", "--max-replicas", "4"),
    "capacity": ("bench", "simulated-capacity", "--slo-tbt", "1s"),
}


def invoke(*flags: str) -> Result:
    return CliRunner().invoke(app, list(flags))


def simulate(*flags: str) -> Result:
    return invoke("simulate", *MISTRAL, *LOAD, *flags)


def plan(*flags: str) -> Result:
    return invoke("plan", *MISTRAL, *LOAD, *flags)


def capacity(*flags: str) -> Result:
    own = ("--num-requests", "20", "--precision", "30%", "--seeds", "1", "--min-duration", "0s")
    return invoke("bench", "simulated-capacity", *MISTRAL, *LOAD, *own, *flags)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    model = StepTimeModel(0.02, (1, 512), (0.1,), 1e-8, 1e-7, 1e-5, scatter=(0.9, 1.0, 1.1))
    path.write_text(json.dumps(asdict(Profile(model, tile_tokens=8))))
    return path


def test_a_simulation_is_reported(tmp_path: Path) -> None:
    output, csv, html = (tmp_path / name for name in ("run.json", "run.csv", "run.html"))
    result = simulate(
        *("--qps", "4", "--slo-tbt", "100ms"),
        *("--output", str(output), "--csv", str(csv), "--html", str(html)),
    )
    assert result.exit_code == 0, result.output
    for words in ("time between tokens", "answered", "no work", "12", "s simulated in"):
        assert words in result.output
    assert "PB1" not in result.output  # there is one stage
    written = read_json(output)
    assert len(written.records) == 12
    assert all(len(record.token_s) == 8 for record in written.records)
    assert written.facts["model"] == "mistral-7b"
    assert csv.read_text().count("\n") == 13
    assert "mistral-7b at simulation" in html.read_text()


def test_a_simulation_repeats_itself(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in "ab"]
    for file in files:
        simulate("--output", str(file))
    first, second = (read_json(file).records for file in files)
    assert first == second


def test_stages_and_replicas_fit_in_a_terminal() -> None:
    result = simulate("--pipeline-parallel-size", "2", "--replicas", "11", "--qps", "50")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    [titles] = [line for line in lines if "preempted" in line]
    names = (
        "replica",
        "stage",
        "batches",
        "preempted",
        "busy",
        "PB1",
        "PB2",
        "PB3",
        "UNEVEN",
        "no work",
    )
    assert titles.split() == " ".join(names).split()
    rows = [line for line in lines if re.match(r"\s+\d+\s+[01]\s", line)]
    assert len(rows) == 22
    assert max(len(line.rstrip()) for line in [titles, *rows]) <= 80
    [meaning] = [line for line in lines if line.startswith("PB1: ")]
    assert "PB3: batches that differ in their decodes" in meaning


@pytest.mark.parametrize("router", ["round-robin", "least-work", "prefix-affine"])
def test_every_router_is_known(router: str) -> None:
    result = simulate("--replicas", "3", "--router", router)
    assert result.exit_code == 0, result.output


def test_a_profile_is_simulated(profile: Path, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    flags = ("--profile", str(profile), *LOAD, "--tbt-slo", "200ms", "--output", str(output))
    result = invoke("simulate", *flags)
    assert result.exit_code == 0, result.output
    assert read_json(output).facts["step_times"] == str(profile)


def test_a_target_chooses_the_budget() -> None:
    steady = simulate("--tbt-slo", "50ms", "--qps", "20")
    assert steady.exit_code == 0, steady.output
    row = next(line for line in steady.output.splitlines() if "time between tokens" in line)
    assert float(row.split()[5]) <= 50.0  # P99


def test_the_fewest_replicas_are_planned() -> None:
    load = ("--qps", "60", "--num-requests", "60", "--workload", "fixed:1500,8")
    result = plan(*load, "--slo-tbt", "100ms", "--slo-ttft", "1s")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("60 requests of fixed:1500,8, at most")
    found = re.fullmatch(r"(\d+) replicas: \1 x a100-80gb", lines[-1])
    assert found
    count = int(found[1])
    trials = {int(line.split()[0]): line for line in lines if line.startswith("  ")}
    assert {count - 1, count} <= set(trials)
    for replicas, line in trials.items():
        assert line.endswith(("within", "not within, given up"))
        assert ("not within" in line) == (replicas < count)
    few = plan(*load, "--slo-ttft", "1s", "--max-replicas", str(count - 1))
    assert few.exit_code == 1
    assert few.output.splitlines()[-1] == f"{count - 1} replicas are not enough."


def test_a_plan_tells_what_failed() -> None:
    result = plan("--kv-cache-tokens", "64", "--slo-tbt", "1s", "--max-replicas", "1")
    assert result.exit_code == 1
    assert (
        "       1      - ms       - s         -  not within, 1 rejected, given up" in result.output
    )


def test_a_plan_counts_the_devices_of_a_replica(profile: Path) -> None:
    split = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
    result = plan(*split, "--slo-tbt", "1s")
    assert result.output.splitlines()[-1] == "1 replica: 4 x a100-80gb"
    result = invoke("plan", "--profile", str(profile), *LOAD, "--slo-tbt", "5s")
    assert result.output.splitlines()[-1] == f"1 replica: 1 x {profile}"


def test_a_simulated_capacity_is_found(tmp_path: Path) -> None:
    output, state = tmp_path / "capacity.json", tmp_path / "state.jsonl"
    flags = ("--slo-tbt", "30ms,1s", "--max-delay", "100ms", "--seeds", "2")
    files = ("--output", str(output), "--state", str(state))
    result = capacity(*flags, *files)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("seed ")]
    content = json.loads(output.read_text())
    assert len(lines) == len(content["probes"])
    assert any("given up, " in line and line.endswith("fails 30 ms, fails 1 s") for line in lines)
    assert any(line.endswith("fails 30 ms, passes 1 s") for line in lines)
    assert re.search(r"[\d.]+ s simulated in [\d.]+ s, [\d,]+ iterations", result.output)
    strict, loose = content["capacities"]
    assert 0 < strict["mean_qps"] < loose["mean_qps"]
    for seed in (*strict["seeds"], *loose["seeds"]):
        assert seed["qps"] < seed["failed_qps"] <= 1.3 * seed["qps"]
    facts = content["facts"]
    assert facts["system"]["device"]["name"] == "a100-80gb"
    assert facts["given_up_beyond"] == {"tbt_s": 1.0, "max_delay_s": 0.1, "quantile": 0.99}
    again = capacity(*flags, *files)
    assert f"holds {len(lines)} runs of this search" in again.output
    assert json.loads(output.read_text()) == content
    assert "seed 0 " not in again.output


@pytest.mark.parametrize(
    "flags",
    [
        ("--slo-tbt", "2s"),  # what was given up for the other target may pass
        ("--max-delay", "5s"),
        ("--replicas", "2"),
        ("--router", "round-robin"),
        ("--token-budget", "256"),
        ("--launch-us", "100"),
        ("--num-requests", "19"),
    ],
)
def test_runs_of_another_search_are_not_taken(tmp_path: Path, flags: tuple[str, ...]) -> None:
    state = ("--state", str(tmp_path / "state.jsonl"))
    base = ("--slo-tbt", "1s", "--max-delay", "100ms", "--precision", "100%")
    assert capacity(*base, *state).exit_code == 0
    assert "holds 0 runs of this search; " in capacity(*base, *state, *flags).output


def test_a_file_of_ones_own_is_another_system_once_it_changes(tmp_path: Path) -> None:
    from stallfree.cli.system_options import SystemSettings

    source = Path(__file__).parents[1] / "src/stallfree/sim/devices/a100-80gb.toml"
    own = tmp_path / "own.toml"
    own.write_text(source.read_text())
    made = SystemSettings(model="mistral-7b", device=str(own))
    before = made.facts()
    own.write_text(source.read_text().replace("312e12", "313e12"))
    assert made.facts() != before


def test_a_profile_has_a_capacity(profile: Path) -> None:
    flags = ("--profile", str(profile), *LOAD, "--slo-tbt", "1s", "--seeds", "1")
    few = ("--precision", "30%", "--min-duration", "5s")
    result = invoke("bench", "simulated-capacity", *flags, *few)
    assert result.exit_code == 0, result.output
    assert "capacity, in requests a second" in result.output


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "b200"), "'b200' is none of the devices a100-80gb, a100-80gb-pcie"),
        (("--model", "gpt-9"), "'gpt-9' is none of the models falcon-180b, llama2-70b"),
        (("--model", "none.toml"), "none.toml cannot be read: No such file"),
        (("--router", "random"), "router is 'random'; it must be one of round-robin, least-work"),
        (("--profile", "x.json"), "device is 'a100-80gb'; step times have their own"),
        (("--pipeline-parallel-size", "33"), "is 33; mistral-7b has 32 layers"),
        (("--tensor-parallel-size", "0"), "tensor_parallel_size is 0; it must be at least 1"),
        (("--model", "falcon-180b"), "leaves room for 0 tokens of KV cache"),
        (("--fair",), "fair is set, but simulated requests have no users and no tiers"),
        (("--tier", "flex:ttft=5s"), "tier is set, but simulated requests have no users"),
        (("--scheduler", "fifo"), "scheduler is 'fifo'; it must be one of sarathi, vllm"),
        (("--scheduler", "orca", "--kv-cache-tokens", "64"), "reserves the full context"),
        (("--workload", "nonsense"), "nonsense"),
    ],
)
def test_what_is_wrong_is_named(
    command: tuple[str, ...], flags: tuple[str, ...], words: str
) -> None:
    result = invoke(*command, *MISTRAL, *LOAD, *flags)
    assert isinstance(result.exception, ConfigError), result.output
    assert words in str(result.exception)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_nothing_to_simulate_and_a_profile_that_is_none(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    result = invoke(*command, "--model", "yi-34b")
    assert "nothing to simulate: give --model and --device" in str(result.exception)
    gone = tmp_path / "gone.json"
    result = invoke(*command, "--profile", str(gone))
    assert isinstance(result.exception, ConfigError)
    assert f"{gone} holds no profile" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "a plan needs a target: give slo_tbt or slo_ttft"),
        (("--slo-tbt", "1s", "--clients", "2"), "clients of a closed loop wait"),
        (("--slo-tbt", "1s", "--qps", "2", "--clients", "2"), "give one of the two"),
    ],
)
def test_what_cannot_be_planned(flags: tuple[str, ...], words: str) -> None:
    result = plan(*flags)
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_a_closed_loop_has_no_simulated_capacity() -> None:
    result = capacity("--slo-tbt", "1s", "--clients", "3")
    assert "clients is 3; a capacity needs an open loop" in str(result.exception)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_name_is_one_line_and_code_2(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "yi-34b", "--device", "b200"]
    monkeypatch.setattr(sys, "argv", ["stallfree", *command, *flags])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stallfree: 'b200' is none of the devices ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_says_what_a_simulation_has_and_has_not(command: tuple[str, ...]) -> None:
    text = " ".join(invoke(*command, "--help").output.split())
    assert f"an iteration holds {DEFAULT_TOKEN_BUDGET} tokens on any device" in text
    assert "--fair and --tier are refused" in text


def test_replicas_that_keep_prefixes_read_them_once(tmp_path: Path) -> None:
    """Two prefixes of 160 tokens, twelve prompts of 460: two of them read all."""
    shared = ("--prefixes", "2,160", "--qps", "1", "--router", "prefix-affine")
    files = [tmp_path / f"{name}.json" for name in ("without", "with")]
    without = simulate(*shared, "--replicas", "2", "--output", str(files[0]))
    keeping = simulate(*shared, "--replicas", "2", "--output", str(files[1]), "--prefix-caching")
    assert keeping.exit_code == without.exit_code == 0, keeping.output
    assert "tokens were kept" not in without.output
    assert "1,600 of 5,520 prompt tokens were kept from before" in keeping.output
    assert read_json(files[1]).facts["prefix_caching"] is True
    first, second = (
        sum(record.token_s[0] - (record.sent_s or 0) for record in read_json(file).records)
        for file in files
    )
    assert second < first
