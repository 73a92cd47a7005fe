"""The findings of the Sarathi-Serve paper, reproduced: a report with pictures.

    python benchmarks/paper/reproduce.py                     # all simulations, and the report
    python benchmarks/paper/reproduce.py --only ablation     # one; stored results of others stay
    python benchmarks/paper/reproduce.py --report            # simulate nothing

What is simulated takes about half an hour on two cores. What is live on this machine is taken from
the results of `stall.py`, `engine.py`, `chunking.py`, `capacity.py` and `reality.py`, as far as
they are there. Published step times are read from --data, or STALLFREE_DATA, or are left out.
Everything is written to benchmarks/results/paper: results.json, report.md and the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `server`

import cells
import iterations
import step_times
from pictures import draw_all
from report import write_report
from server import machine_facts

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "paper"
LIVE = ("stall", "engine", "chunking", "capacity", "reality", "load_generators")
EXPERIMENTS = {
    "ablation": cells.ablation_cells,
    "split": cells.split_cells,
    "curve": cells.curve_cells,
    "capacity": cells.capacity_cells,
}


def main() -> int:
    """Run what is asked for, and write the report."""
    options = _options()
    path = FOLDER / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in [] if options.report else options.only or EXPERIMENTS:
        started = time.perf_counter()
        results[name] = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "commit": machine_facts()["commit"],
            "rows": cells.run_cells(name, EXPERIMENTS[name](), options.processes),
        }
        print(f"{name}: {time.perf_counter() - started:,.0f} s", file=sys.stderr)
        _store(path, results)
    if options.data.is_dir():
        points = step_times.read_points(options.data)
        results["step_times"] = [asdict(each) for each in step_times.compare(points)]
        _store(path, results)
    else:
        print(f"{options.data} is not there: published step times stay as stored", file=sys.stderr)
    results["iterations"] = [asdict(each) for each in iterations.compare()]
    live = {name: _live(name) for name in LIVE}
    _store(path, results)
    draw_all(results, live, FOLDER)
    write_report(results, live, FOLDER / "report.md")
    print(f"wrote {FOLDER / 'report.md'}")
    return 0


def _store(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


def _live(name: str) -> dict[str, Any] | None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS)
    parser.add_argument("--report", action="store_true", help="simulate nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("STALLFREE_DATA", ROOT.parent / "shared" / "data")),
        help="folder of the artifact's files yi34b_2xa100_*.csv",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
