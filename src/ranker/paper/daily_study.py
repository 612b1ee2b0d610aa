"""What happens between days, as tables and a figure: what is lost and when, and how good the served model is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from ranker.paper.daily_runs import (
    CALENDARS,
    FIRST_STEPS,
    HALF_LIFE_DAYS,
    METHODS,
    SCRATCH,
    SCRATCH_DAYS,
    WAYS,
    read,
    rounds,
)
from ranker.paper.jobs import Data
from ranker.paper.rendering import figure, save, spread
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

KEEP, ENDLESS = "keep", "endless"
NAMES = {"adagrad": "naive Adagrad", "gc": "GC", "clippy": "Clippy"}
BETWEEN = {
    "keep": "accumulators kept",
    "reset": "accumulators reset",
    "decay": f"accumulators decayed, half-life {HALF_LIFE_DAYS} days",
    "floor": "accumulators floored",
}
COLOURS = {"keep": "#1f4e79", "reset": "#c0392b", "decay": "#e08e0b", "floor": "#3a7d44"}
SAME_AUC = 0.001  # differences up to this are none
SOON = 10  # steps after midnight in which a divergence counts as one of the boundary


def daily_sections(data: Data, found: Found) -> Sections:
    """Quality, losses, what happens at midnight, beside models from random weights, and what follows."""
    runs = found["daily"]
    if runs.is_empty():
        return {"quality": "No run yet.\n"}
    return {
        "setting": _setting(data, runs),
        "quality": _quality(data, runs),
        "losses": _losses(runs),
        "midnight": _midnight(runs),
        "scratch": _scratch(data, runs),
        "recommendation": _recommendation(data, runs),
    }


def lost_days(chain: pl.DataFrame) -> list[int]:
    """The days on which a divergence began, of one or more chains."""
    return sorted(chain.drop_nulls("event_step")["day"].to_list())


def chains(runs: pl.DataFrame, optim: str, way: str) -> list[pl.DataFrame]:
    """One frame per seed, by day. The endless run is the chain that keeps everything, up to its first loss."""
    mine = runs.filter(pl.col("optim") == optim, pl.col("way") == (KEEP if way == ENDLESS else way))
    parts = [part.sort("day") for part in mine.partition_by("seed", maintain_order=True)]
    return [_until_lost(part) for part in parts] if way == ENDLESS else parts


def _until_lost(chain: pl.DataFrame) -> pl.DataFrame:
    lost = chain.filter(pl.col("status") == "lost")["day"]
    return chain if lost.is_empty() else chain.filter(pl.col("day") <= lost.min())


def late(chain: pl.DataFrame, data: Data) -> pl.DataFrame:
    """The second half of the days, when the warm-up is over and the first days are no longer half of what was seen."""
    return chain.filter(pl.col("day") >= CALENDARS[data.name].days // 2)


def _setting(data: Data, runs: pl.DataFrame) -> str:
    calendar, seeds = CALENDARS[data.name], runs["seed"].n_unique()
    rate = runs["lr_mult"].unique().to_list()
    return (
        f"Small at {', '.join(f'{x:g}x' for x in rate)}, {calendar.days} days of about {calendar.rows:,} rows, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}. A day whose model is lost is skipped: the next day begins with the "
        "model from before it. There is no gate and no second try. The endless run is the chain with accumulators "
        "kept, bit for bit, until it is first lost, and ends there.\n"
    )


def _quality(data: Data, runs: pl.DataFrame) -> str:
    """AUC and NE of the served model, mean over the second half of the days."""
    rows = []
    for optim in METHODS:
        for way in (ENDLESS, *WAYS):
            found = chains(runs, optim, way)
            if not found:
                continue
            hurt = sum(bool(lost_days(part)) for part in found)
            kept = [part for part in found if way != ENDLESS or not lost_days(part)]
            aucs, nes = ([late(part, data)[name].mean() for part in kept] for name in ("auc", "ne"))
            rows.append(
                [
                    NAMES[optim],
                    "one endless run" if way == ENDLESS else BETWEEN[way],
                    f"{hurt} of {len(found)}",
                    "-" if way == ENDLESS else _lost(found),
                    spread(aucs, percent=True) or "-",  # type: ignore[arg-type]
                    spread(nes) or "-",  # type: ignore[arg-type]
                ]
            )
    half = CALENDARS[data.name].days // 2
    head = ["optimizer", "between days", "chains with a loss", "days lost"]
    return as_markdown([*head, f"{data.auc} AUC served, from day {half + 1} on", "NE"], rows)


def _losses(runs: pl.DataFrame) -> str:
    """When in a day, and on which days, models are lost."""
    rows = []
    for optim in METHODS:
        for way in WAYS:
            found = chains(runs, optim, way)
            events = pl.concat(found).drop_nulls("event_step") if found else pl.DataFrame()
            if not found or events.is_empty():
                continue
            steps = events["event_step"]
            soon = int((steps <= SOON).sum())
            middle = _median(steps)
            days = Counter(day + 1 for part in found for day in lost_days(part))
            rows.append(
                [
                    NAMES[optim],
                    BETWEEN[way],
                    str(events.height),
                    f"{soon} of {events.height}",
                    _number(middle),
                    ", ".join(f"{day}" + (f" ({n}x)" if n > 1 else "") for day, n in sorted(days.items())),
                ]
            )
    if not rows:
        return "No model was lost.\n"
    head = [
        "optimizer",
        "between days",
        "divergences",
        f"in the first {SOON} steps of a day",
        "step of the day (median)",
    ]
    return as_markdown([*head, "on day"], rows)


def _midnight(runs: pl.DataFrame) -> str:
    """The first steps of a day beside the rest of it; medians over the days after the first, of all chains."""
    rows = []
    for optim in METHODS:
        for way in WAYS:
            mine = runs.filter(pl.col("optim") == optim, pl.col("way") == way, ~pl.col("fresh"))
            if mine.is_empty():
                continue
            loss, move = (mine[f"{name}_first"] / mine[f"{name}_rest"] for name in ("loss", "move"))
            high = _quantile(loss, 0.9)
            sigmas = [_median(mine[f"sigma_{part}"]) for part in ("first", "rest")]
            cells = [_number(_median(loss)), _number(high), _number(_median(move)), *map(_number, sigmas)]
            rows.append([NAMES[optim], BETWEEN[way], *cells])
    head = ["optimizer", "between days", f"loss in the first {FIRST_STEPS} steps / in the rest of the day"]
    head += ["the same, worst tenth of the days", "largest move of a weight, first steps / rest"]
    return as_markdown([*head, "sigma, smallest of the first steps", "sigma, the rest"], rows)


def _scratch(data: Data, runs: pl.DataFrame) -> str:
    """Models from random weights beside the chain that keeps everything, on the same days."""
    rows = []
    for optim in METHODS:
        mine = runs.filter(pl.col("optim") == optim, pl.col("way") == SCRATCH)
        # What is served on a day was trained up to the day before; the last day of the log has only `auc_after`.
        kept = runs.filter(pl.col("optim") == optim, pl.col("way") == KEEP)
        before = kept.select("seed", pl.col("day") - 1, pl.col("auc").alias("served"))
        joined = mine.join(before, on=["seed", "day"], how="left")
        last = kept.select("seed", "day", pl.col("auc_after").alias("last"))
        joined = joined.join(last, on=["seed", "day"], how="left")
        for day in sorted(joined["day"].unique()):
            here = joined.filter(pl.col("day") == day)
            fine = here.filter(pl.col("status") == "completed")
            rows.append(
                [
                    NAMES[optim],
                    f"{max(day - SCRATCH_DAYS + 1, 0) + 1} to {day + 1}",
                    f"{here.height - fine.height} of {here.height}",
                    spread(fine["auc_after"].to_list(), percent=True) or "-",
                    spread(here.select(pl.coalesce("served", "last")).to_series().to_list(), percent=True) or "-",
                ]
            )
    if not rows:
        return "No run yet.\n"
    head = ["optimizer", "trained on days", "lost", f"{data.auc} AUC on the day after, from random weights"]
    return as_markdown([*head, "of the chain, accumulators kept"], rows)


def _recommendation(data: Data, runs: pl.DataFrame) -> str:
    """Which way serves the best AUC for each optimizer, and when resets are lost."""
    lines, after = [], []
    for optim in METHODS:
        found = {way: parts for way in WAYS if (parts := chains(runs, optim, way))}
        if not found:
            continue
        # A model that was lost costs the AUC of the days on which an older one is served, so the AUC counts it already.
        aucs = {way: _mean([late(part, data)["auc"].mean() for part in parts]) for way, parts in found.items()}
        known = {way: auc for way, auc in aucs.items() if auc is not None}
        best = max(known, key=lambda way: known[way], default=None)
        if best is None:
            continue
        chosen = KEEP if known.get(KEEP, -math.inf) >= known[best] - SAME_AUC else best
        why = "" if chosen == best else f" (nothing is more than {100 * SAME_AUC:g} AUC points better)"
        served = [
            f"{BETWEEN[way].removeprefix('accumulators ')} {_percent(aucs[way])}, {_lost(found[way])} days lost"
            for way in found
        ]
        lines.append(f"- {NAMES[optim]}: **{BETWEEN[chosen]}**{why}. AUC served: {'; '.join(served)}.")
        steps = runs.filter(pl.col("optim") == optim, pl.col("way") == "reset").drop_nulls("event_step")["event_step"]
        if steps.len():
            after.append(f"{NAMES[optim]} {int((steps <= SOON).sum())} of {steps.len()}")
    said = f"Divergences in the first {SOON} steps after a reset: {', '.join(after)}." if after else ""
    return "\n".join([*lines, "", said or "No model was lost after a reset."]) + "\n"


def _lost(parts: list[pl.DataFrame]) -> str:
    """Days lost of days seen."""
    return f"{sum(part.filter(pl.col('status') == 'lost').height for part in parts)} of {sum(p.height for p in parts)}"


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def draw_daily(data: Data, found: Found, destination: Path) -> None:
    """AUC of the served model by day, a panel for each optimizer; days on which a model was lost as marks below."""
    runs = found["daily"]
    if runs.is_empty():
        return
    shown = [optim for optim in METHODS if any(chains(runs, optim, way) for way in WAYS)]
    picture, axes = figure(rows=len(shown), width=7.5, height=2.3 * len(shown) + 0.5, sharex=True, squeeze=False)
    for here, optim in zip(axes[:, 0], shown, strict=True):  # each on its own scale: only naive Adagrad falls to 0.5
        aucs = runs.filter(pl.col("optim") == optim)["auc"].drop_nulls().to_list() or [0.5, 1.0]
        low, gap = min(aucs), 0.07 * (max(aucs) - min(aucs))
        for place, way in enumerate(WAYS):
            parts = chains(runs, optim, way)
            if not parts:
                continue
            every = pl.concat(parts)
            mean = every.drop_nulls("auc").group_by("day").agg(pl.col("auc").mean()).sort("day")
            here.plot(mean["day"] + 1, mean["auc"], color=COLOURS[way], linewidth=1.3, label=BETWEEN[way])
            lost = [day + 1 for part in parts for day in lost_days(part)]
            if lost:
                here.plot(lost, [low - gap * (place + 1)] * len(lost), "x", color=COLOURS[way], markersize=4)
        here.set_title(NAMES[optim], loc="left", fontsize=10)
        here.set_ylabel(f"{data.auc} AUC", fontsize=8)
    axes[-1, 0].set_xlabel("day; a cross: a model was lost on it", fontsize=8)
    lines = {line.get_label(): line for here in axes[:, 0] for line in here.get_lines() if line.get_label()[0] != "_"}
    picture.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(picture, destination)


def _median(values: pl.Series) -> float | None:
    return _quantile(values, 0.5)


def _quantile(values: pl.Series, share: float) -> float | None:
    known = values.cast(pl.Float64).drop_nulls().drop_nans()
    return None if known.is_empty() else known.quantile(share, "linear")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _no_jobs(*_: object) -> list[tuple[str, ...]]:
    return []  # they come in rounds


DAILY = Study(
    name="daily",
    title="Day after day: what happens between days",
    phases=(Phase("daily", _no_jobs, read=read, rounds=rounds),),
    sections=daily_sections,
    draw=draw_daily,
)
