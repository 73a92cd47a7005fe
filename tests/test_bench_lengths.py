"""Lengths of prompts and answers: presets, specs, scaling to a context, traces."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stallfree.bench.lengths import FORMS, PRESETS, Size, TraceLengths, parse_lengths, scaled
from stallfree.bench.metrics import percentile
from stallfree.bench.shapes import LogNormal, Uniform, Zipf
from stallfree.errors import ConfigError

PUBLISHED = {  # OSDI'24, table 2: medians and P90s of prompts and answers, and most tokens in total
    "openchat_sharegpt4": ((1730, 5696), (415, 834), 8192),
    "arxiv_summarization": ((7059, 12985), (208, 371), 16384),
}
HEADER = "num_prefill_tokens,num_decode_tokens"
DATA = Path(
    os.environ.get(
        "STALLFREE_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    )
)


def draw(spec: str, count: int, limit: int | None = None) -> list[Size]:
    lengths = parse_lengths(spec)
    if limit is not None:
        lengths = lengths.within(limit)
    random = Random(7)
    return [lengths.draw(random) for _ in range(count)]


def trace(folder: Path, text: str) -> str:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return f"trace:{path}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_medians_and_p90s(name: str) -> None:
    prompt, output, longest = PUBLISHED[name]
    sizes = draw(name, 10_000)
    assert max(sum(size) for size in sizes) <= longest
    for own, (median, p90) in zip(zip(*sizes, strict=True), (prompt, output), strict=True):
        assert percentile(own, 0.5) == pytest.approx(median, rel=0.05)
        assert percentile(own, 0.9) == pytest.approx(p90, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_fit_of_a_preset_is_exact_where_it_is_integrated(name: str) -> None:
    preset = PRESETS[name]
    prompt, output, longest = PUBLISHED[name]
    grid = [(i + 0.5) / 300 for i in range(300)]
    prompts = [preset.prompt.quantile(share) for share in grid]
    outputs = [preset.output.quantile(share) for share in grid]
    kept = [(p, o) for p in prompts for o in outputs if p + o <= longest]
    for index, published in enumerate((prompt, output)):
        for share, value in zip((0.5, 0.9), published, strict=True):
            below = sum(size[index] <= value for size in kept) / len(kept)
            assert below == pytest.approx(share, abs=0.005)


def test_fixed_and_uniform() -> None:
    assert draw("fixed:300,20", 3) == [Size(300, 20)] * 3
    prompts, outputs = zip(*draw("uniform:1-3,10-11", 200), strict=True)
    assert (set(prompts), set(outputs)) == ({1, 2, 3}, {10, 11})


def test_zipf_weighs_a_length_by_its_power() -> None:
    shape = Zipf.of(2.0, 1, 3)  # weights 1, 1/4, 1/9
    total = 1 + 1 / 4 + 1 / 9
    assert [shape.quantile(share) for share in (0.0, 0.99 / total, 1.01 / total, 0.95)] == [
        *(1, 1, 2, 3)
    ]
    assert {size.prompt_tokens for size in draw("zipf:0,5-6,9-9", 50)} == {5, 6}
    assert Zipf.of(100.0, 1_000_000, 1_000_000).quantile(0.5) == 1_000_000


def test_a_lognormal_has_its_median_and_p90() -> None:
    shape = LogNormal(500, 2000)
    assert shape.quantile(0.5) == 500
    assert shape.quantile(0.9) == 2000
    assert shape.quantile(0.0) == 1


@given(st.floats(0, 1, exclude_max=True))
def test_quantiles_stay_within_a_range(share: float) -> None:
    assert 3 <= Uniform(3, 9).quantile(share) <= 9
    assert 3 <= Zipf.of(1.2, 3, 9).quantile(share) <= 9


@example(2, 1, 1999, 0)
@example(2, 1999, 1, 0)
@example(5, 3, 7, 0)
@given(st.integers(2, 5000), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 5000))
def test_a_scaled_request_fits_and_has_a_token_of_each(
    limit: int, prompt: int, output: int, more: int
) -> None:
    longest = max(prompt + output + more, limit)
    size = scaled(Size(prompt, output), limit, longest)
    assert min(size) >= 1
    assert sum(size) <= limit
    assert abs(size.output_tokens - output * limit / longest) <= 1


def test_a_smaller_context_scales_every_request_alike() -> None:
    whole, scaled_down = draw("openchat_sharegpt4", 500), draw("openchat_sharegpt4", 500, 2048)
    for size, small in zip(whole, scaled_down, strict=True):
        assert small.prompt_tokens == pytest.approx(size.prompt_tokens / 4, abs=1)
        assert small.output_tokens == pytest.approx(size.output_tokens / 4, abs=1)
    assert draw("openchat_sharegpt4", 5, 9000) == whole[:5]
    assert draw("uniform:1-100,1-100", 5, 200) == draw("uniform:1-100,1-100", 5)


def test_lognormals_without_a_longest_request_are_drawn_again() -> None:
    every, kept = draw("lognormal:100/400,10/20", 500), draw("lognormal:100/400,10/20", 100, 300)
    assert kept == [size for size in every if sum(size) <= 300][:100]
    with pytest.raises(ConfigError, match=r"'lognormal:900/901,9/9'.* at most 20 tokens"):
        draw("lognormal:900/901,9/9", 1, 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sharegpt", r"workload is 'sharegpt'; it must be one of openchat_sharegpt4, "),
        ("", "workload is ''; it must be one of"),
        ("poisson:3", "workload is 'poisson:3'; it must be one of"),
        ("fixed:3", "workload is 'fixed:3'; write it as fixed:PROMPT,OUTPUT"),
        ("fixed:0,3", "'fixed:0,3'; 0 must be at least 1 and at most 1,000,000"),
        ("fixed:3,1000001", "1000001 must be at least 1"),
        ("fixed:3," + "9" * 5000, "must be at least 1"),
        ("fixed:-3,3", "write it as fixed"),
        ("uniform:9-3,1-2", "'uniform:9-3,1-2'; 9 must be at most 3"),
        ("uniform:1-2", "write it as uniform:LOW-HIGH,LOW-HIGH"),
        ("zipf:1,1-2", "write it as zipf:EXPONENT"),
        ("zipf:nan,1-2,1-2", "write it as zipf:EXPONENT"),
        ("zipf:101,1-2,1-2", "an exponent must be at most 100"),
        ("lognormal:5/4,1/2", "5 must be at most 4"),
        ("trace:none.csv", "none.csv cannot be read: No such file"),
        ("trace:.", "cannot be read: Is a directory"),
    ],
)
def test_a_wrong_spec_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lengths(spec)


def test_every_form_is_listed() -> None:
    assert {form.partition(":")[0] for form in FORMS} == {
        *PRESETS,
        *("fixed", "uniform", "zipf", "lognormal", "trace"),
    }


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    text = f"\ufeffname,{HEADER},arrived_at\nb,20,2,7.5\na,10,0,5\n"
    lengths = parse_lengths(trace(tmp_path, text))
    assert isinstance(lengths, TraceLengths)
    assert lengths.sizes == (Size(10, 1), Size(20, 2))
    assert lengths.at_s == (0, 2.5)
    assert lengths.within(11).sizes == (Size(5, 1), Size(10, 1))
    assert {lengths.draw(Random(seed)) for seed in range(20)} == set(lengths.sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no column num_prefill_tokens and none num_decode_tokens; .* has no columns"),
        (
            "num_prefill_tokens,time\n1,2\n",
            r"no column num_decode_tokens; a trace has .* arrived_at; .* num_prefill_tokens, time$",
        ),
        (
            ",".join(["x" * 99, *map(str, range(25))]),
            "this file has x{60}, 0, 1, .*, 18 and 6 more$",
        ),
        (f"{HEADER}\n", "holds no requests"),
        (f"{HEADER}\n1,2\n3\n", "line 3: num_decode_tokens is None; it must be a whole number"),
        (f"{HEADER}\n1,2\n3,x\n", "line 3: num_decode_tokens is 'x'"),
        (f"{HEADER}\n1.5,2\n", "line 2: num_prefill_tokens is '1.5'"),
        (f"{HEADER}\n-1,2\n", "line 2: num_prefill_tokens is '-1'"),
        (f"{HEADER},arrived_at\n1,2,inf\n", "line 2: arrived_at is 'inf'; it must be a number"),
        (f'{HEADER}\n1,"{"2" * 200_000}"\n', "after line 1: field larger than"),
    ],
)
def test_a_damaged_trace_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lengths(trace(tmp_path, text))


def test_a_trace_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        parse_lengths(f"trace:{tmp_path / 'trace.csv'}")


@pytest.mark.skipif(not DATA.is_dir(), reason="recorded traces are not part of the repository")
@pytest.mark.parametrize(
    ("name", "medians", "has_times"),
    [("splitwise_conv", (1020, 129), True), ("arxiv_4k", (2730, 167), False)],
)
def test_recorded_traces(name: str, medians: tuple[int, int], has_times: bool) -> None:
    lengths = parse_lengths(f"trace:{DATA / name}.csv")
    assert isinstance(lengths, TraceLengths)
    assert tuple(percentile(own, 0.5) for own in zip(*lengths.sizes, strict=True)) == medians
    assert (lengths.at_s is not None) == has_times
