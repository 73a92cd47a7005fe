"""Text as it grows: whole characters, and nothing of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stallfree.engine.detokenizer import Detokenizer, StopStrings


class Bytes:
    """A tokenizer whose tokens are single bytes, and one special token."""

    special_ids = frozenset({256})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@given(st.text())
def test_text_arrives_whole_and_in_order(text: str) -> None:
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(token) for token in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all("�" not in piece for piece in pieces) or "�" in text


def test_special_tokens_add_nothing_and_half_characters_are_kept() -> None:
    detokenizer = Detokenizer(Bytes())
    first, second, third = "€".encode()
    assert [detokenizer.add(token) for token in (first, second, 256, third)] == ["", "", "", "€"]
    assert detokenizer.add(first) == ""
    assert detokenizer.finish() == "�"


stops_of = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


@given(pieces=st.lists(st.text("abc", max_size=3)), stops=stops_of)
def test_stop_strings_never_leak(pieces: list[str], stops: list[str]) -> None:
    strings = StopStrings(stops)
    whole, shown, hit = "", "", None
    for piece in pieces:
        whole += piece
        passed, hit = strings.add(piece)
        shown += passed
        assert not any(stop in shown for stop in stops)
        if hit is not None:
            break
    found = [whole.find(stop) for stop in stops if stop in whole]
    if hit is None:
        assert not found
        assert shown + strings.finish() == whole
        assert whole.startswith(shown)
    else:
        assert shown == whole[: min(found)]
        assert whole[len(shown) :].startswith(hit)


def test_text_that_cannot_become_a_stop_is_not_held() -> None:
    strings = StopStrings(["</end>"])
    assert strings.add("hello <") == ("hello ", None)
    assert strings.add("/e") == ("", None)
    assert strings.add("x") == ("</ex", None)


def test_below_min_tokens_stop_strings_are_text() -> None:
    strings = StopStrings(["ab"])
    assert strings.add("xaby", may_stop=False) == ("xaby", None)
    assert strings.add("a", may_stop=False) == ("", None)
    assert strings.add("b") == ("", "ab")
