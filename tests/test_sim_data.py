"""Devices and models that simulations know, and files of one's own."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stallfree.errors import ConfigError
from stallfree.sim.data import known_names, load_device, load_model_shape

FOLDER = Path(__file__).parents[1] / "src" / "stallfree" / "sim"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mistral-7b", 7.24e9), ("yi-34b", 34.4e9), ("llama2-70b", 69e9), ("falcon-180b", 179.5e9)],
)
def test_shapes_have_the_published_numbers_of_parameters(name: str, parameters: float) -> None:
    assert load_model_shape(name).num_parameters == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(
    ("name", "kibibytes"),
    [("mistral-7b", 128), ("yi-34b", 240), ("llama2-70b", 320), ("falcon-180b", 160)],
)
def test_the_kv_cache_of_a_token(name: str, kibibytes: int) -> None:
    assert load_model_shape(name).kv_bytes_per_token == kibibytes * 1024


@pytest.mark.parametrize("name", known_names("models"))
def test_heads_of_a_model_make_up_its_width(name: str) -> None:
    shape = load_model_shape(name)
    assert shape.name == name
    assert shape.heads * shape.head_dim == shape.hidden


@pytest.mark.parametrize("name", known_names("devices"))
def test_devices_are_within_reason(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert 100 < device.flops_per_s / device.memory_bytes_per_s < 400  # operations a byte
    assert 0.01 < device.memory_bytes / device.memory_bytes_per_s < 0.1  # seconds to read it all
    assert device.network_bytes_per_s < device.link_bytes_per_s < device.memory_bytes_per_s


def test_a_bridge_joins_two_and_no_more() -> None:
    bridged, switched = load_device("a40-48gb"), load_device("h100-80gb")
    assert bridged.bytes_per_s_among(2) == 56.25e9
    assert bridged.bytes_per_s_among(4) == 31.5e9
    assert switched.bytes_per_s_among(2) == switched.bytes_per_s_among(8) == 450e9


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.toml")), ids=lambda path: str(path.stem))
def test_each_number_says_where_it_is_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    if path.parent.name == "devices":
        values = [line for line in lines if "=" in line and not line.startswith(("#", "name"))]
        assert all("  # " in line for line in values)


def test_the_files_are_installed() -> None:
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["stallfree"]
    installed = {path for each in patterns for path in FOLDER.parent.glob(each)}
    assert installed > set(FOLDER.glob("*/*.toml"))


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    text = (FOLDER / "devices" / "a40-48gb.toml").read_text()
    own = tmp_path / "own.toml"
    own.write_text(text.replace('"a40-48gb"', '"own"').replace("696e9", "700_000_000_000"))
    device = load_device(str(own))
    assert (device.name, device.memory_bytes_per_s) == ("own", 700e9)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("heads = 32\n", "heads = 30\n", "heads is 30; it must be a multiple of kv_heads, 8"),
        ("mlp_matrices = 3", "mlp_matrices = 4", "mlp_matrices is 4; it must be 2 or 3"),
        ("layers = 32", "layers = 32.5", "layers is 32.5; it must be a whole number"),
        ("layers = 32", "layers = true", "layers is True; it must be a whole number"),
        ("layers = 32", "layers = -1", "layers is -1; it must be finite and above 0"),
        ("bytes_per_parameter = 2", "bytes_per_parameter = inf", "finite and above 0"),
        ("hidden = 4096", "", "hidden is missing"),
        ("hidden = 4096", "width = 4096", "width is none of the keys name, layers"),
        ("hidden = 4096", "hidden = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "own.toml"
    text = (FOLDER / "models" / "mistral-7b.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=words) as caught:
        load_model_shape(str(path))
    assert "own.toml" in str(caught.value)


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the devices a100-80gb, a100-80gb-pcie, a40"):
        load_device("b200")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_model_shape(str(tmp_path / "gone.toml"))
