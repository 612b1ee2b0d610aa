"""The sections of a run's page: each says what it shows, or how to make a run record it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ranker.reports.run_page.charts import Line, heat_map, line_chart, number
from ranker.reports.run_page.recorded import Recorded, Series

LAYERS = {"dcn": "s4", "bottom_first": "s0", "bottom_top": "s1"}
SIGNS = {
    "grad_norm": "gradient, norm2(g)",
    "grad_over_weight": "gradient over weights, norm2(g) / norm2(w)",
    "update_max": "update, infinity norm of r",
    "sigma": "sigma of the optimizer in use",
    "dead_relus": "share of dead ReLUs",
    "activation_max": "activations, infinity norm",
}
RULES = {"sigma": ("in use", "s0"), "sigma_gc": ("GC", "s2"), "sigma_agc": ("AGC", "s3")}
RULES |= {"sigma_lamb": ("LAMB", "s4"), "sigma_clippy": ("Clippy", "s1")}


def tasks(run: Recorded) -> str:
    """Loss of each task, and beside it the AUC or the error."""
    names = list(dict.fromkeys(n.split("/")[0] for n in run.matching("train/") if n.endswith("/loss") and "/" in n))
    if not names:
        return _missing("No losses yet: metrics.csv is written every train.log_every steps (not with logger=none).")
    charts = [_chart(run, "training loss, weighted sum of tasks", [("training", "train/loss", "s0", False)])]
    charts.append(_chart(run, "learning rate", [("lr", "lr", "s2", False)], log=False))
    for name in names:
        charts.append(_chart(run, f"{name}: loss", [("training", f"train/{name}/loss", "s0", False)]))
        metric = "auc" if f"train/{name}/auc" in run.series else "rmse"
        wanted = [
            ("training, streaming", f"train/{name}/{metric}", "s0", False),
            ("progressive", f"progressive/{name}/{metric}", "s2", True),
            ("hold-out", f"val/{name}/{metric}", "s1", True),
        ]
        chance = (0.5, "no better than chance") if metric == "auc" else None
        charts.append(_chart(run, f"{name}: {metric.upper()}", wanted, log=False if chance else None, reference=chance))
    return _grid(charts)


def sigma(run: Recorded) -> str:
    """How strongly each tensor was clipped, over steps."""
    rows = run.matching("sigma/")
    if rows:
        note = "Colourless: not clipped (1). Full: 1/1000 of the step or less. A cell shows the smallest of its steps."
        ordered = dict(sorted(rows.items(), key=lambda item: item[0].endswith("bias")))
        return heat_map(
            "sigma by tensor, weights first", ordered, last_step=run.last_step, events=run.events, note=note
        )
    if run.matching("signs/"):
        optim = (run.config.get("optim") or {}).get("name", "this optimizer")
        return _missing(f"No tensor has a sigma of its own: {optim} clips nothing, or keeps no statistics.")
    return _missing("Not recorded. Switch it on: callbacks.early_signs.every=10 (1 for every step).")


def early_signs(run: Recorded) -> str:
    """What moves before the loss does, by layer; what other rules would do; how tasks pull."""
    seen = run.matching("signs/")
    if not seen:
        return _missing("Not recorded. Switch them on: callbacks.early_signs.every=10 (1 for every step).")
    roles = list(dict.fromkeys(n.rsplit("/", 1)[0] for n in seen if not n.startswith("task_")))
    charts = []
    for sign, title in SIGNS.items():
        lines = [_layer(role, seen[f"{role}/{sign}"]) for role in reversed(roles) if f"{role}/{sign}" in seen]
        if any(math.isfinite(v) for line in lines for v in line.series.values):
            charts.append(line_chart(title, lines, last_step=run.last_step, events=run.events))
    for role in (role for role in roles if role in LAYERS):
        rules = [sign.rsplit("/", 1)[1] for sign in seen if sign.startswith(f"{role}/sigma")]
        lines = [Line(*_rule(rule, seen[f"{role}/{rule}"])) for rule in rules]
        if len(lines) > 1:
            charts.append(
                line_chart(
                    f"{role}: sigma that each rule would choose", lines, last_step=run.last_step, events=run.events
                )
            )
    pulls = run.matching("signs/task_norm/")
    if pulls:
        lines = [Line(task, series, f"s{i % 9}", dots=True) for i, (task, series) in enumerate(pulls.items())]
        title = "gradient of each task on the top shared layer, norm2"
        charts.append(line_chart(title, lines, last_step=run.last_step, events=run.events))
    cosines = {n.replace("/", " · "): s for n, s in run.matching("signs/task_cosine/").items()}
    heat = ""
    if cosines:
        note = "Blue: two tasks pull the same way. Red: against each other."
        title = "cosine between the tasks' gradients on the top shared layer"
        heat = heat_map(title, cosines, last_step=run.last_step, diverging=True, note=note)
    return _grid([*charts, heat])


def sharpness(run: Recorded) -> str:
    """How near the step is to the edge of stability."""
    seen = run.matching("sharpness/")
    if "ratio" not in seen:
        return _missing("Not measured: it costs tens of steps a look. Switch it on: callbacks.sharpness.every=100.")
    edge = (1.0, "edge: above it the step is too large")
    ratio = [Line("lr over the edge 2 / eigenvalue", seen["ratio"], "s1", dots=True)]
    values = [
        Line(label, seen[name], style, dots=True)
        for label, name, style in (
            ("Hessian", "hessian", "s0"),
            ("preconditioned, times sigma", "preconditioned", "s1"),
        )
        if name in seen
    ]
    shared: dict[str, Any] = {"last_step": run.last_step, "events": run.events}
    return _grid(
        [
            line_chart("sharpness against 2 / lr", ratio, reference=edge, log=_all_positive(seen["ratio"]), **shared),
            line_chart("largest eigenvalue", values, **shared),
        ]
    )


def events(run: Recorded) -> str:
    """What happened, and what was done about it."""
    if not run.events:
        off = "divergence" not in (run.config.get("callbacks") or {}) and bool(run.config)
        return _missing(
            "Nobody watched: this run had no callbacks.divergence (callbacks=default has it)."
            if off
            else "No divergence so far, and no rollback."
        )
    found = [e for e in run.events if e.get("kind") != "rollback"]
    back = [e for e in run.events if e.get("kind") == "rollback"]
    parts = []
    if found:
        head = ("kind", "step", "task that moved first", "depth", "length", "recovered at", "what happened")
        keys = ("kind", "step", "task", "depth", "length", "recovered_at", "reason")
        parts.append(_table(head, ([_badge(e), *(_text(e.get(key)) for key in keys[1:])] for e in found)))
    if back:
        head = ("rollback", "from step", "to step", "cause", "batches skipped", "rows skipped", "lr from then on")
        keys = ("try", "step", "to_step", "cause", "skipped_batches", "skipped_rows", "lr")
        parts.append(_table(head, ([_text(e.get(key)) for key in keys] for e in back)))
    return "".join(parts)


def holdout(run: Recorded) -> str:
    """The metrics of the last day by task."""
    metrics: Mapping[str, Any] = (run.summary or {}).get("metrics") or {}
    split = {name: name.split("/") for name in metrics if name.count("/") == 2}
    if not split:
        return _missing("Not evaluated yet: the hold-out's table is written when a run ends.")
    columns = list(dict.fromkeys(metric for *_, metric in split.values()))
    rows = []
    for task in dict.fromkeys(parts[1] for parts in split.values()):
        keys = [f"test/{task}/{column}" for column in columns]
        rows.append([escape(task), *(_metric(metrics, key) for key in keys)])
    return _table(("task", *columns), rows)


def _metric(metrics: Mapping[str, Any], key: str) -> str:
    if key not in metrics:
        return ""
    value = metrics[key]
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if key.endswith(("/observed", "/nonfinite")) else f"{value:.4f}"


def _chart(run: Recorded, title: str, wanted: Iterable[tuple[str, str, str, bool]], **options: Any) -> str:
    lines = [Line(label, run.series[n], style, dots) for label, n, style, dots in wanted if n in run.series]
    if not lines:
        return ""
    return line_chart(title, lines, last_step=run.last_step, events=run.events, **options)


def _layer(role: str, series: Series) -> Line:
    return Line(role, series, LAYERS.get(role, "faint"))


def _rule(sign: str, series: Series) -> tuple[str, Series, str]:
    label, style = RULES.get(sign, (sign.removeprefix("sigma_"), "s5"))
    return label, series, style


def _all_positive(series: Series) -> bool:
    return all(v > 0 for v in series.values if math.isfinite(v))


def _badge(event: Mapping[str, Any]) -> str:
    kind = escape(str(event.get("kind")))
    return f'<b class="kind {kind}">{kind}</b>'


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return f"{value[0]:,} to {value[1] - 1:,}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
