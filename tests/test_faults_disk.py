"""A disk that is full, model files that vanish, a clock that jumps: serving goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_fixtures import (
    ENGINE,
    Stream,
    fill,
    model_in,
    note,
    seconds_until,
    server,
    small_disk,
    start,
    stop,
)
from fault_process import DAY_S
from tiny_models import byte_level_vocabulary, write_gguf

from stallfree.cache import cache_folder
from stallfree.engine.iteration_file import COLUMNS
from stallfree.model.int8 import is_supported

SOURCE = Path(__file__).parent.parent / "src" / "stallfree"
INT8 = ("--dtype", "int8", "--threads", "1", "--max-model-len", "256")
STAGES = ("--pipeline-parallel-size", "2")
needs_int8 = pytest.mark.skipif(not is_supported(), reason="this processor cannot run int8 models")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@needs_int8
@pytest.mark.timeout(1200)
def test_a_cache_on_a_full_disk(model: Path, disk: Path) -> None:
    """What is compiled is there, so that the test is short; nothing else can be kept."""
    with server(model, "--tbt-slo", "200ms", engine=INT8) as own:  # compiles, if need be
        expected = own.text(max_tokens=20)
    shutil.copytree(cache_folder() / "kernels", disk / "kernels")
    fill(disk)
    environment = {"STALLFREE_CACHE": str(disk)}
    with server(model, "--tbt-slo", "200ms", environment=environment, engine=INT8) as own:
        assert own.text(max_tokens=20) == expected
        assert "the int8 weights are not kept" in own.log
        assert "the step times are not kept" in own.log
        assert "Traceback" not in own.log
    assert {path.name for path in (disk / "int8").rglob("*") if path.is_file()} <= {
        *(path.name for path in (disk / "int8").glob("*.lock"))
    }
    note(
        "the cache folder is on a full disk",
        seen="nothing: a warning in the log, and each start takes longer",
        healthy=0.0,
    )


def test_a_kernel_is_compiled_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    script = tmp_path / "kernel.py"
    script.write_text(
        "from stallfree.kernels.jit import entry\n"
        "from pathlib import Path\n"
        "import sys\n"
        "@entry\n"
        "def double(x):\n"
        "    return 2 * x\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fault_fixtures import fill\n"
        f"fill(Path({str(disk)!r}))\n"
        "print(double(21))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "STALLFREE_CACHE": str(disk)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "42\n"
    assert "compiled kernels are not kept" in done.stderr


def test_the_disk_fills_while_iterations_are_noted(model: Path, disk: Path) -> None:
    path = disk / "iterations.csv"
    with server(model, "--iteration-file", str(path)) as own:
        before = own.left()
        expected = own.text(max_tokens=100)
        filler = fill(disk)
        for _ in range(3):  # what is left of the file's last page is filled first
            assert own.text(max_tokens=1000)[: len(expected)] == expected
        size = path.stat().st_size
        assert own.text(max_tokens=100) == expected
        assert path.stat().st_size - size < 64
        filler.unlink()
        assert own.text(max_tokens=100) == expected
        seconds_until(lambda: path.stat().st_size > size)
        own.check_nothing_left(before)
        assert stop(own) == 0
        assert own.log.count("cannot be written (No space left on device)") == 1
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == list(COLUMNS)
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert path.read_text().endswith("\n")
    assert len(rows) > 200
    note(
        "the disk of the iteration file fills",
        seen="nothing",
        healthy=0.0,
        lost="lines of the file, while there is no room",
    )


def test_the_disk_fills_while_stages_are_traced(model: Path, disk: Path) -> None:
    path = disk / "trace.json"
    with server(model, "--trace-file", str(path), *STAGES) as own:
        expected = own.text(max_tokens=20)
        filler = fill(disk)
        for _ in range(3):  # what is left of the file's last page is filled first
            assert own.text(max_tokens=100)[: len(expected)] == expected
        size = path.stat().st_size
        assert own.text(max_tokens=20) == expected
        assert path.stat().st_size - size < 256
        filler.unlink()
        assert own.text(max_tokens=20) == expected
        seconds_until(lambda: path.stat().st_size > size + 256)
        assert stop(own) == 0
        assert own.log.count("cannot be written (No space left on device)") == 1
        assert "Traceback" not in own.log
    *bars, end = json.loads(path.read_text())
    assert end == {}
    assert {bar["tid"] for bar in bars} == {0, 1}
    note(
        "the disk of the trace of stages fills",
        seen="nothing",
        healthy=0.0,
        lost="bars of the trace, while there is no room",
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--iteration-file", "/dev/full"), "/dev/full cannot be written: No space left on device"),
        (
            ("--trace-file", "/dev/full", *STAGES),
            "trace_file is /dev/full: No space left on device",
        ),
    ],
)
def test_no_room_at_the_start(
    model: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    log = tmp_path / "log.txt"
    process = start(model, *flags, log=log)
    assert process.wait(60) == 2
    assert said in log.read_text()
    assert "Traceback" not in log.read_text()
    seen = "no server: exit code 2, and what cannot be written"
    note(f"{flags[0]} is on a full disk at the start", seen=seen, healthy="a restart")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["float32", pytest.param("int8", marks=needs_int8), "gguf"])
def test_the_model_vanishes_while_it_is_served(tmp_path: Path, kind: str) -> None:
    """Its files, and those of the cache, are cut short and removed: neither is mapped any more."""
    model = tmp_path / "tiny.gguf"
    if kind == "gguf":
        write_gguf(model, "qwen2", extra=byte_level_vocabulary())
        files = [model]
    else:
        model = model_in(tmp_path)
        files = list(model.glob("*.safetensors"))
    engine = INT8 if kind == "int8" else ENGINE
    cache = tmp_path / "cache"
    if (cache_folder() / "kernels").is_dir():
        shutil.copytree(cache_folder() / "kernels", cache / "kernels")
    environment = {"STALLFREE_CACHE": str(cache)}
    with server(model, environment=environment, engine=engine) as own:
        maps = Path(f"/proc/{own.process.pid}/maps").read_text()
        mapped = [line for line in maps.splitlines() if str(tmp_path) in line]
        assert not [line for line in mapped if "/kernels/" not in line]
        expected = own.text(max_tokens=20)
        files += [file for file in (cache / "int8").rglob("*") if file.is_file()]
        for file in files:
            os.truncate(file, 0)
        assert own.text(max_tokens=20) == expected
        for file in files:
            file.unlink()
        assert own.text(max_tokens=20) == expected
        assert stop(own) == 0
    log = tmp_path / "log.txt"
    assert start(model, log=log, environment=environment, engine=engine).wait(60) in (1, 2)
    assert "Traceback" not in log.read_text()
    assert str(model.name) in log.read_text()
    if kind == "float32":
        seen = "nothing; the next start says what is missing"
        note("the model's files are cut short and removed while served", seen=seen, healthy=0.0)


def test_the_time_of_day_jumps(model: Path) -> None:
    with server(model, "--drain-timeout", "30") as own:
        before = own.left()
        expected = own.text(max_tokens=500)
        stream = Stream(own, max_tokens=500)
        stream.wait_for_events()
        own.fault("clock")
        assert stream.text == expected
        whole = own.complete(max_tokens=500).json()
        assert whole["choices"][0]["text"] == expected
        assert 0 <= whole["usage"]["scheduling_delay_ms"] < 60_000
        assert abs(whole["created"] - time.time()) > DAY_S / 2  # it did jump
        own.check_nothing_left(before)
        assert stop(own) == 0
    note("the time of day jumps by a day, and back", seen="`created` follows it", healthy=0.0)


def test_only_what_people_read_is_told_by_the_time_of_day() -> None:
    """Everything that waits or measures does so by a clock that never goes back."""
    uses = {
        (path.relative_to(SOURCE).as_posix(), line.strip())
        for path in SOURCE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\btime\.time(_ns)?\(|datetime\.(utc)?now\(", line)
    }
    assert {use for use in uses if not re.search(r'"created"|\.created = ', use[1])} <= {
        ("engine/chat_template.py", "return datetime.now().strftime(form)"),  # for templates
        ("server/tracing.py", "to_epoch_s = time.time() - self._now()"),  # of each span
        ("bench/client.py", "began = datetime.now(UTC)"),  # when a report is from
        ("model/int8_cache.py", "started = time.time_ns()"),  # compared with times of files
    }


CUT = """
import os
from stallfree.cli import main
from stallfree.model.gguf import GgufWeights
from stallfree.model.weights import SafetensorsWeights

def cutting(read):
    def tensor(self, *asked):
        for file in self.opened:
            if file.suffix != ".json":
                os.truncate(file, 4096)
        return read(self, *asked)
    return tensor

for kind in (GgufWeights, SafetensorsWeights):
    kind.tensor = cutting(kind.tensor)
main()
"""


@pytest.mark.parametrize("kind", ["float32", pytest.param("int8", marks=needs_int8), "gguf"])
def test_the_model_is_cut_short_while_it_is_loaded(tmp_path: Path, kind: str) -> None:
    """Between two tensors, or in the middle of one, it is all the same."""
    model = tmp_path / "tiny.gguf"
    if kind == "gguf":
        write_gguf(model, "qwen2", extra=byte_level_vocabulary())
    else:
        model = model_in(tmp_path)
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    engine = INT8 if kind == "int8" else ENGINE
    done = subprocess.run(
        [sys.executable, str(script), "serve", str(model), "--port", "0", *engine],
        env={**os.environ, "STALLFREE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # and not ended by SIGBUS
    name = model.name if kind == "gguf" else "model.safetensors"
    assert f"{name} has 4,096 bytes and had" in done.stderr
    assert "was cut short meanwhile" in done.stderr
    assert "Traceback" not in done.stderr
    if kind == "float32":
        seen = "no server: exit code 1, and which file it is"
        note(
            "the model's files are cut short while they are loaded", seen=seen, healthy="a restart"
        )
