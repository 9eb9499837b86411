"""Runs side by side on one page of HTML that needs no server, no network and no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.log import Row
from mosaicjax.report.chart import Chart, Line, smooth, svg
from mosaicjax.report.curve import Points
from mosaicjax.report.live import format_count, format_duration, format_usd
from mosaicjax.report.shown import EVAL, Shown, loss_unit

MOST_RUNS = 8
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f00", "#666666")
"""Apart for all forms of colour vision but the last two. Source: Okabe and Ito 2008, jfly.uni-koeln.de."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #6b6b6b; --rule: #dcdcdc; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a0a0a0; --rule: #3a3a3a; --page: #161616; }
}
body { margin: 0 auto; max-width: 1100px; padding: 1rem; font: 16px/1.45 system-ui, sans-serif;
  background: var(--page); color: var(--ink); }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0; }
figure { margin: 0; }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 13px; fill: var(--faint); }
@media (max-width: 600px) { svg text { font-size: 18px; } }
svg .y { text-anchor: end; dominant-baseline: middle; }
svg .x { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--rule); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--rule); padding: .6rem;
  font-size: .85rem; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.empty, .note { color: var(--faint); font-size: .9rem; }
"""


def names_of(runs: Sequence[str]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart."""
    parts = [run.rstrip("/").split("/") for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("a run is given twice", got=", ".join(runs), fix="each once")


def page(shown: Sequence[Shown], title: str) -> str:
    """The page.

    Raises:
        InputError: no run, or more than a chart can tell apart.
    """
    if not 1 <= len(shown) <= MOST_RUNS:
        raise InputError("runs of a report", expected=f"1 to {MOST_RUNS}", got=len(shown))
    style = STYLE + "".join(
        f"polyline.c{number} {{ stroke: {colour}; }} circle.c{number}, .k{number} {{ fill: {colour};"
        f" background: {colour}; }}\n"
        for number, colour in enumerate(COLOURS)
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Runs</h2>",
        table(["run", *RUN_COLUMNS], [_run_row(each, number) for number, each in enumerate(shown)]),
        "<h2>Loss</h2>",
        '<p class="note">Nats a target token. Lines are of training, smoothed over a hundredth of a run; dots'
        " are of held-out text. FLOPs are the model's, with causal attention.</p>",
        charts(losses(shown)),
        "<h2>Speed and rate</h2>",
        charts(speeds(shown)),
        "<h2>Held-out text</h2>",
        held_out(shown),
        "<h2>Tasks</h2>",
        tasks(shown),
        charts(scored(shown)),
    ]
    if len(shown) > 1:
        body += ["<h2>What differs</h2>", differences(shown)]
    body += ["<h2>Samples</h2>", samples(shown)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def values(shown: Shown, kind: str, over: Callable[[Row, float], Any], of: Callable[[Row], Any]) -> Points:
    """Two numbers of each row of a kind, where it has both; not a number where one is not finite."""
    found: Points = []
    for row, work in zip(shown.rows, shown.flops, strict=True):
        if row["kind"] == kind:
            x, y = over(row, work), of(row)
            if x is not None and y is not None and math.isfinite(x):
                found.append((float(x), float(y) if math.isfinite(y) else math.nan))
    return sorted(found, key=lambda point: point[0])


def losses(shown: Sequence[Shown]) -> list[Chart]:
    """Loss over tokens, FLOPs and dollars."""
    overs: list[tuple[str, Callable[[Row, float], Any], Callable[[float], str]]] = [
        ("tokens", lambda row, work: row.get("tokens"), format_count),
        ("FLOPs", lambda row, work: work, format_flops),
        ("dollars", lambda row, work: row["time"].get("cost_usd"), format_usd),
    ]
    made = []
    for name, over, form in overs:
        lines: list[Line] = []
        for number, each in enumerate(shown):
            train = smooth(values(each, "train", over, lambda row: row.get("loss")))
            lines.append(Line(each.name, number, train))
            # Rows of evaluation have no cost of their own: the last step's before them is theirs.
            held = values(each, "eval", _carried(each, over), lambda row: row.get("loss"))
            lines.append(Line(f"{each.name}, held out", number, held, dots=True))
        unit = loss_unit(*(each.rows for each in shown))
        made.append(Chart(f"Loss over {name}", name, unit, tuple(lines), form, lambda y: f"{y:.3g}"))
    return made


def _carried(shown: Shown, over: Callable[[Row, float], Any]) -> Callable[[Row, float], Any]:
    last: dict[int, Any] = {}
    for row, work in zip(shown.rows, shown.flops, strict=True):
        x = over(row, work)
        if row["kind"] == "train" and x is not None:
            last[int(row["step"])] = x
    steps = sorted(last)

    def found(row: Row, work: float) -> Any:
        x = over(row, work)
        before = [step for step in steps if step <= int(row["step"])]
        return x if x is not None or not before else last[before[-1]]

    return found


def speeds(shown: Sequence[Shown]) -> list[Chart]:
    """Throughput, MFU where it is recorded, rate and gradient norm over steps."""
    wanted: list[tuple[str, str, Callable[[Row], Any], Callable[[float], str]]] = [
        ("Tokens a second", "tokens/s", lambda row: row["time"].get("tokens_per_second"), format_count),
        ("MFU, causal attention", "share", lambda row: row["time"].get("mfu_causal"), lambda y: f"{y:.3g}"),
        ("Learning rate", "rate", lambda row: row.get("lr"), lambda y: f"{y:.3g}"),
        ("Gradient norm", "norm", lambda row: row.get("grad_norm"), lambda y: f"{y:.3g}"),
    ]
    made = []
    for title, name, of, form in wanted:
        lines = tuple(
            Line(each.name, number, values(each, "train", lambda row, work: row["step"], of))
            for number, each in enumerate(shown)
        )
        if any(line.points for line in lines):
            made.append(Chart(title, "step", name, lines, format_count, form))
    return made


def scored(shown: Sequence[Shown]) -> list[Chart]:
    """Each score that the loop took, over tokens."""
    names = dict.fromkeys(
        name for each in shown for row in each.rows if row["kind"] == "tasks" for name in row if "/" in name
    )
    made = []
    for name in names:
        lines = tuple(
            Line(
                each.name,
                number,
                values(each, "tasks", lambda row, work: row.get("tokens"), partial(_field, name)),
                dots=True,
            )
            for number, each in enumerate(shown)
        )
        made.append(Chart(name, "tokens", name, lines, format_count, lambda y: f"{y:.3g}"))
    return made


def _field(name: str, row: Row) -> Any:
    return row.get(name)


def charts(made: Iterable[Chart]) -> str:
    """Charts with their titles, as many beside each other as the page is wide."""
    figures = (f"<figure><h3>{escape(each.title)}</h3>{svg(each)}</figure>" for each in made)
    return f'<div class="charts">{"".join(figures)}</div>'


RUN_COLUMNS = (
    "steps",
    "tokens",
    "parameters",
    "train loss",
    "held-out bits a byte",
    "time",
    "tokens/s",
    "goodput",
    "dollars",
    "dollars/M tokens",
    "on",
    "commit",
)


def _run_row(shown: Shown, number: int) -> list[str]:
    summary, around = shown.summary, shown.surroundings
    cost, held = summary.get("cost") or {}, summary.get("heldout") or {}
    devices = around.get("devices", {})
    cells = [
        _cell(summary.get("steps"), format_whole),
        _cell(summary.get("tokens"), format_whole),
        _cell(around.get("parameters"), format_whole),
        _cell((summary.get("loss") or {}).get("train"), lambda y: f"{float(y):.4f}"),
        _cell(held.get("bits_per_byte"), lambda y: f"{float(y):.4f}"),
        _cell((summary.get("seconds") or {}).get("total"), format_duration),
        _cell((summary.get("tokens_per_second") or {}).get("training"), format_count),
        _cell(summary.get("goodput"), lambda y: f"{float(y):.3f}"),
        _cell(cost.get("usd"), format_usd),
        _cell(cost.get("usd_per_million_tokens"), format_usd),
        escape(f"{devices.get('count', '')} {devices.get('kind', '')}".strip()),
        escape(str(around.get("git") or "")[:10]),
    ]
    return [f'<span class="key k{number}"></span>{escape(shown.name)}', *cells]


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else f"<td class=number>{escape(form(value))}"


def format_whole(value: float) -> str:
    """A whole number with commas."""
    return f"{int(value):,}"


def format_flops(value: float) -> str:
    """A power of ten: FLOPs have no letters that all know."""
    return f"{value:.2g}" if value else "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; one that begins a cell of its own is left so."""
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    lines = "".join(
        "<tr>" + "".join(f"{'' if cell.startswith('<td') else '<td>'}{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'


def held_out(shown: Sequence[Shown]) -> str:
    """The last evaluation of each run, a row each, and of its domains one each."""
    rows = []
    for number, each in enumerate(shown):
        for row in [row for row in each.rows if row["kind"] == "eval"][-1:]:
            domains = [key.removeprefix("loss/") for key in row if key.startswith("loss/")]
            for name in ("", *sorted(domains)):
                keys = (f"{key}/{name}" if name else key for key in HELD_OUT)
                rows.append(
                    [
                        f'<span class="key k{number}"></span>{escape(each.name)}',
                        escape(name or "all"),
                        _cell(row["step"], format_whole),
                        *(_cell(row.get(key), lambda y: f"{float(y):.4f}") for key in keys),
                    ]
                )
    if not rows:
        return '<p class="empty">Nothing was evaluated yet.</p>'
    return table(["run", "text", "step", "loss", "perplexity", "bits a byte"], rows)


def tasks(shown: Sequence[Shown]) -> str:
    """A row each score that any run has, a column each run."""
    names = list(dict.fromkeys(name for each in shown for name in each.scores))
    if not names:
        return f'<p class="empty">None: `mosaicjax eval RUN --out RUN/{EVAL}` leaves them here.</p>'
    rows = [
        [escape(name), *(f"<td class=number>{escape(each.scores.get(name, ''))}" for each in shown)]
        for name in names
    ]
    return table(["task", *(each.name for each in shown)], rows)


HELD_OUT = ("loss", "perplexity", "bits_per_byte")


def differences(shown: Sequence[Shown]) -> str:
    """Fields in which the recipes are not all the same."""
    first = shown[0].recipe
    changed = [{change.name: change for change in recipe_file.changes(first, each.recipe)} for each in shown]
    found = {name: change.before for each in changed for name, change in each.items()}
    rows = [
        [
            escape(name),
            *(escape(str(each[name].after if name in each else before)) for each in changed),
        ]
        for name, before in found.items()
    ]
    if not rows:
        return '<p class="empty">The recipes are the same.</p>'
    return table(["field", *(each.name for each in shown)], rows)


def samples(shown: Sequence[Shown]) -> str:
    """What each run's model wrote at its end."""
    texts = [(number, each) for number, each in enumerate(shown) if each.sample]
    if not texts:
        return '<p class="empty">No run has written one yet.</p>'
    return "".join(
        f'<h3><span class="key k{number}"></span>{escape(each.name)}</h3><pre>{escape(each.sample)}</pre>'
        for number, each in texts
    )
