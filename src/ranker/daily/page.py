"""The HTML page of daily training: one string with charts by day, verdicts, drift and late files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ranker.daily import ledger as kinds
from ranker.daily.ledger import Ledger
from ranker.reports.web.charts import Line, heat_map, line_chart
from ranker.reports.web.document import Section, document, grid, table
from ranker.reports.web.series import Series

_TITLES = {"auc": "AUC", "ne": "NE (1: no better than a constant)", "rmse": "RMSE", "calibration": "calibration"}
_KINDS = {kinds.SKIPPED: "full", kinds.REFUSED: "micro"}  # CSS classes of the marks
_LARGE_PSI = 0.25
_WORST_FEATURES = 20


def render(ledger: Ledger, *, served: str | None, waiting: str = "") -> str:
    """The page.

    Args:
        ledger: what was decided.
        served: day of the model that is served.
        waiting: why nothing more is done, such as a drift that stops; empty if all is well.
    """
    lines = list(ledger.days.values())
    sections = []
    if lines:
        sections = [
            Section("quality", "The served model on the day after", grid(_quality(lines))),
            Section("days", "Days, the newest first", _days(lines)),
            Section("drift", "Drift of features and labels", _drift(lines)),
            Section("running", "Speed and learning rate", grid(_running(lines))),
        ]
    sections.append(Section("late", "Late files", _late(ledger.lines)))
    return document("Evenkeel, day after day", head=_head(lines, served, waiting), sections=sections)


def _head(lines: Sequence[Mapping[str, Any]], served: str | None, waiting: str) -> str:
    count = {verdict: sum(line["verdict"] == verdict for line in lines) for verdict in kinds.VERDICTS}
    said = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
    serving = f"Served: the model of <b>{escape(served)}</b>." if served else "Nothing is served yet."
    stop = f'<p class="missing"><b>Waiting:</b> {escape(waiting)}</p>' if waiting else ""
    return f"<h1>Day after day</h1><p>{serving} {len(lines)} days: {said}.</p>{stop}"


def _quality(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per task and metric, the model that is served from this day on, the day's own model, and refusals as marks."""
    names = list(
        dict.fromkeys(name for line in lines for name in {**(line["metrics"] or {}), **(line["served_before"] or {})})
    )
    charts = []
    for name in (name for name in names if name.rpartition("/")[2] in _TITLES):
        task, _, metric = name.rpartition("/")
        served = [(i, _served(line).get(name)) for i, line in enumerate(lines)]
        own = [
            (i, (line["metrics"] or {}).get(name)) for i, line in enumerate(lines) if line["verdict"] != kinds.PROMOTED
        ]
        drawn = [Line("served from then on", _series(served), "s0", True)]
        if any(value is not None for _, value in own):
            drawn.append(Line("refused", _series(own), "s3", True))
        level = {"ne": (1.0, "no better than a constant"), "calibration": (1.0, "unbiased")}.get(metric)
        charts.append(_chart(f"{task}: {_TITLES[metric]}", drawn, lines, reference=level))
    return charts


def _served(line: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Metrics on the day after of the model that is served once the day is decided."""
    return (line["metrics"] if line["verdict"] == kinds.PROMOTED else line["served_before"]) or {}


def _days(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number_, line in reversed(list(enumerate(lines, 1))):
        events = line["events"]
        what = [f"{events['micro']} micro" if events["micro"] else "", "diverged" if events["full"] else ""]
        tries = "<br>".join(
            escape(f"{t['try']}: {t['changes']}, {t['status']}" + (f" ({t['reason']})" if t["reason"] else ""))
            + "".join(f'<br><a href="{escape(path)}">{escape(path)}</a>' for path in t["capsules"])
            for t in line["tries"]
        )
        headroom = "" if line["headroom"] is None else f"{line['headroom']:.2f}"
        alarms = "<br>".join(escape(alarm) for alarm in line["drift"].get("alarms", ()))
        trained = line["day"] if line["first"] == line["day"] else f"{line['first']} to {line['day']}"
        cells = [
            str(number_),
            escape(trained).replace("-", "&#8209;"),  # does not break
            f'<b class="kind {_KINDS.get(line["verdict"], "")}">{escape(line["verdict"])}</b>',
            escape("; ".join(filter(None, [*line["reasons"], line["note"]]))),
            escape(line["parent"] or "random weights").replace("-", "&#8209;"),
            f"{line['rows']:,}",
            escape(", ".join(filter(None, what)) or "none"),
            headroom,
            tries,
            alarms,
        ]  # fmt: skip
        rows.append(cells)
    head = ["no.", "day", "verdict", "why", "from", "rows", "events", "headroom", "tries", "drift"]
    note = (
        '<p class="note">Headroom: by how much the learning rate could grow until it reaches 2 / sharpness; measured '
        "with callbacks.sharpness.every=N. From: the model that the day started from.</p>"
    )
    return note + table(head, rows)


def _drift(lines: Sequence[Mapping[str, Any]]) -> str:
    """Population stability index by feature and day, the label rates, and the share of new ids."""
    psi: dict[str, list[tuple[int, float | None]]] = {}
    for i, line in enumerate(lines):
        for name, value in line["drift"].get("psi", {}).items():
            psi.setdefault(name, []).append((i, value))
    worst = sorted(psi, key=lambda name: -max((v for _, v in psi[name] if v is not None), default=0.0))[
        :_WORST_FEATURES
    ]
    parts = ""
    if worst:
        # Drawn as factors: no colour at PSI 0, full colour far above what is called large.
        cells = {
            f"{name} (max {max((v or 0.0) for _, v in psi[name]):.2f})": _series(
                [(i, None if v is None else math.exp(-v / _LARGE_PSI)) for i, v in psi[name]]
            )
            for name in worst
        }
        note = (
            f"exp(-PSI / {_LARGE_PSI:g}): no colour is no drift; 0.37 is a PSI of {_LARGE_PSI:g}, usually called large."
        )
        parts += heat_map(
            "population stability of dense features against the days before",
            cells,
            last_step=max(len(lines) - 1, 1),
            names=[line["day"] for line in lines],
            note=note,
        )
    charts = []
    for key, title in (("labels", "mean label (rate of positives)"), ("new_ids", "share of rows with a new id")):
        names = list(dict.fromkeys(name for line in lines for name in line["drift"].get(key, {})))
        drawn = [
            Line(
                name,
                _series([(i, line["drift"].get(key, {}).get(name)) for i, line in enumerate(lines)]),
                f"s{k % 9}",
                True,
            )
            for k, name in enumerate(names)
        ]
        if drawn:
            charts.append(_chart(title, drawn, lines))
    return parts + grid(charts)


def _running(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    wanted = (
        ("rows_per_second", "rows per second"),
        ("rows", "rows of the day"),
        ("lr", "learning rate of the last try"),
    )
    charts = [
        _chart(title, [Line(title, _series([(i, line[key]) for i, line in enumerate(lines)]), "s0", True)], lines)
        for key, title in wanted
    ]
    if any(line["headroom"] is not None for line in lines):
        series = _series([(i, line["headroom"]) for i, line in enumerate(lines)])
        level = (1.0, "the edge of stability")
        charts.append(
            _chart("headroom of the learning rate", [Line("headroom", series, "s1", True)], lines, reference=level)
        )
    return charts


def _chart(title: str, drawn: Sequence[Line], lines: Sequence[Mapping[str, Any]], **options: Any) -> str:
    events = [
        {
            "kind": _KINDS[line["verdict"]],
            "step": i,
            "reason": f"{line['day']} {line['verdict']}: {'; '.join(line['reasons'])}",
        }
        for i, line in enumerate(lines)
        if line["verdict"] in _KINDS
    ]
    names = [line["day"] for line in lines]
    return line_chart(
        f"{title}, by day", drawn, last_step=max(len(lines) - 1, 1), events=events, names=names, log=False, **options
    )


def _late(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [escape(line["day"]), escape(", ".join(sorted(line["files"])))]
        for line in lines
        if line["verdict"] == kinds.LATE
    ]
    if not rows:
        return ""
    text = "<p>These files came or changed after their day was done. Nothing was trained on them.</p>"
    return text + table(["day", "files"], rows)


def _series(points: Iterable[tuple[int, float | None]]) -> Series:
    known = [(i, float(value)) for i, value in points if value is not None]
    return Series([i for i, _ in known], [value for _, value in known])
