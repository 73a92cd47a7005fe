"""Putting the embedded model together, with small pieces in place of the real ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from stallfree.cache import atomic_file, cache_folder
from stallfree.errors import ModelError
from stallfree.model import demo
from stallfree.model.demo import DEMO, EmbeddedModel, assemble

PIECES = (b"GGUF" + bytes(5000), os.urandom(70_000), b"end")
CONTENT = b"".join(PIECES)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A model in three installed packages that cannot be imported, and an empty cache."""
    site, parts = tmp_path / "site", []
    for number, piece in enumerate(PIECES):
        package = f"stallfree_test_piece{number}"
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (site / package).mkdir()
        (site / package / "__init__.py").write_text("raise RuntimeError('imported')")
        (site / package / "piece.bin").write_bytes(piece)
        parts.append((package.replace("_", "-"), f"{package}/piece.bin"))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    return EmbeddedModel(
        name="tiny",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        parts=tuple(parts),
        extra="tiny",
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder that the file ends up in."""
    return tmp_path / "cache" / "models"


def _leftovers(folder: Path) -> list[str]:
    """Files other than the model, its stamp and its lock."""
    keep = {"tiny.gguf", "tiny.gguf.lock", "tiny.gguf.verified.json"}
    return [path.name for path in folder.iterdir() if path.name not in keep]


def _never(*_: object) -> Any:
    raise AssertionError("must not be called")


@contextmanager
def _free_bytes(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> Iterator[None]:
    usage = shutil.disk_usage("/")._replace(free=num_bytes)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        yield


def test_puts_the_pieces_together(model: EmbeddedModel, models: Path) -> None:
    path = assemble(model)
    assert path == models / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert _leftovers(models) == []


def test_a_verified_file_is_not_read_again(
    model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = assemble(model)
    monkeypatch.setattr(demo, "_has_right_content", _never)
    monkeypatch.setattr(demo, "_concatenate", _never)
    assert assemble(model) == path


@pytest.mark.parametrize("damage", ["cut", "changed", "longer", "gone", "empty"])
def test_a_damaged_file_is_made_anew(model: EmbeddedModel, damage: str) -> None:
    path = assemble(model)
    match damage:
        case "cut":
            path.write_bytes(CONTENT[:-1])
        case "changed":
            path.write_bytes(CONTENT[:-1] + b"!")
            os.utime(path, (1, 1))
        case "longer":
            path.write_bytes(CONTENT + b"!")
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
    assert assemble(model).read_bytes() == CONTENT


@pytest.mark.parametrize("stamp", [b"", b"{", b"[]", b"null", b'{"sha256": 1}', b"\xff"])
def test_a_damaged_stamp_costs_a_check(
    model: EmbeddedModel, stamp: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = assemble(model)
    path.with_name("tiny.gguf.verified.json").write_bytes(stamp)
    monkeypatch.setattr(demo, "_concatenate", _never)
    assert assemble(model) == path
    assert json.loads(path.with_name("tiny.gguf.verified.json").read_bytes())


def test_what_a_killed_process_left_is_removed(model: EmbeddedModel, models: Path) -> None:
    models.mkdir(parents=True)
    (models / ".tiny.gguf.x1y2").write_bytes(CONTENT[:1000])
    assemble(model)
    assert _leftovers(models) == []


def test_a_file_copied_into_the_cache_needs_no_pieces(models: Path, model: EmbeddedModel) -> None:
    models.mkdir(parents=True)
    (models / "tiny.gguf").write_bytes(CONTENT)
    assert assemble(replace(model, parts=(("not-installed-at-all", "x"),))).is_file()


def test_without_the_packages_it_says_what_to_do(model: EmbeddedModel, models: Path) -> None:
    missing = replace(model, parts=(("not-installed-at-all", "x"),))
    with pytest.raises(ModelError, match=r"pip install 'stallfree\[tiny\]', or name a model"):
        assemble(missing)
    assert _leftovers(models) == []


def test_a_missing_piece(model: EmbeddedModel, site: Path) -> None:
    (site / "stallfree_test_piece1" / "piece.bin").unlink()
    with pytest.raises(ModelError, match=r"piece\.bin is missing; reinstall"):
        assemble(model)


def test_a_piece_of_the_wrong_size(model: EmbeddedModel, site: Path) -> None:
    (site / "stallfree_test_piece2" / "piece.bin").write_bytes(b"en")
    with pytest.raises(ModelError, match=r"75,006 bytes instead of 75,007.*--force-reinstall"):
        assemble(model)


def test_pieces_with_the_wrong_content(model: EmbeddedModel, models: Path, site: Path) -> None:
    (site / "stallfree_test_piece2" / "piece.bin").write_bytes(b"END")
    with pytest.raises(ModelError, match=rf"sha256 .* instead of {model.sha256}"):
        assemble(model)
    assert not (models / "tiny.gguf").exists()
    assert _leftovers(models) == []


def test_no_space_in_the_cache(
    model: EmbeddedModel, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        _free_bytes(monkeypatch, 75_000),
        pytest.raises(ModelError, match=rf"{models} .*75,007 more bytes.*STALLFREE_CACHE"),
    ):
        assemble(model)
    assert _leftovers(models) == []
    assert assemble(model).read_bytes() == CONTENT


def test_space_that_runs_out(
    model: EmbeddedModel, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match="without room for 75,007 more bytes"):
            assemble(model)
    assert not (models / "tiny.gguf").exists()
    assert _leftovers(models) == []


def test_a_cache_that_cannot_be_written(
    model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file/models cannot be written .*STALLFREE_CACHE"):
        assemble(model)


def test_processes_that_start_together(model: EmbeddedModel, models: Path, site: Path) -> None:
    program = f"from stallfree.model.demo import *; print(assemble({model!r}).read_bytes()[-3:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program],
            env=os.environ | {"PYTHONPATH": str(site)},
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [b"b'end'\n"] * 4
    assert _leftovers(models) == []
    assert (models / "tiny.gguf").read_bytes() == CONTENT


def test_another_process_that_holds_the_lock(
    model: EmbeddedModel, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_LOCK_TIMEOUT_S", 0.05)
    models.mkdir(parents=True)
    with (
        FileLock(models / "tiny.gguf.lock"),
        pytest.raises(ModelError, match="another process has held"),
    ):
        assemble(model)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    monkeypatch.setenv("STALLFREE_CACHE", "~/own")
    assert cache_folder() == Path("/home/someone/own")
    monkeypatch.delenv("STALLFREE_CACHE")
    assert cache_folder() == Path("/var/xdg/stallfree")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/stallfree")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/stallfree")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path, 3) as file:
        file.write(b"old")

    def interrupted() -> None:
        with atomic_file(path, 3) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.model
def test_the_demo_model_is_the_one_that_is_meant() -> None:
    path = assemble(DEMO)
    assert path.stat().st_size == 491_400_064
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEMO.sha256
    assert not [name for name in sys.modules if name.startswith("pandas_sns")]
