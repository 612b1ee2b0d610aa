"""The model card of a checkpoint or an export: what it learned from, how good it is, and where it comes from.

``model_card.json`` is for programs. ``MODEL_CARD.md`` has the same for people, with the front matter of a model card of
the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ranker.atomic import write_text
from ranker.data.log import Log
from ranker.runs.config_identity import config_hash
from ranker.runs.run_folder import EVENTS, RunFolder, plain, read_summary, versions, whole_lines

CARD, CARD_TEXT = "model_card.json", "MODEL_CARD.md"
FORMAT = 1
# In the configuration: what the run continues, if it did not begin with random weights.
PARENT = "warm_start.parent"
_EVENTS_SHOWN = 20


def span_of(log: Log) -> dict[str, Any]:
    """Rows and times (UTC, ISO 8601) of the training rows and of the hold-out of a log."""
    parts = {"training": (0, log.train_rows), "hold_out": (log.train_rows, log.num_rows)}
    return {
        name: {"rows": stop - start}
        | ({"from": _iso(log.time_at_row(start)), "to": _iso(log.time_at_row(stop - 1))} if stop > start else {})
        for name, (start, stop) in parts.items()
    }


def card_of(
    folder: RunFolder,
    *,
    log: Log,
    step: int,
    checkpoint: str,
    metrics: Mapping[str, Any],
    gate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a card, from the run folder and what was measured.

    Args:
        folder: the run folder, with config.yaml. Without a summary the run is still going, or was killed.
        log: the log that the run was trained on.
        step: optimizer step of the weights.
        checkpoint: which checkpoint it is, in words.
        metrics: of these weights on the hold-out, by ``<task>/<metric>``.
        gate: the verdict of the quality gate; None where it was not asked.
    """
    cfg, summary = folder.read_config(), read_summary(folder.path) or {}
    optimizer = {str(k): v for k, v in OmegaConf.to_container(cfg.optim, resolve=True).items()}  # type: ignore[union-attr]
    return plain(
        {
            "format": FORMAT,
            "run": folder.path.name,
            "step": step,
            "checkpoint": checkpoint,
            "status": summary.get("status", "running"),
            "reason": summary.get("reason", ""),
            "data": {"name": log.schema.name, **span_of(log), "rows_trained_on": summary.get("examples")},
            "tasks": {task.name: task.type for task in log.schema.tasks},
            "negatives_kept": {t.name: t.negative_keep_rate for t in log.schema.tasks if t.negative_keep_rate != 1},
            "features": {"dense": len(log.schema.dense), "categorical": len(log.schema.categorical)},
            "metrics": dict(metrics),
            "gate": gate,
            "model": {"name": cfg.model.name, "parameters": summary.get("parameters")},
            "optimizer": optimizer,
            "lr": summary.get("lr"),
            "batch_size": cfg.scale.batch_size,
            "seed": cfg.seed,
            "events": _events(folder, step),
            "parent": _parent(cfg),
            "config_hash": summary.get("config_hash") or config_hash(cfg),
            "commit": summary.get("commit"),
            "machine": summary.get("machine"),
            "versions": summary.get("versions") or versions(),
        }
    )


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes both files of a card, each atomically; the one for programs last."""
    write_text(folder / CARD_TEXT, as_markdown(card))
    write_text(folder / CARD, json.dumps(card, indent=2, allow_nan=False) + "\n")


def as_markdown(card: Mapping[str, Any]) -> str:
    """A card as Markdown, with a front matter in YAML."""
    model, data, optimizer = card["model"], card["data"], card["optimizer"]
    front = {
        "library_name": "evenkeel",
        "tags": ["ranking", "recommender", model["name"], optimizer["name"]],
        "datasets": [data["name"]],
        "metrics": sorted({name.split("/")[-1] for name in card["metrics"]}),
    }
    status = f"{card['status']}{': ' + card['reason'] if card['reason'] else ''}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {_text(model['name'])} on {_text(data['name'])}, step {card['step']:,}\n",
        f"Weights: {_text(card['checkpoint'])} of run `{card['run']}` ({_text(status)}).\n",
        "## Data\n",
        _table(["", "rows", "from", "to"], [_span_row(name, data[name]) for name in ("training", "hold_out")]),
        f"Rows trained on: {_number(data['rows_trained_on'])}. Features: "
        f"{card['features']['categorical']} categorical, {card['features']['dense']} dense.\n",
        *_sampled(card.get("negatives_kept") or {}),
        "## Metrics on the hold-out\n",
        _metrics(card["metrics"], card["tasks"]),
        "## Quality gate\n",
        _gate(card["gate"]),
        "## Training\n",
        _table(["setting", "value"], [[k, _short(v)] for k, v in _training(card)]),
        "## Divergences and rollbacks\n",
        _event_table(card["events"]),
        "## Origin\n",
        _table(["", ""], [[k, _short(v)] for k, v in _origin(card)]),
    ]
    return "\n".join(parts)


def _sampled(kept: Mapping[str, float]) -> list[str]:
    if not kept:
        return []
    rates = ", ".join(f"{_text(name)} {rate:g}" for name, rate in kept.items())
    return [
        f"Share of the negatives in the log: {rates}. Scores and metrics are those of the log with all negatives.\n"
    ]


def _parent(cfg: DictConfig) -> Any:
    found = OmegaConf.select(cfg, PARENT)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _events(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Events that began up to a step, without the rows that a rollback left out."""
    path = folder.path / EVENTS
    lines = whole_lines(path).decode().splitlines() if path.is_file() else []
    kept = ("kind", "step", "task", "depth", "length", "recovered_at", "to_step", "restored", "reason")
    events = [event for event in map(json.loads, lines) if event["step"] <= step]
    return [{key: event[key] for key in kept if key in event} for event in events]


def _iso(time_ms: int) -> str:
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).isoformat(timespec="seconds")


def _text(value: Any) -> str:
    """Text from elsewhere: one line, and nothing in it makes a table or a tag."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _short(value: Any) -> str:
    return "none" if value is None else _text(value if isinstance(value, str) else json.dumps(value))


def _number(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if float(value).is_integer() and (value == 0 or abs(value) >= 2) else f"{value:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _span_row(name: str, part: Mapping[str, Any]) -> list[str]:
    return [name.replace("_", "-"), f"{part['rows']:,}", part.get("from", ""), part.get("to", "")]


def _metrics(metrics: Mapping[str, Any], tasks: Mapping[str, str]) -> str:
    if not metrics:
        return "None: the run was not evaluated at this step.\n"
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics if "/" in key))
    rows = [
        [_text(task), *(_number(metrics[f"{task}/{n}"]) if f"{task}/{n}" in metrics else "" for n in names)]
        for task in tasks
    ]
    return _table(["task", *map(_text, names)], rows)


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return "Not asked. `evenkeel export` asks it.\n"
    words = {True: "passed", False: "refused", None: "not checked"}
    rows = [[_text(c["rule"]), _text(c["about"]), words[c["passed"]], _text(c["words"])] for c in gate["checks"]]
    return f"{words[bool(gate['passed'])].capitalize()}.\n\n" + _table(["rule", "about", "result", "found"], rows)


def _training(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    settings = {k: v for k, v in card["optimizer"].items() if not k.startswith("_")}
    return [
        ("optimizer", settings.pop("name")),
        ("learning rate", card["lr"]),
        *settings.items(),
        ("batch size", card["batch_size"]),
        ("seed", card["seed"]),
        ("parameters", card["model"]["parameters"]),
    ]


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return "None.\n"
    rows = [
        [str(e["step"]), _text(e["kind"]), _text(e.get("task") or "all"), _text(e.get("reason", ""))]
        for e in events[-_EVENTS_SHOWN:]
    ]
    more = len(events) - len(rows)
    return _table(["step", "kind", "task", "reason"], rows) + (
        f"\n{more:,} earlier ones are in the JSON.\n" if more else ""
    )


def _origin(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = ("config_hash", "commit", "machine", "parent")
    return [*((name.replace("_", " "), card[name]) for name in names), *card["versions"].items()]
