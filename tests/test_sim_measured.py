"""Step times from a table of measured iterations."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallfree.core.step_time import BatchShape, chunk_context
from stallfree.errors import ConfigError
from stallfree.sim.measured import read_times

HEAD = "prefill_tokens,prefill_start,decodes,decode_context,seconds\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "times.csv"
    path.write_text(text, encoding="utf-8")
    return path


def seconds_of(tokens: int, start: int, decodes: int, context: int) -> float:
    products = chunk_context(start, tokens)
    return 0.01 + 1e-4 * (tokens + decodes) + 1e-7 * products + 1e-6 * decodes * context


def test_what_was_measured_is_predicted(tmp_path: Path) -> None:
    rows = [
        (tokens, start, decodes, 500)
        for tokens in (0, 64, 256, 512, 1024)
        for start in (0, 1000, 2000)
        for decodes in (0, 4, 8, 32)
        if tokens or decodes
    ]
    lines = [",".join(map(str, (*row, seconds_of(*row)))) for row in rows]
    times = read_times(write(tmp_path, HEAD + "\n".join(lines)))
    shape = BatchShape(520, chunk_context(1000, 512), 8 * 500, 9)
    assert times.seconds(shape) == pytest.approx(seconds_of(512, 1000, 8, 500), rel=0.05)


def test_several_chunks_have_products_instead_of_a_start(tmp_path: Path) -> None:
    head = "prefill_tokens,prefill_start,prefill_context,sampled,seconds\n"
    costs = [(tokens, scale * tokens, rows) for tokens in (8, 64, 512) for scale in (9, 90)
             for rows in (1, 5)]  # fmt: skip
    lines = [
        f"{tokens},0,{products},{rows},{0.01 + 1e-4 * tokens + 1e-6 * products + 1e-3 * rows}"
        for tokens, products, rows in costs
    ]
    times = read_times(write(tmp_path, head + "\n".join(lines)))
    assert times.seconds(BatchShape(64, 640, 0, 3)) == pytest.approx(0.02004, rel=0.02)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decodes,x\n1,2\n", "a column seconds, and prefill_tokens or decodes; there may be"),
        ("decodes,x\n1,2\n", "; this file has decodes, x"),
        ("", "this file has no columns"),
        ("seconds\n1\n", "prefill_tokens or decodes"),
        ("seconds,decodes,speed\n1,1,1\n", "unknown columns speed; known are decode_context, "),
        (HEAD + "1,0,0,0,fast\n", "line 2: seconds is 'fast'"),
        (HEAD + "1.5,0,0,0,1\n", "prefill_tokens is '1.5'"),
        (HEAD + "0,0,0,0,1\n", "holds something"),
        (HEAD + "5,0,0,0,1\n5,0,0,0,-1\n", "line 3: seconds is '-1'"),
        (HEAD, "batches of 1 token and of more"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"times\.csv") as refused:
        read_times(write(tmp_path, text))
    assert said in str(refused.value)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_times(tmp_path / "none.csv")
