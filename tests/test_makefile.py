"""`make setup` where PyTorch cannot be had: it says why, of both ways that it tried."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
PIP = """#!/bin/sh
echo "$@" >> calls
case "$*" in *"$(cat wrong)") echo "ERROR: nothing fits: $*" >&2; exit 1;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make_setup(folder: Path, wrong: str) -> subprocess.CompletedProcess[str]:
    """Run it with a pip that installs nothing, and fails where its arguments end with `wrong`."""
    shutil.copy(MAKEFILE, folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    (folder / "wrong").write_text(wrong)
    return subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}", "TORCH=torch==9", "TORCH_INDEX=http://extra"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_index_has_it(tmp_path: Path) -> None:
    done = make_setup(tmp_path, wrong="torch==9")
    assert done.returncode != 0
    own, extra = done.stderr.split("With http://extra beside it:")
    assert "torch==9 cannot be installed" in own
    assert "ERROR: nothing fits" in own
    assert "--extra-index-url" not in own
    assert "ERROR: nothing fits" in extra
    assert "--extra-index-url http://extra torch==9" in extra
    assert "make setup TORCH_INDEX=URL" in extra
    assert not (tmp_path / ".venv" / ".ready").exists()
    assert "--editable" not in (tmp_path / "calls").read_text()


def test_the_second_index_has_it(tmp_path: Path) -> None:
    """What the first said is no news then."""
    done = make_setup(tmp_path, wrong="constraints.txt torch==9")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second, rest = (tmp_path / "calls").read_text().splitlines()
    assert "--extra-index-url" not in first
    assert "--extra-index-url http://extra" in second
    assert "--editable" in rest
    assert (tmp_path / ".venv" / ".ready").exists()
