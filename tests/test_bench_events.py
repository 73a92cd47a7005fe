"""Reading server-sent events, however their bytes are split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallfree.bench import events
from stallfree.bench.events import EventReader

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)


def read(*chunks: bytes) -> list[str]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b"data: one\n\ndata: two\n\n", ["one", "two"]),
        (b"data: one\r\n\r\ndata: two\r\r", ["one", "two"]),
        (b"data: first\ndata: second\n\n", ["first\nsecond"]),
        (b"data:no space\n\ndata:  two spaces\n\n", ["no space", " two spaces"]),
        (b": a comment\n\n: another\ndata: x\n: in it\n\n", ["x"]),
        (b"event: message\nid: 7\ndata: x\nretry: 5\n\n", ["x"]),
        (b"data\n\n", [""]),
        (b"\n\n\n", []),
        (b"\xef\xbb\xbfdata: after a mark\n\n", ["after a mark"]),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"data: whole\n\ndata: without an end\n", ["whole"]),
        (b"nonsense\n\n", []),
    ],
)
def test_events_by_the_standard(stream: bytes, found: list[str]) -> None:
    assert read(stream) == found
    assert read(*(stream[i : i + 1] for i in range(len(stream)))) == found


@given(
    st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_split_points_do_not_matter(contents: list[list[str]], end: str, splits: list[int]) -> None:
    texts = ["".join(f"data: {line}{end}" for line in lines) + end for lines in contents]
    stream = "".join(texts).encode()
    cuts = sorted({0, len(stream), *(min(split, len(stream)) for split in splits)})
    chunks = [stream[start:stop] for start, stop in pairwise(cuts)]
    assert read(*chunks) == ["\n".join(lines) for lines in contents]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 100)
    assert read(b"data: " + b"x" * 50 + b"\n\n") == ["x" * 50]
    for stream in (b"x" * 101, b"data: xxxxxxxxxx\n" * 20):
        with pytest.raises(ValueError, match="longer than"):
            read(stream)
