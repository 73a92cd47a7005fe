"""What the benchmark of other servers does without them: weights, installation, table, picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_level_vocabulary, write_gguf

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from peer_install import PEERS, InstallError, install
from peer_weights import W8A8, write_folder, write_q8
from peers import COLUMNS, ROWS, table
from peers_picture import PANELS, draw
from rich.console import Console
from server import ServerError, free_port, running

from stallfree.engine.tokenizer import load_tokenizer
from stallfree.model.source import ModelSource, open_model
from stallfree.model.weights import SafetensorsWeights

RUNS: list[dict[str, Any]] = [
    {"name": "other", "summary": dict.fromkeys(COLUMNS, 300.0)},
    {"name": "absent", "error": "pip could not"},
    {"name": "stallfree", "summary": dict.fromkeys(COLUMNS, 200.0)},
]


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", extra=byte_level_vocabulary())
    return open_model(str(path))


def test_a_q8_file_has_the_same_metadata_and_nearly_the_same_weights(
    source: ModelSource, tmp_path: Path
) -> None:
    write_q8(source.path, tmp_path / "q8.gguf")
    copy = open_model(str(tmp_path / "q8.gguf"))
    assert copy.hf_config == source.hf_config
    assert load_tokenizer(copy).encode("hello world") == load_tokenizer(source).encode(
        "hello world"
    )
    assert copy.weights.names() == source.weights.names()
    for name in source.weights.names():
        torch.testing.assert_close(
            copy.weights.tensor(name), source.weights.tensor(name), atol=0.01, rtol=0
        )


def test_a_folder_holds_what_the_gguf_file_holds(source: ModelSource, tmp_path: Path) -> None:
    write_folder(source, tmp_path / "bf16")
    copy = open_model(str(tmp_path / "bf16"))
    assert copy.end_token_ids == source.end_token_ids
    assert load_tokenizer(copy).encode("hello world") == load_tokenizer(source).encode(
        "hello world"
    )
    for name in source.weights.names():
        expected = source.weights.tensor(name).to(torch.bfloat16)
        assert torch.equal(copy.weights.tensor(name), expected)


def test_a_w8a8_folder_has_its_layers_in_int8(source: ModelSource, tmp_path: Path) -> None:
    write_folder(source, tmp_path / "w8a8", W8A8)
    weights = SafetensorsWeights(tmp_path / "w8a8")
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights.tensor(name).dtype == torch.int8
    restored = weights.tensor(name) * weights.tensor(f"{name}_scale")
    torch.testing.assert_close(restored, source.weights.tensor(name), atol=0.01, rtol=0)
    assert weights.tensor("lm_head.weight").dtype == torch.bfloat16
    config = json.loads((tmp_path / "w8a8" / "config.json").read_text())
    assert config["quantization_config"] == W8A8


def test_a_folder_that_is_no_environment_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "precious").touch()
    with pytest.raises(InstallError, match="in the way"):
        install("vllm", tmp_path / "vllm", fresh=True)
    assert (tmp_path / "vllm" / "precious").exists()


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such weights'); raise SystemExit(3)"]
    with (
        (tmp_path / "log").open("w+") as log,
        pytest.raises(ServerError, match="no such weights"),
        running(command, free_port(), log),
    ):
        pytest.fail("it does not run")


def test_every_row_is_of_a_known_peer() -> None:
    assert {row.peer for row in ROWS.values()} == set(PEERS)


def test_the_table_gives_values_ratios_and_failures() -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table(RUNS))
    assert "1.5x" in captured.get()
    assert "failed" in captured.get()


def test_the_picture_leaves_out_what_failed(tmp_path: Path) -> None:
    assert set(PANELS) <= set(COLUMNS)
    load = {"clients": 8, "long_count": 3, "long_words": 1500}
    draw({"runs": RUNS, "load": load, "machine": {"cores": 2, "cpu": "a"}}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
