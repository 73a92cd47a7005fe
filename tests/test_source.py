"""Finding models: folders, GGUF files, and a hub on a local port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import COMMIT, HubServer, hub_of
from safetensors.torch import save, save_file
from tiny_models import byte_level_vocabulary, state_dict, write_gguf

from stallfree.errors import ConfigError, ModelError, UnsupportedModelError, WeightFileError
from stallfree.model.source import open_model

CONFIG = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "hidden_size": 64}


def _folder(path: Path, **files: Any) -> Path:
    """A model folder; keyword arguments are JSON files, None leaves one out."""
    path.mkdir()
    for name, content in {"config": CONFIG, **files}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": torch.ones(3)}, path / "model.safetensors")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _folder(tmp_path / "tiny-llama")


def test_a_folder(folder: Path) -> None:
    source = open_model(str(folder))
    assert source.name == "tiny-llama"
    assert source.path == folder
    assert source.hf_config == CONFIG
    assert source.end_token_ids == {2}
    assert torch.equal(source.weights.tensor("model.norm.weight"), torch.ones(3))


def test_the_current_folder_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_model(".").name == "tiny-llama"


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "some-Q4_0.gguf", "qwen3", extra=byte_level_vocabulary())
    source = open_model(str(path))
    assert source.name == "some-Q4_0"
    assert source.path == path
    assert source.hf_config["architectures"] == ["Qwen3ForCausalLM"]
    assert source.end_token_ids == {265, 267}
    assert source.weights.names() == state_dict("qwen3").keys()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {2}),
        ({"generation_config": {"eos_token_id": [7, 8]}}, {2, 7, 8}),
        ({"config": {**CONFIG, "eos_token_id": None}}, set()),
        (
            {
                "tokenizer_config": {
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {"9": {"content": "<|im_end|>"}},
                }
            },
            {2, 9},
        ),
        (
            {
                "tokenizer_config": {"eos_token": {"content": "<|im_end|>"}},
                "tokenizer": {"added_tokens": [{"id": 5, "content": "<|im_end|>"}]},
            },
            {2, 5},
        ),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, {2}),
        ({"tokenizer_config": {"eos_token": None, "added_tokens_decoder": []}}, {2}),
    ],
)
def test_end_tokens_are_collected(
    tmp_path: Path, files: dict[str, Any], expected: set[int]
) -> None:
    assert open_model(str(_folder(tmp_path / "model", **files))).end_token_ids == expected


@pytest.mark.parametrize("value", ["2", -1, 2.0, True, [1, None], {}])
def test_end_tokens_that_are_none(tmp_path: Path, value: Any) -> None:
    path = _folder(tmp_path / "model", generation_config={"eos_token_id": value})
    with pytest.raises(ModelError, match=r"eos_token_id in .*generation_config\.json"):
        open_model(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [".", "model.safetensors", "config.json"])
def test_what_may_not_be_read(folder: Path, name: str) -> None:
    mode = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    try:
        with pytest.raises(ModelError, match=r"cannot be read: Permission denied"):
            open_model(str(folder))
    finally:
        (folder / name).chmod(mode)


def test_a_folder_without_a_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json$"):
        open_model(str(folder))
    (folder / "some.gguf").touch()
    with pytest.raises(ModelError, match=r"did you mean .*some\.gguf\?"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_broken_json_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        open_model(str(folder))


def test_quantized_folders_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UnsupportedModelError, match="gptq"):
        open_model(str(_folder(tmp_path / "model", config=config)))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model"}}
    path = _folder(tmp_path / "model", config={**CONFIG, **code})
    (path / "bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    open_model(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "model",
    ["", "no-such-folder", "./org/name", "/no/such/folder", "a/b/c", "org/name:weights.bin",
     "org/na me", "~nobody/model", "a\0b", "x" * 5000, "http://example.org/model",
     "../org/name", "org/name:../x.gguf", "org/.."],
)  # fmt: skip
def test_names_of_nothing(model: str) -> None:
    with pytest.raises(ConfigError, match="neither a local folder or file nor a hub id"):
        open_model(model)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightFileError, match="not a GGUF file"):
        open_model(str(path))


@pytest.mark.parametrize("model", [None, "folder"])
def test_a_revision_of_something_local(folder: Path, model: str | None) -> None:
    with pytest.raises(ConfigError, match="only hub ids"):
        open_model(model and str(folder), revision="main")


PROGRAM = """
import sys
from stallfree.errors import StallfreeError
from stallfree.model.source import open_model
for model in sys.argv[1:]:
    model, _, revision = model.partition("@")
    try:
        source = open_model(model, revision or None)
        print(source.name, sorted(source.weights.names()), source.path)
    except StallfreeError as error:
        print(type(error).__name__, error)
"""


def _open(home: Path, *models: str, endpoint: str, offline: bool = False) -> list[str]:
    """What another process, with a hub of its own, says of each of `models`."""
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *models],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def repositories(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    weights = save({"model.norm.weight": torch.ones(3)})
    gguf = write_gguf(tmp_path / "tiny.gguf", extra=byte_level_vocabulary()).read_bytes()
    return {
        "org/tiny": {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": weights,
            "pytorch_model.bin": b"pickle",
            "modeling_tiny.py": b"code",
            "onnx/model.onnx": b"onnx",
            "consolidated.safetensors": b"the same again",
        },
        "org/tiny-GGUF": {"tiny-q8.gguf": gguf},
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    }


@pytest.fixture
def hub(repositories: dict[str, dict[str, bytes]]) -> Any:
    with hub_of(repositories) as server:
        yield server


def test_models_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    answers = _open(
        home,
        "org/tiny",
        "org/tiny-GGUF:tiny-q8.gguf",
        "org/tiny@nothing",
        "org/none",
        "gated/llama",
        "org/tiny-GGUF",
        "org/tiny-GGUF:other.gguf",
        "org/pickles",
        endpoint=hub.url,
    )
    assert answers[0].startswith("org/tiny ['model.norm.weight'] ")
    assert answers[0].endswith(f"snapshots/{COMMIT}")
    assert answers[1].startswith("tiny-q8 ['lm_head.weight', ")
    assert answers[2].startswith("ModelError org/tiny at revision 'nothing' does not exist")
    assert answers[3].startswith("ModelError org/none is not on the hub")
    assert answers[4].startswith("ModelError gated/llama is gated: accept its conditions")
    assert answers[5].startswith("ModelError")
    assert ".gguf" in answers[5]
    assert answers[6].startswith("ModelError org/tiny-GGUF has no file other.gguf")
    assert answers[7].startswith("WeightFileError")
    assert "pickle" in answers[7]
    assert sorted({name for name in hub.fetched if not name.endswith(".gguf")}) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.slow
def test_the_hub_cache_serves_without_a_network(
    repositories: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    models = ("org/tiny", "org/tiny-GGUF:tiny-q8.gguf", f"org/tiny@{COMMIT}")
    with hub_of(repositories) as hub:
        online = _open(home, *models, endpoint=hub.url)
    closed = hub.url
    for offline in (True, False):
        answers = _open(
            home, *models, "org/other", "org/other:x.gguf", endpoint=closed, offline=offline
        )
        assert answers[:3] == online
        for answer in answers[3:]:
            assert answer.startswith("ModelError org/other")
            assert "not in the hub's cache" in answer
            assert "go online" in answer


def test_a_hub_cache_made_by_hand(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "home" / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / COMMIT)
    (answer,) = _open(tmp_path / "home", "org/tiny", endpoint="http://127.0.0.1:9", offline=True)
    assert answer.startswith("org/tiny ['model.norm.weight'] ")


@pytest.mark.model
def test_no_name_is_the_demo_model() -> None:
    source = open_model(None)
    assert source.name == "qwen2.5-coder-0.5b-instruct"
    assert source.weights.tensor("model.norm.weight").shape == (896,)
