"""Day after day as a study: chains of days, each begun from the last good model; their jobs and their readings.

A chain is a run over all days with ``warm_start.at_windows``: at each midnight it does what a new run with a warm start
would do, bit for bit (tests/command_line/test_warm_start.py). Where the model is lost, the days since the last sound
checkpoint are skipped, as daily training does: the model from before them goes on serving, and a second run begins with
it on the day after the verdict. So the jobs depend on earlier runs, and are launched round by round.
"""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ranker.config_overrides import quoted
from ranker.errors import UserError
from ranker.paper.jobs import NO_CAPSULES, Data, Job, Setting
from ranker.paper.store import find, row_of
from ranker.paper.study import Round
from ranker.runs.checkpoint_files import step_of
from ranker.runs.metric_names import LEARNING_RATE, PROGRESSIVE, SIGNS, TEST, TRAIN_LOSS, WINDOW, task_metric
from ranker.runs.run_folder import METRICS, RunFolder, whole_lines
from ranker.training.resumption import sound_checkpoint

METHODS = ("adagrad", "gc", "clippy")
RATES = (1.0,)
SCRATCH = "scratch"
WAYS: dict[str, Job] = {
    "keep": (),
    "reset": ("warm_start.accumulators=reset",),
    "decay": ("warm_start.accumulators=decay",),
    "floor": ("warm_start.accumulators=floor",),
}
SCRATCH_DAYS = 7  # that a model from random weights is trained on
SCRATCH_EVERY = {"kuairand": 6, "synthetic": 10}  # days between two such models
HALF_LIFE_DAYS = 3
MAX_PARTS = 6  # runs of a chain; one that was lost so often is not followed further
FIRST_STEPS = 5  # of a day, after the boundary
ROLES = ("bottom_first", "bottom_top")
FOLLOWED: Job = (
    "model=small",
    "data.window=24h",  # ends with the day, so that the boundary between runs changes nothing by itself
    "logger=csv",
    "metrics=default",
    "train.log_every=1",
    "train.eval_every=0",
    "train.checkpoint_every=100000",
    "train.threads=1",
    "data.num_workers=0",
    "callbacks.early_signs.every=1",
    f"callbacks.early_signs.roles=[{','.join(ROLES)}]",
    "callbacks.early_signs.activations=false",
    "callbacks.early_signs.task_gradients=0",
    "callbacks.early_signs.what_if=null",
    NO_CAPSULES,
)


@dataclass(frozen=True)
class Calendar:
    """The days of a data set.

    Attributes:
        days: that are trained on; one more is the hold-out of the last.
        rows: of a day, about.
        first: the first day of a log of files; None for the stream.
        more: other overrides of each job.
    """

    days: int
    rows: int
    first: dt.date | None = None
    more: Job = ()

    def job(self, first: int, last: int) -> Job:
        """Overrides that train on days first .. last and hold out the day after."""
        if self.first is not None:
            names = [(self.first + dt.timedelta(days=day)).isoformat() for day in (first, last + 1)]
            return (f"data.days=[{','.join(names)}]",)
        sizes = {"first_day": first, "train_rows": (last - first + 1) * self.rows, "eval_rows": self.rows}
        return tuple(f"data.log.{key}={value}" for key, value in {**sizes, "rows_per_day": self.rows}.items())


CALENDARS = {
    "kuairand": Calendar(days=13, rows=15_000, first=dt.date(2022, 4, 25)),
    "synthetic": Calendar(days=30, rows=6_400, more=("train.warmup_steps=100",)),
}


@dataclass(frozen=True)
class Cell:
    """A chain: one optimizer at one rate with one seed, and what happens between days."""

    optim: str
    way: str
    lr_mult: float
    seed: int


@dataclass(frozen=True)
class Part:
    """A run of a chain: its days, and the checkpoint of an earlier part that it begins with; None: random weights."""

    cell: Cell
    first: int
    last: int
    parent: Path | None
    job: Job


@dataclass(frozen=True)
class Walked:
    """A part and its run.

    Attributes:
        part: the part.
        path: the run folder.
        summary: its summary.
        metrics: its metrics.csv.
        begins: steps after which its days begin.
        lost: the first day that is skipped because the model was lost; None if it was not.
    """

    part: Part
    path: Path
    summary: dict[str, Any]
    metrics: pl.DataFrame
    begins: list[int]
    lost: int | None

    @property
    def reached(self) -> int:
        """The last day on which it trained."""
        return self.part.last if self.part.cell.way == SCRATCH else self.part.first + len(self.begins) - 1


def parts(setting: Setting, folder: Path) -> Iterator[tuple[Round, list[Part]]]:
    """The rounds of the study. Each must have run (or be known to be missing) before the next is asked for.

    Args:
        setting: data, scale, seeds.
        folder: the sweep folder of other studies; these runs get one beside it.
    """
    folder = folder.with_name(f"{folder.name}_daily")
    calendar = CALENDARS[setting.data.name]
    days = 3 if setting.quick else calendar.days
    ways = tuple(WAYS)[:2] if setting.quick else tuple(WAYS)
    axes = [(m, r, s) for r in RATES for s in setting.seed_list for m in METHODS]

    def part(cell: Cell, first: int, last: int, *more: str, parent: Path | None = None) -> Part:
        start = () if parent is None else (f"warm_start.path={quoted(str(parent.resolve()))}",)
        own = (f"optim={cell.optim}", f"lr_mult={cell.lr_mult:g}", f"seed={cell.seed}", f"tags=[{cell.way}]")
        job = (*setting.common, *FOLLOWED, *calendar.more, *own, *calendar.job(first, last), *more, *start)
        return Part(cell, first, last, parent, job)

    def between(way: str) -> Job:
        life = (f"warm_start.half_life_rows={HALF_LIFE_DAYS * calendar.rows}",) if way == "decay" else ()
        return ("warm_start.at_windows=true", *WAYS[way], *life)

    todo = [part(Cell(m, way, r, s), 0, days - 1, *between(way)) for way in ways for m, r, s in axes]
    number = 0
    while todo and number < MAX_PARTS:
        made = Round(folder / f"part_{number:02d}", [each.job for each in todo])
        yield made, todo
        found = [each for each in walked(todo, made) if each is not None]
        again = [each for each in found if each.lost is not None and each.reached < days - 1]
        todo = []
        for each in again:
            cell = each.part.cell
            # A part that was lost on its first day leaves the model that it began with.
            parent = _sound(each.path) or each.part.parent
            todo.append(part(cell, each.reached + 1, days - 1, *between(cell.way), parent=parent))
        number += 1
    last = [day for day in range(days) if (days - 1 - day) % SCRATCH_EVERY[setting.data.name] == 0]
    fresh = [
        part(Cell(m, SCRATCH, r, s), max(day - SCRATCH_DAYS + 1, 0), day, "train.progressive=false")
        for day in last
        for m, r, s in axes
    ]
    yield Round(folder / SCRATCH, [each.job for each in fresh]), fresh


def rounds(setting: Setting, folder: Path) -> Iterator[Round]:
    """As ``parts``, for whoever launches them."""
    return (made for made, _ in parts(setting, folder))


def walked(planned: Sequence[Part], made: Round) -> list[Walked | None]:
    """What the parts of a round came to; None for those whose run is missing."""
    found = dict(find(made.folder, made.jobs)[0])
    return [_walked(part, *found[part.job]) if part.job in found else None for part in planned]


def _walked(part: Part, path: Path, summary: dict[str, Any]) -> Walked:
    metrics = pl.read_csv(whole_lines(path / METRICS), infer_schema_length=None)
    begins = [0]
    if part.cell.way != SCRATCH:
        starts = metrics.drop_nulls(WINDOW).group_by(WINDOW).agg(pl.col("step").min())
        begins = sorted(int(step) for step in starts["step"])
    lost = None
    if summary["status"] == "diverged":
        back = _sound(path)
        lost = part.first + (sum(begin <= step_of(back) for begin in begins) - 1 if back is not None else 0)
    return Walked(part, path, summary, metrics, begins, lost)


def _sound(path: Path) -> Path | None:
    """The checkpoint from before the divergence of a lost run, which is of a midnight; None if there is none."""
    try:
        return sound_checkpoint(RunFolder.existing(path), keep_lost=False, say=lambda _: None)
    except UserError:
        return None


def read(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:  # noqa: ARG001
    """One row per chain and day; see ``days_of`` for the columns."""
    rows: list[dict[str, Any]] = []
    missing: list[Job] = []
    for made, planned in parts(setting, folder):
        for part, run in zip(planned, walked(planned, made), strict=True):
            if run is None:
                missing.append(part.job)
            else:
                rows += days_of(run, data=setting.data)
    rows.sort(key=lambda row: (-row["lr_mult"], *(row[key] for key in ("optim", "way", "seed", "day"))))
    return pl.DataFrame(rows, infer_schema_length=None), missing


def days_of(run: Walked, *, data: Data) -> list[dict[str, Any]]:
    """The rows of a run, one per day; of a model from random weights one, for the last of its days.

    Columns: optim, way, lr_mult, seed, day (0: the first), fresh (the run begins with random weights on this day),
    status (lost: the day is skipped), steps, event_step (first step of the divergence, counted from midnight, on the
    day on which it began), commit, machine, and

        auc, ne                  of the model that is served on that day, before it is trained on it
        auc_after, ne_after      of the last model, on the day after
        loss_first, loss_rest    highest training loss of the first steps, median of the other steps
        move_first, move_rest    largest move of a weight of the shared layers in a step, lr * sigma * max |r|, likewise
        sigma_first, sigma_rest  smallest sigma of the shared layers, lowest of the first steps, median of the others
    """
    part, cell, known = run.part, run.part.cell, row_of(run.part.job, run.path, run.summary)
    event = known["full_step"] if known["full_step"] is not None else known["first_step"]
    single = cell.way == SCRATCH
    begins = [0] if single else run.begins
    ends = [*begins[1:], int(run.summary["steps"])]
    rows = []
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        day = part.last if single else part.first + number
        lost = run.lost is not None and (single or day >= run.lost)
        steps = run.metrics.filter(pl.col("step") > begin, pl.col("step") <= end)
        served = (number > 0 or part.parent is not None) and (run.lost is None or day <= run.lost)
        scored = run.metrics.filter(pl.col("step") == begin)
        after = number == len(begins) - 1 and not lost and (single or run.reached == part.last)
        here = lost and event is not None and begin < event <= end
        row = {
            "optim": cell.optim,
            "way": cell.way,
            "lr_mult": cell.lr_mult,
            "seed": cell.seed,
            "day": day,
            "fresh": number == 0 and part.parent is None,
            "status": "lost" if lost else "completed",
            "steps": end - begin,
            "event_step": event - begin if here and event is not None else None,
        }
        for metric in ("auc", "ne"):
            row[metric] = _only(scored, task_metric(PROGRESSIVE, data.auc, metric)) if served else None
            row[f"{metric}_after"] = run.summary["metrics"].get(task_metric(TEST, data.auc, metric)) if after else None
        row |= {**_boundary(steps, begin), "commit": known["commit"], "machine": known["machine"]}
        rows.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _boundary(steps: pl.DataFrame, begin: int) -> dict[str, float | None]:
    """Loss, largest move and sigma just after the start of a day, and in the rest of it."""
    series = {"loss": _column(steps, TRAIN_LOSS)}
    lr = _column(steps, LEARNING_RATE)
    moves, sigmas = [], []
    for role in ROLES:
        update, sigma = (_column(steps, f"{SIGNS}{role}/{name}") for name in ("update_max", "sigma"))
        moves.append({k: lr[k] * sigma.get(k, 1.0) * update[k] for k in update.keys() & lr.keys()})
        sigmas.append(sigma)
    series["move"] = _joined(moves, max)
    series["sigma"] = _joined(sigmas, min)
    made: dict[str, float | None] = {}
    for name, values in series.items():
        early = [v for k, v in values.items() if k <= begin + FIRST_STEPS]
        late = [v for k, v in values.items() if k > begin + FIRST_STEPS]
        made[f"{name}_first"] = (min if name == "sigma" else max)(early) if early else None
        made[f"{name}_rest"] = statistics.median(late) if late else None
    return made


def _joined(parts: Sequence[dict[int, float]], how: Any) -> dict[int, float]:
    return {k: how(part[k] for part in parts if k in part) for k in sorted(set().union(*parts))}


def _column(steps: pl.DataFrame, name: str) -> dict[int, float]:
    if name not in steps.columns:
        return {}
    known = steps.select("step", pl.col(name).cast(pl.Float64)).drop_nulls().drop_nans()
    return dict(zip(known["step"].to_list(), known[name].to_list(), strict=True))


def _only(rows: pl.DataFrame, name: str) -> float | None:
    known: list[float] = rows[name].cast(pl.Float64).drop_nulls().to_list() if name in rows.columns else []
    return known[0] if known else None
