"""The HTML page of a run: one string that contains its charts, tables, styles and scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from ranker.reports.run_page import holdout
from ranker.reports.run_page.recorded import Recorded
from ranker.reports.web.charts import Line, cosine, heat_map, line_chart
from ranker.reports.web.document import Section, document, facts, grid, missing, table
from ranker.reports.web.frame import number
from ranker.reports.web.series import Series
from ranker.runs.metric_names import (
    LEARNING_RATE,
    PROGRESSIVE,
    SHARPNESS,
    SIGMA,
    SIGNS,
    TASK_COSINE,
    TASK_NORM,
    TRAIN,
    TRAIN_LOSS,
    VAL,
    task_metric,
)
from ranker.stability.worth import AUC_OF_CHANCE

RANKING_LOSSES = ("bpr", "softmax", "jrc")  # names of the options of loss= that rank rows inside a group
RUNNING_SECONDS = 120.0  # a run without summary that wrote nothing for longer counts as unfinished

LAYERS = {"dcn": "s4", "bottom_first": "s0", "bottom_top": "s1"}
SIGN_TITLES = {
    "step_cut": "step size: how many times smaller than 24 steps before (median)",
    "grad_norm": "gradient, norm2(g)",
    "grad_over_weight": "gradient over weights, norm2(g) / norm2(w)",
    "update_max": "update, infinity norm of r",
    "adapted": "share of coordinates whose accumulator has left its start, G > 2 G_0",
    "sigma": "sigma of the optimizer in use",
    "dead_relus": "share of dead ReLUs",
    "activation_max": "activations, infinity norm",
}
RULES = {"sigma": ("in use", "s0"), "sigma_gc": ("GC", "s2"), "sigma_agc": ("AGC", "s3")}
RULES |= {"sigma_lamb": ("LAMB", "s4"), "sigma_clippy": ("Clippy", "s1")}


def _tasks(run: Recorded) -> str:
    """Loss and AUC (or RMSE) of each task."""
    names = list(dict.fromkeys(n.split("/")[0] for n in run.matching(f"{TRAIN}/") if n.endswith("/loss") and "/" in n))
    if not names:
        return missing("No losses yet: metrics.csv is written every train.log_every steps (not with logger=none).")
    charts = [_chart(run, "training loss, weighted sum of tasks", [("training", TRAIN_LOSS, "s0", False)])]
    charts.append(_chart(run, "learning rate", [("lr", LEARNING_RATE, "s2", False)], log=False))
    for name in names:
        binary = task_metric(TRAIN, name, "auc") in run.series
        metric = "auc" if binary else "rmse"
        loss = "log loss, nats per label" if binary else "loss, squared error per label"
        charts.append(_chart(run, f"{name}: {loss}", [("training", task_metric(TRAIN, name, "loss"), "s0", False)]))
        for ranking in (r for r in RANKING_LOSSES if task_metric(TRAIN, name, r) in run.series):
            curve = [("training", task_metric(TRAIN, name, ranking), "s4", False)]
            charts.append(_chart(run, f"{name}: {ranking} loss inside groups", curve))
        wanted = [
            ("training, streaming", task_metric(TRAIN, name, metric), "s0", False),
            ("progressive", task_metric(PROGRESSIVE, name, metric), "s2", True),
            ("hold-out", task_metric(VAL, name, metric), "s1", True),
        ]
        chance = (0.5, "no better than chance") if metric == "auc" else None
        unit = "" if binary else ", in units of the label after scale and transform"
        charts.append(
            _chart(run, f"{name}: {metric.upper()}{unit}", wanted, log=False if chance else None, reference=chance)
        )
    return grid(charts)


def _sigma(run: Recorded) -> str:
    """Sigma, the clipping factor, of each tensor over steps."""
    rows = run.matching(SIGMA)
    if rows:
        note = "No colour: not clipped (1). Full colour: 1/1000 or less. A cell shows the smallest value of its steps."
        ordered = dict(sorted(rows.items(), key=lambda item: item[0].endswith("bias")))
        title = "sigma by tensor, weights first"
        return heat_map(title, ordered, last_step=run.last_step, events=run.events, note=note)
    if _early(run):
        optim = (run.config.get("optim") or {}).get("name", "this optimizer")
        return missing(f"No tensor has a sigma: {optim} does not clip, or keeps no statistics.")
    return missing("Not recorded. Record it with callbacks.early_signs.every=10 (1 for every step).")


def _early_signs(run: Recorded) -> str:
    """Early signs by layer, the sigma of other clipping rules, and the gradients of the tasks."""
    seen, cuts = _early(run), _cuts(run)
    absent = missing("Not recorded. Record them with callbacks.early_signs.every=10 (1 for every step).")
    if not seen and not cuts:
        return absent
    roles = list(dict.fromkeys(n.rsplit("/", 1)[0] for n in seen if not n.startswith("task_")))
    charts = []
    if cuts:
        lines = [Line(layer, series, f"s{i % 9}") for i, (layer, series) in enumerate(cuts.items())]
        title = "by how much the last steps cut the step size: median of sqrt(G_now / G_before) by layer"
        charts.append(_draw(run, title, lines, reference=(1.0, "not cut")))
    for sign, title in SIGN_TITLES.items():
        lines = [
            Line(role, seen[f"{role}/{sign}"], LAYERS.get(role, "faint"))
            for role in reversed(roles)
            if f"{role}/{sign}" in seen
        ]
        if any(math.isfinite(v) for line in lines for v in line.series.values):
            charts.append(_draw(run, title, lines))
    for role in (role for role in roles if role in LAYERS):
        rules = [sign.rsplit("/", 1)[1] for sign in seen if sign.startswith(f"{role}/sigma")]
        lines = [Line(*_rule(rule, seen[f"{role}/{rule}"])) for rule in rules]
        if len(lines) > 1:
            charts.append(_draw(run, f"{role}: sigma of each clipping rule", lines))
    pulls = run.matching(TASK_NORM)
    if pulls:
        lines = [Line(task, series, f"s{i % 9}", dots=True) for i, (task, series) in enumerate(pulls.items())]
        charts.append(_draw(run, "gradient of each task on the top shared layer, norm2", lines))
    cosines = {n.replace("/", " · "): s for n, s in run.matching(TASK_COSINE).items()}
    if cosines:
        note = "Blue: the gradients of two tasks point the same way. Red: they are opposed."
        title = "cosine between the tasks' gradients on the top shared layer"
        charts.append(heat_map(title, cosines, last_step=run.last_step, shade=cosine, note=note))
    return grid(charts) + ("" if seen else absent)


def _cuts(run: Recorded) -> dict[str, Series]:
    """By how much the step size was cut, by layer. The divergence detector records it, also without early signs."""
    return {n.removesuffix(CUT): s for n, s in run.matching(SIGNS).items() if n.endswith(CUT)}


def _early(run: Recorded) -> dict[str, Series]:
    """What the early signs recorded, without the detector's own signals."""
    return {n: s for n, s in run.matching(SIGNS).items() if not n.endswith((CUT, f"{CUT}_grown"))}


def _sharpness(run: Recorded) -> str:
    """How close the learning rate is to the edge of stability."""
    seen = run.matching(SHARPNESS)
    if "ratio" not in seen:
        return missing("Not measured: each probe costs tens of steps. Measure it with callbacks.sharpness.every=100.")
    edge = (1.0, "edge: above it the learning rate is too high")
    ratio = [Line("lr over the edge 2 / eigenvalue", seen["ratio"], "s1", dots=True)]
    positive = all(v > 0 for v in seen["ratio"].values if math.isfinite(v))
    curves = (("Hessian", "hessian", "s0"), ("preconditioned, times sigma", "preconditioned", "s1"))
    values = [Line(label, seen[name], style, dots=True) for label, name, style in curves if name in seen]
    against = _draw(run, "sharpness against 2 / lr", ratio, reference=edge, log=positive)
    return grid([against, _draw(run, "largest eigenvalue", values)])


def _events(run: Recorded) -> str:
    """Divergences and rollbacks."""
    if not run.events:
        off = "divergence" not in (run.config.get("callbacks") or {}) and bool(run.config)
        reason = "Not recorded: this run had no callbacks.divergence (callbacks=default has it)."
        return missing(reason if off else "No divergence so far, and no rollback.")
    found = [e for e in run.events if e.get("kind") != "rollback"]
    back = [e for e in run.events if e.get("kind") == "rollback"]
    parts = []
    if found:
        head = ("kind", "step", "task that moved first", "depth", "length", "recovered at", "what happened")
        keys = ("kind", "step", "task", "depth", "length", "recovered_at", "reason")
        parts.append(table(head, ([_badge(e), *(_text(e.get(key)) for key in keys[1:])] for e in found)))
    if back:
        head = ("rollback", "from step", "to step", "cause", "batches skipped", "rows skipped", "lr from then on")
        keys = ("try", "step", "to_step", "cause", "skipped_batches", "skipped_rows", "lr")
        parts.append(table(head, ([_text(e.get(key)) for key in keys] for e in back)))
    return "".join(parts)


def _holdout(run: Recorded) -> str:
    """Final metrics on the hold-out, with their confidence intervals, segments and reliability diagrams."""
    summary = run.summary or {}
    tables = holdout.metric_tables(summary)
    if not tables:
        return missing("Not evaluated yet: the run evaluates the hold-out when it ends.")
    parts = [table(*each) for each in tables]
    useless = summary.get("no_better_than_constant")
    why = f"NE >= 1, R2 <= 0 or AUC < {AUC_OF_CHANCE:g}"
    note = f"No better than a constant prediction ({why}): {', '.join(useless)}." if useless else ""
    notes = [text for text in (holdout.interval_note(summary), note) if text]
    parts += [f'<p class="reason">{escape(text)}</p>' for text in notes]
    if diagrams := holdout.reliability_diagrams(summary):
        parts.append(grid(diagrams))
    parts += [f"<h3>{escape(title)}</h3>{table(*each)}" for title, each in holdout.segment_tables(summary)]
    return "".join(parts)


CUT = "/step_cut"
SECTIONS = (
    ("tasks", "Losses and metrics by task", _tasks),
    ("events", "Divergences and rollbacks", _events),
    ("sigma", "Clipping by tensor", _sigma),
    ("signs", "Early signs by layer", _early_signs),
    ("sharpness", "Sharpness against 2 / lr", _sharpness),
    ("holdout", "Hold-out, at the end of training", _holdout),
)


def render(run: Recorded) -> str:
    """Renders the page of a run. It loads nothing from the network."""
    sections = [Section(key, title, draw(run)) for key, title, draw in SECTIONS]
    return document(run.folder.name, head=_head(run), sections=[*sections, _configuration(run)])


def _head(run: Recorded) -> str:
    status, reason = _status(run)
    why = f'<p class="reason">{escape(reason)}</p>' if reason else ""
    key = "".join(
        f'<span><i class="key {kind}"></i>{kind}</span>'
        for kind in ("micro", "full", "shift", "unsettled", "rollback")
        if any(event.get("kind") == kind for event in run.events)
    )
    keys = f'<p class="legend">marked in every chart: {key}</p>' if key else ""
    return (
        f'<h1>{escape(run.folder.name)} <b class="status {status.split()[0]}">{escape(status)}</b></h1>'
        f"{why}{facts(_facts(run))}{keys}"
    )


def _status(run: Recorded) -> tuple[str, str]:
    if run.summary is not None:
        reason = str(run.summary.get("reason") or "")
        status = "interrupted" if reason.startswith("interrupted") else str(run.summary.get("status", "unknown"))
        return status, reason
    age = f"{run.age:.0f} seconds" if run.age < RUNNING_SECONDS else f"{run.age / 60:,.0f} minutes"
    going = run.age < RUNNING_SECONDS
    return (
        "running" if going else "unfinished",
        f"No summary.json: {'still running' if going else 'killed or stuck'}; last write {age} ago.",
    )


def _facts(run: Recorded) -> Iterator[tuple[str, str]]:
    summary, config = run.summary or {}, run.config
    for group in ("model", "optim", "data", "scale"):
        name = summary.get(group) or (config.get(group) or {}).get("name")
        if name:
            yield group, str(name)
    mult = summary.get("lr_mult", config.get("lr_mult"))
    if mult is not None:
        lr = summary.get("lr")
        yield "learning rate", f"{number(float(mult))}x" + (f" = {number(float(lr))}" if lr is not None else "")
    if "seed" in config:
        yield "seed", str(config["seed"])
    yield "steps", f"{run.last_step:,}"
    batch = (config.get("scale") or {}).get("batch_size")
    for name, value in (("rows per step", batch), ("examples", summary.get("examples"))):
        if value:
            yield name, f"{value:,}"
    if summary.get("examples_per_second"):
        yield "examples per second", f"{summary['examples_per_second']:,.0f}"
    if summary.get("world_size"):
        yield "ranks", str(summary["world_size"])


def _configuration(run: Recorded) -> Section:
    origin: dict[str, Any] = {"folder": str(run.folder)}
    for name in ("versions", "commit", "git", "machine", "config_hash"):
        if (run.summary or {}).get(name):
            origin[name] = run.summary[name]  # type: ignore[index]
    both = (("Configuration", run.config), ("Folder, versions and machine", origin))
    details = "".join(
        f"<details><summary>{title}</summary><pre>{escape(yaml.safe_dump(content, sort_keys=False))}</pre></details>"
        for title, content in both
        if content
    )
    return Section("configuration", "Configuration", details)


def _chart(run: Recorded, title: str, wanted: Iterable[tuple[str, str, str, bool]], **options: Any) -> str:
    lines = [Line(label, run.series[n], style, dots) for label, n, style, dots in wanted if n in run.series]
    return _draw(run, title, lines, **options) if lines else ""


def _draw(run: Recorded, title: str, lines: Sequence[Line], **options: Any) -> str:
    return line_chart(title, lines, last_step=run.last_step, events=run.events, **options)


def _rule(sign: str, series: Series) -> tuple[str, Series, str]:
    label, style = RULES.get(sign, (sign.removeprefix("sigma_"), "s5"))
    return label, series, style


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
