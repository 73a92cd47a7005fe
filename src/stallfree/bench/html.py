"""Results as one page that needs no network: pictures, numbers and facts, of one run or several.

The pictures know a run by its records alone, so a simulated one has the same page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stallfree.bench.figures import cdf, in_flight, throughput, timeline
from stallfree.bench.files import write_text
from stallfree.bench.metrics import Slo, summarize
from stallfree.bench.records import Results
from stallfree.bench.report import Table, count_table, latency_table, notes
from stallfree.errors import ConfigError

Runs = Sequence[tuple[str, Results]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em 1em .2em 0; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.runs { display: flex; flex-wrap: wrap; gap: 0 3em; }
.note { color: #a40; } .about { color: #666; }
"""


def write_html(path: Path, runs: Runs, slo: Slo | None = None) -> None:
    """Write the page.

    Raises:
        ConfigError: the file cannot be written, or plotly is not installed.
    """
    write_text(path, page(runs, slo))


def page(runs: Runs, slo: Slo | None = None) -> str:
    """The page of at least one run, each with its name.

    Raises:
        ConfigError: plotly is not installed.
    """
    plotly_js = _plotly_js()
    title = escape(" and ".join(name for name, _ in runs))
    timelines = [(f"Tokens of {name}", timeline(results, slo)) for name, results in runs]
    figures = [
        ("Time to first token", cdf(runs, "ttft", slo.ttft_s if slo else None)),
        ("Time between tokens", cdf(runs, "tbt", slo.tbt_s if slo else None)),
        ("Output tokens a second", throughput(runs)),
        ("Requests in flight", in_flight(runs)),
    ]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style><script>{plotly_js}</script></head><body>",
        f"<h1>{title}</h1>",
        '<div class="runs">',
        *(_numbers(name, results, slo) for name, results in runs),
        "</div>",
        *(_section(heading, figure) for heading, figure in timelines + figures),
        "<h2>Facts</h2>",
        *(_facts(name, results) for name, results in runs),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("a page needs plotly: pip install 'stallfree[bench]'") from None
    text: str = get_plotlyjs()
    return text


def _section(heading: str, figure: Any) -> str:
    div = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return f"<h2>{escape(heading)}</h2>\n{div}"


def _numbers(name: str, results: Results, slo: Slo | None) -> str:
    summary = summarize(results, slo)
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(results, summary))
    tables = _table(latency_table(summary)) + _table(count_table(results, slo))
    about = f'<p class="about">{escape(results.workload.about)}</p>'
    return f"<section><h2>{escape(name)}</h2>{about}{tables}{told}</section>"


def _facts(name: str, results: Results) -> str:
    facts: Mapping[str, object] = {"run": name, **results.facts}
    return _table(Table(("", ""), tuple((key, str(value)) for key, value in facts.items())))


def _table(table: Table) -> str:
    head = _row("th", table.columns) if any(table.columns) else ""
    return f"<table>{head}{''.join(_row('td', row) for row in table.rows)}</table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
