"""The table of faults, docs/faults.md: what each does to a real server, measured by its test.

    python benchmarks/faults.py                 # runs tests/test_faults_*.py, a few minutes

Each test injects a fault into a server process, checks what clients see and that nothing is left
over, and notes a row; this writes them down in the order of the tests. Mounting the small disk
needs root. STALLFREE_LEAK_REQUESTS=10000 sends as many requests as are promised.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "faults.md"
VARIABLE = "STALLFREE_FAULTS"
HEADINGS = ("fault", "what clients saw", "what was lost", "until healthy")
INTRODUCTION = """\
# Faults

What happens to a server, and to its clients, when something goes wrong. Each row is a test with a
real server process (`tests/test_faults_*.py`), which also checks that no KV block, request, stream,
task, thread or file is left over. `python benchmarks/faults.py` runs them and writes this table.
"Lost" is what befell requests and files that had no part in the fault.

"""


def page(rows: Iterable[dict[str, Any]]) -> str:
    """The page with these rows."""
    lines = [_line(HEADINGS), _line("---" for _ in HEADINGS)]
    for row in rows:
        healthy = row["healthy"]
        if not isinstance(healthy, str):
            healthy = "at once" if healthy < 0.05 else f"{healthy:.1f} s"
        lines.append(_line((row["fault"], row["seen"], row["lost"], healthy)))
    return INTRODUCTION + "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run the tests and write the page, unless one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_faults_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        environment = {**os.environ, VARIABLE: str(rows)}
        command = [sys.executable, "-m", "pytest", "-q", *tests]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code == 0:
            lines = rows.read_text(encoding="utf-8").splitlines()
            options.output.write_text(page(map(json.loads, lines)), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
