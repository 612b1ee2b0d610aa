"""The HTML page of a log before training: warnings, label rates and drift by day, every feature, leak suspects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

import numpy as np

from ranker.data.columns import CategoricalFeature, Task
from ranker.data.inspection import SUSPECT, Findings
from ranker.data.log_profile import QUANTILES, FeatureProfile, Floats, LogProfile
from ranker.data.schema import Schema
from ranker.reports.web.charts import HEAT_LEVELS, Line, heat_map, line_chart
from ranker.reports.web.document import Cell, Section, document, facts, grid, table
from ranker.reports.web.frame import number
from ranker.reports.web.series import Series

SHIFTED = 0.25  # a drift from which a feature counts as shifted
NOTABLE = 0.8  # an AUC of a single feature that is worth a look
HEAD = 5  # values that a table shows; the tip over them shows more
LONG_HEAD = 20
BARS = 24  # of a histogram
HEAT_ROWS = 60  # features of a heat map, those that drift most
Shade = Callable[[float], str]
TEXT = 24  # characters of a value that are shown


def render(profile: LogProfile, findings: Findings, warnings: Sequence[str], schema: Schema, *, where: str) -> str:
    """Renders the page of a log. It loads nothing from the network.

    Args:
        profile: what the features and labels are like.
        findings: what looked wrong in the rows.
        warnings: one line each, those of the findings among them.
        schema: of the log.
        where: the folder or URL, as the user wrote it.
    """
    return document(
        f"{schema.name}: inspection",
        head=_head(profile, findings, schema, where),
        sections=[
            Section("warnings", "What looks wrong", _warnings(warnings)),
            Section("labels", "Labels by day", _labels(profile, schema)),
            Section("features", "Features", _features(profile)),
            Section("drift", "Drift by day", _drift(profile)),
            Section("nulls", "Nulls by day", _nulls(profile)),
            Section("aucs", "AUC of each feature alone", _aucs(profile, schema)),
        ],
    )


def _head(profile: LogProfile, findings: Findings, schema: Schema, where: str) -> str:
    span = f"{profile.starts[0]} to {_last_day(findings)}"
    kinds = [feature.kind for feature in schema.categorical]
    pairs = [
        ("rows", f"{profile.rows:,}"),
        ("bad rows", f"{findings.bad:,}"),
        ("days (UTC)", span),
        ("files", f"{len(findings.files):,}"),
        ("tasks", str(len(schema.tasks))),
        ("dense features", str(len(schema.dense))),
        ("categorical", str(kinds.count("one_hot"))),
        ("lists", str(len(kinds) - kinds.count("one_hot"))),
    ]
    note = (
        "Counts, nulls and label rates are of all rows. Quantiles, drift and AUCs are of a sample of "
        f"{profile.sampled:,} rows, as many of each {_period(profile)} where there are so many. Numbers of distinct "
        "values above 4,000 are estimates, within 3 % or so."
    )
    return (
        f'<h1>{escape(schema.name)}</h1><p class="reason">{escape(where)}</p>{facts(pairs)}<p class="note">{note}</p>'
    )


def _last_day(findings: Findings) -> str:
    last = max(entry.time_max_ms or 0 for entry in findings.files)
    return str(np.datetime64(last, "ms").astype("datetime64[D]"))


def _period(profile: LogProfile) -> str:
    return "day" if profile.days == 1 else f"{profile.days} days"


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return '<p class="missing">Nothing.</p>'
    return '<ul class="warnings">' + "".join(f"<li>{escape(line)}</li>" for line in warnings) + "</ul>"


def _labels(profile: LogProfile, schema: Schema) -> str:
    names = _names(profile)
    figures = [_over_days("rows", profile.rows_P, names, "s7")]
    for task in schema.tasks:
        values = profile.labels[task.name]
        scale = 100.0 if task.type == "binary" else 1.0
        title = f"{task.name}: {_unit(task)}, {100 * profile.observed[task.name]:.4g} % of the rows have a label"
        figures.append(_over_days(title, scale * values, names, "s0"))
    return grid(figures)


def _unit(task: Task) -> str:
    return "positives in %" if task.type == "binary" else "mean label, after scale and transform"


def _over_days(title: str, values: Floats, names: Sequence[str], style: str) -> str:
    line = Line(title.split(":")[0], _finite(values), style, dots=True)
    return line_chart(title, [line], last_step=max(1, len(names) - 1), log=False, names=names, legend=False)


def _finite(values: Floats) -> Series:
    known = [(place, float(value)) for place, value in enumerate(values) if math.isfinite(value)]
    return Series([place for place, _ in known], [value for _, value in known])


def _names(profile: LogProfile) -> list[str]:
    """The days as ticks of an axis: with the year only where there are several."""
    years = {day[:4] for day in profile.starts}
    return [day if len(years) > 1 else day[5:] for day in profile.starts]


def _features(profile: LogProfile) -> str:
    head = ["feature", "kind", "column", "nulls, %", "distinct", "table rows", "1 % · median · 99 %", "values"]
    rows: list[list[str | Cell]] = []
    for one in profile.features:
        feature, column = one.feature, one.column
        kind = feature.kind if isinstance(feature, CategoricalFeature) else "dense"
        table_rows = feature.rows if isinstance(feature, CategoricalFeature) else 0
        title = "" if feature.column == feature.name else f' title="column {escape(feature.column)}"'
        rows.append(
            [
                f"<span{title}>{escape(feature.name)}</span>",
                kind.replace("_", "-"),
                escape(column.type or "null"),
                Cell(f"{100 * column.null_share:.4g}", column.null_share),
                Cell(f"{'' if column.distinct.exact else '~'}{column.distinct.estimate:,}", column.distinct.estimate),
                Cell(f"{table_rows:,}", table_rows) if table_rows else "",
                _quantiles(one),
                _histogram(one) if len(one.values) and kind == "dense" else _values(one),
            ]
        )
    return table(head, rows, sortable=True, search="show only features with") + _fits(profile)


def _fits(profile: LogProfile) -> str:
    """Remarks on hash tables that are too small: ids that share a row with another one."""
    crowded = []
    for one in profile.features:
        buckets = one.feature.hash_buckets if isinstance(one.feature, CategoricalFeature) else 0
        ids = one.column.distinct.estimate
        if buckets and ids > 0.5 * buckets:
            sharing = 1.0 - (1.0 - 1.0 / buckets) ** (ids - 1)
            crowded.append(
                f"{one.feature.name}: {ids:,} ids in {buckets:,} buckets, {sharing:.0%} share one with another"
            )
    return f'<p class="note">{escape("; ".join(crowded))}</p>' if crowded else ""


def _quantiles(one: FeatureProfile) -> Cell:
    if not len(one.values):
        return Cell("")
    low, _, middle, _, high = (float(value) for value in np.quantile(one.values, QUANTILES))
    return Cell(" · ".join(map(number, (low, middle, high))), middle)


def _histogram(one: FeatureProfile) -> str:
    """Bars between the 1 % and the 99 % quantile, on a logarithmic axis where the values span much."""
    low, high = (float(value) for value in np.quantile(one.values, (0.01, 0.99)))
    kept = one.values[(one.values >= low) & (one.values <= high)]
    log = low >= 0 and high > 100 * max(float(np.median(kept)), 1e-12)
    counts, _ = np.histogram(np.log1p(kept) if log else kept, bins=BARS)
    tall = counts / max(1, counts.max())
    bars = "".join(
        f'<rect x="{5 * i}" y="{26 - 24 * height:.1f}" width="4" height="{24 * height:.1f}"/>'
        for i, height in enumerate(tall.tolist())
        if height > 0
    )
    axis = ", logarithmic" if log else ""
    tip = f"{number(low)} to {number(high)}{axis}; smallest {number(one.column.low)}, largest {number(one.column.high)}"
    box = f'viewBox="0 0 {5 * BARS} 27" role="img" aria-label="{escape(tip)}"'
    return f'<svg class="bars" {box}><title>{escape(tip)}</title>{bars}</svg>'


def _values(one: FeatureProfile) -> str:
    """The most frequent values with their shares."""
    total = one.column.elements.known if one.column.elements is not None else one.column.known
    head = [(_short(value), count / max(1, total)) for value, count in one.column.frequent.head(LONG_HEAD)]
    tip = ", ".join(f"{value} {100 * share:.3g} %" for value, share in head)
    shown = "".join(
        f'<span class="share"><i style="width:{max(1, 60 * share):.0f}px"></i>{escape(value)} '
        f"<small>{100 * share:.3g} %</small></span>"
        for value, share in head[:HEAD]
    )
    return f'<span class="shares" title="{escape(tip)}">{shown}</span>'


def _short(value: object) -> str:
    text = str(value) if str(value).strip() else repr(value)
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"


def _drift(profile: LogProfile) -> str:
    if len(profile.starts) < 2:
        return '<p class="missing">The log has one day.</p>'
    rows = {one.feature.name: one.drift_P for one in profile.features if np.isfinite(one.drift_P).any()}
    note = (
        f"How far the values of a {_period(profile)} are from those of all others: population stability index, above "
        f"what chance gives. No colour: 0. Full colour: {2 * SHIFTED:g} or more; {SHIFTED} counts as a shift."
    )
    return _heat("population stability index", rows, profile, note, lambda value: _heated(value / (2 * SHIFTED)))


def _nulls(profile: LogProfile) -> str:
    rows = {one.feature.name: one.nulls_P for one in profile.features if np.nanmax(one.nulls_P, initial=0.0) > 0}
    if not rows or len(profile.starts) < 2:
        return ""
    note = "Share of nulls. No colour: none. Full colour: all."
    return _heat("share of nulls", rows, profile, note, lambda value: _heated(math.sqrt(value)))


def _heat(title: str, rows: dict[str, Floats], profile: LogProfile, note: str, shade: Shade) -> str:
    names = _names(profile)
    most = sorted(rows, key=lambda name: -float(np.nanmax(rows[name])))[:HEAT_ROWS]
    shown = {
        name: Series(
            [p for p, v in enumerate(rows[name]) if math.isfinite(v)], [v for v in rows[name] if math.isfinite(v)]
        )
        for name in most
    }
    if len(most) < len(rows):
        note += f" The {len(most)} features with the most of {len(rows)}."
    return grid([heat_map(title, shown, last_step=len(names) - 1, shade=shade, names=names, note=note)])


def _heated(share: float) -> str:
    return f"hot h{round(min(1.0, max(0.0, share)) * HEAT_LEVELS)}"


def _aucs(profile: LogProfile, schema: Schema) -> str:
    tasks = [task.name for task in schema.tasks if any(task.name in one.aucs for one in profile.features)]
    if not tasks:
        return '<p class="missing">No task has enough labels of both kinds in the sample.</p>'
    rows: list[list[str | Cell]] = []
    for one in sorted(profile.features, key=lambda one: -max(one.aucs.values(), default=0.0)):
        if one.aucs:
            rows.append([escape(one.feature.name), *(_auc(one.aucs.get(task)) for task in tasks)])
    note = (
        f"A feature that ranks a label almost alone was most likely written after it: from {SUSPECT} on it is a "
        "suspect (red). 0.5 says that it tells nothing. Ids are scored on rows that their means were not taken from."
    )
    return f'<p class="note">{note}</p>{table(["feature", *tasks], rows, sortable=True)}'


def _auc(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    look = "suspect" if value >= SUSPECT else "notable" if value >= NOTABLE else ""
    return Cell(f'<b class="auc {look}">{value:.3f}</b>' if look else f"{value:.3f}", value)


def lines(profile: LogProfile) -> Iterator[str]:
    """What the profile adds to the warnings of an inspection: features that shift, one line each."""
    for one in profile.features:
        if np.isfinite(one.drift_P).any() and float(np.nanmax(one.drift_P)) >= SHIFTED:
            worst = int(np.nanargmax(one.drift_P))
            since = profile.starts[worst]
            value = float(one.drift_P[worst])
            name = one.feature.name
            yield f"feature '{name}' is distributed otherwise on {since} than on other days (PSI {value:.2f})"
