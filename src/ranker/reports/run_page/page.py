"""The page itself: head, facts, sections, styles."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from ranker.reports.run_page import sections
from ranker.reports.run_page.charts import number
from ranker.reports.run_page.recorded import Recorded

TOLD_AS_GOING = 120.0  # seconds without a sign of life after which a run may as well have been killed

SECTIONS = (
    ("tasks", "Losses and metrics by task", sections.tasks),
    ("events", "Divergences and rollbacks", sections.events),
    ("sigma", "Clipping by tensor", sections.sigma),
    ("signs", "Early signs by layer", sections.early_signs),
    ("sharpness", "Sharpness against 2 / lr", sections.sharpness),
    ("holdout", "Hold-out, at the end of training", sections.holdout),
)


def render(run: Recorded) -> str:
    """The page of a run, one string of HTML with all it needs inside."""
    here = files(__package__)
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in SECTIONS)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{draw(run)}</section>' for key, title, draw in SECTIONS
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(run.folder.name)}</title><style>{style}</style></head><body>"
        f"{_head(run)}<nav>{links}</nav><main>{body}{_configuration(run)}</main>"
        f'<div id="readout" hidden></div><script>{script}</script></body></html>\n'
    )


def _head(run: Recorded) -> str:
    status, reason = _status(run)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run))
    why = f'<p class="reason">{escape(reason)}</p>' if reason else ""
    key = "".join(
        f'<span><i class="key {kind}"></i>{kind}</span>'
        for kind in ("micro", "full", "shift", "rollback")
        if any(event.get("kind") == kind for event in run.events)
    )
    keys = f'<p class="legend">marked in every chart: {key}</p>' if key else ""
    return (
        f'<header><h1>{escape(run.folder.name)} <b class="status {status.split()[0]}">{escape(status)}</b></h1>'
        f"{why}<dl>{facts}</dl>{keys}</header>"
    )


def _status(run: Recorded) -> tuple[str, str]:
    if run.summary is not None:
        return str(run.summary.get("status", "unknown")), str(run.summary.get("reason") or "")
    age = f"{run.age:.0f} seconds" if run.age < TOLD_AS_GOING else f"{run.age / 60:,.0f} minutes"
    going = run.age < TOLD_AS_GOING
    return (
        "running" if going else "unfinished",
        f"No summary.json: {'still going' if going else 'killed, or stuck'}; last wrote something {age} ago.",
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
    for name, value in (("rows a step", batch), ("examples", summary.get("examples"))):
        if value:
            yield name, f"{value:,}"
    if summary.get("examples_per_second"):
        yield "examples a second", f"{summary['examples_per_second']:,.0f}"
    if summary.get("world_size"):
        yield "ranks", str(summary["world_size"])


def _configuration(run: Recorded) -> str:
    said: dict[str, Any] = {"folder": str(run.folder)}
    for name in ("versions", "commit", "git", "machine", "config_hash"):
        if (run.summary or {}).get(name):
            said[name] = run.summary[name]  # type: ignore[index]
    both = (("Configuration", run.config), ("Where and with what", said))
    details = "".join(
        f"<details><summary>{title}</summary><pre>{escape(yaml.safe_dump(content, sort_keys=False))}</pre></details>"
        for title, content in both
        if content
    )
    return f'<section id="configuration"><h2>Configuration</h2>{details}</section>'
