"""The reproduction of the paper: the artifact's step times, and that its report is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "paper"))

import ablation
import sweeps
from markdown_table import COMPARED, NEAR
from report import write_report
from reproduce import LIVE
from step_times import compare, read_points

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("STALLFREE_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results" / "paper" / "results.json"


@pytest.mark.skipif(not DATA.is_dir(), reason="the artifact's files are not in the repository")
def test_chunks_that_nothing_was_fitted_to_are_predicted() -> None:
    compared = [each for each in compare(read_points(DATA)) if each.file == "chunking_overhead"]
    assert len(compared) == 16
    for each in compared:
        assert each.held_out_ms == pytest.approx(each.published_ms, rel=0.15), each.name
        assert each.roofline_ms == pytest.approx(each.published_ms, rel=0.15), each.name


def test_stored_results_make_a_report(tmp_path: Path) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    path = tmp_path / "report.md"
    live = dict.fromkeys(LIVE)
    write_report(results, live, path)
    text = path.read_text(encoding="utf-8")
    for title in ("Step times", "Capacity", "TBT against the rate", "Ablation"):
        assert f"## {title}" in text
    for cell in results["capacity"]["rows"]:
        assert f"{cell['qps'] or 0.0:.3g}" in text


def test_every_stored_value_that_is_far_from_the_papers_has_a_reason() -> None:
    """In the report as it is committed."""
    head: list[str] = []
    num_compared = 0
    for line in RESULTS.with_name("report.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif set(line) != {"|", "-"} and "ratio" in head and cells[head.index("ratio")]:
            is_near = abs(float(cells[head.index("ratio")]) - 1) <= NEAR + 0.005  # as rounded
            assert is_near or cells[head.index(COMPARED[-1])], line
            num_compared += 1
    assert num_compared > 20


def test_the_stored_ablation_has_the_order_of_the_paper() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))["ablation"]["rows"]
    rows = ablation.of_overhead(stored, has_overhead=False)
    for dataset, qps in ablation.best_rates(rows).items():
        assert ablation.keeps_order(rows, dataset, qps)


def test_chunks_and_hybrid_batches_are_both_needed() -> None:
    """One seed of the ablation, which every run repeats."""
    points = {
        policy: sweeps.ablation_point("openchat_sharegpt4", policy, 0.8, False, seeds=range(1))
        for policy in ablation.PUBLISHED["openchat_sharegpt4"]
    }
    both, chunks, hybrid = (points[name] for name in ("sarathi", "simple_chunking", "hybrid_only"))
    assert both["tbt_p99_s"] < chunks["tbt_p99_s"] < hybrid["tbt_p99_s"]
    assert hybrid["ttft_p50_s"] < both["ttft_p50_s"] < chunks["ttft_p50_s"]
