"""Keys of several clients: a file of names, keys and limits, which can be read again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from server_fixtures import MODEL

from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError, OverloadedError
from stallfree.server.keys import Keyring, read_keys
from stallfree.server.protocol import CompletionRequest
from stallfree.server.validation import parse

ALICE, BOB, CAROL = "alice-secret-1", "bob-secret-2", "carol-secret-3"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    return path


def test_a_file(file: Path) -> None:
    file.write_text(
        f"# the team\n\nalice:{ALICE}\n  bob.2:{BOB}  rate=90/min concurrency=3\n"
        f"c_-d:with:colons-and-%&\u0024 rate=5/s\n"
    )
    alice, bob, carol = read_keys(file)
    assert (alice.name, alice.rate, alice.concurrency) == ("alice", None, None)
    assert (bob.name, bob.rate, bob.rate_period_s, bob.concurrency) == ("bob.2", 90, 60.0, 3)
    assert (carol.name, carol.rate, carol.rate_period_s) == ("c_-d", 5, 1.0)
    ring = Keyring(file)
    assert ring.find(b"with:colons-and-%&$") == carol
    for wrong in (b"", ALICE[:-1].encode(), b"alice", ALICE.upper().encode(), b"\xff" * 99):
        assert ring.find(wrong) is None
    shown = f"{alice!r} {ring!r} {vars(ring)!r}"
    assert ALICE not in shown
    assert alice.digest.hex() not in shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("s3cret-s3cret", "line 2: it does not begin with NAME:KEY"),
        ("bob: s3cret-s3cret", "line 2: it does not begin with NAME:KEY"),
        ("b/b:s3cret-s3cret", "line 2: the name must be 1 to 64 letters"),
        (":s3cret-s3cret", "line 2: the name must be"),
        ("b" * 65 + ":s3cret-s3cret", "line 2: the name must be"),
        ("bob:s3cret", "line 2: the key of 'bob' must be 8 ASCII characters or more"),
        ("bob:s3cret-s3crét", "line 2: the key of 'bob' must be 8 ASCII"),
        ("bob:s3cret-s3cret rate=0/s", "rate is '0/s'; write it as 10/s or 60/min"),
        ("bob:s3cret-s3cret rate=5", "rate is '5'; write it as"),
        ("bob:s3cret-s3cret rate=5/h", "rate is '5/h'; write it as"),
        ("bob:s3cret-s3cret concurrency=0", "concurrency is '0'; it must be a whole number"),
        ("bob:s3cret-s3cret concurrency=x", "concurrency is 'x'"),
        ("bob:s3cret-s3cret speed=9", "after the key of 'bob' there may be rate="),
        ("bob:s3cret-s3cret rate=5/s rate=6/s", "each once"),
        (f"alice:{BOB}", "line 2: the name 'alice' is there twice"),
        (f"bob:{ALICE}", "line 2: the key of 'bob' is that of another name"),
    ],
)
def test_lines_that_are_wrong(file: Path, line: str, said: str) -> None:
    file.write_text(f"alice:{ALICE}\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_keys(file)
    assert str(file) in str(caught.value)
    assert not any(key in str(caught.value) for key in (ALICE, BOB, "s3cret"))


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n", b"alice:\xff\xfe"])
def test_files_that_are_wrong(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds no key|is not UTF-8"):
        read_keys(file)


def test_the_single_key_has_a_name_too(file: Path) -> None:
    file.write_text(f"alice:{ALICE}\n")
    ring = Keyring(file, BOB)
    assert {ring.find(key.encode()) is not None for key in (ALICE, BOB)} == {True}
    for line in (f"api-key:{CAROL}", f"bob:{BOB}"):
        file.write_text(line)
        with pytest.raises(ConfigError, match="that api_key has"):
            Keyring(file, BOB)
    with pytest.raises(ConfigError, match="there is no such file"):
        ServerSettings(api_keys_file=file / "missing")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ring_with(file: Path, limits: str) -> tuple[Clock, Callable[[], Callable[[], None]]]:
    """A clock, and what takes a place of the one key."""
    file.write_text(f"alice:{ALICE} {limits}\n")
    clock = Clock()
    ring = Keyring(file, clock=clock)
    key = ring.find(ALICE.encode())
    assert key is not None
    return clock, lambda: ring.take(key)


def test_a_rate(file: Path) -> None:
    clock, take = ring_with(file, "rate=4/s")
    for _ in range(4):
        take()
    with pytest.raises(OverloadedError, match="'alice' may send 4 requests in 1 s") as caught:
        take()
    assert caught.value.retry_after_s == pytest.approx(0.25)
    clock.now_s += 0.26
    take()
    with pytest.raises(OverloadedError):
        take()
    clock.now_s += 3600  # what is not used is not saved up
    for _ in range(4):
        take()
    with pytest.raises(OverloadedError):
        take()


def test_a_rate_by_the_minute(file: Path) -> None:
    clock, take = ring_with(file, "rate=2/min")
    take(), take()
    with pytest.raises(OverloadedError) as caught:
        take()
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now_s += 30
    take()


def test_requests_at_once(file: Path) -> None:
    _, take = ring_with(file, "rate=99/s concurrency=2")
    ends = [take(), take()]
    for _ in range(200):  # a refusal does not count against the rate
        with pytest.raises(OverloadedError, match="under way as it may: 2"):
            take()
    ends.pop()()
    take()


def test_read_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(f"alice:{ALICE} rate=2/min\nbob:{BOB}\n")
    clock = Clock()
    ring = Keyring(file, clock=clock)
    alice = ring.find(ALICE.encode())
    assert alice is not None
    ring.take(alice)
    ring.take(alice)
    file.write_text(f"alice:{CAROL} rate=2/min\n")
    ring.reload()
    assert ring.find(ALICE.encode()) is None
    assert ring.find(BOB.encode()) is None
    renewed = ring.find(CAROL.encode())
    assert renewed is not None
    with pytest.raises(OverloadedError):  # a new key is no new allowance
        ring.take(renewed)
    caplog.clear()
    file.write_text(f"alice:{CAROL}\nnonsense\n")
    ring.reload()
    assert ring.find(CAROL.encode()) == renewed
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "stay as they were" in record.message
    assert "line 2" in record.message
    file.unlink()
    ring.reload()
    assert ring.find(CAROL.encode()) == renewed
    assert CAROL not in caplog.text


def test_a_file_that_others_can_read(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(f"alice:{ALICE}\n")
    ring = Keyring(file)
    ring.warn_if_open()
    assert not caplog.records
    file.chmod(0o640)
    ring.warn_if_open()
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("owner", "user", "expected"),
    [
        ("", None, ""),
        ("", "bob", "bob"),
        ("alice", None, "alice"),
        ("alice", "bob", "alice/bob"),
        ("alice", "bob/x", "alice/bob/x"),
        ("alice", "x" * 999, "alice/" + "x" * 256),
    ],
)
def test_a_user_is_one_of_its_key(owner: str, user: str | None, expected: str) -> None:
    """As names have no slash, no two keys can have a user in common."""
    body = {"model": MODEL, "prompt": "hi", "user": user}
    assert parse(CompletionRequest, body).targets(owner).user == expected
