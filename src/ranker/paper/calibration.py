"""Where 1x is: naive Adagrad over a grid of learning rates, judged on the day before the test day.

At 1x naive Adagrad is lost in most seeds in mid-run: after the warm-up, and after the model had learned. At a quarter
of it, it trains about as well as it ever does. A rate that kills in the first steps is no 1x. Its cause is the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ranker.paper.jobs import FOLLOWED, LABELS, MORE_MODELS, PAPER_MODELS, Data, Job, Setting, grid
from ranker.paper.rendering import spread
from ranker.paper.store import find, row_of, warmup_of
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown
from ranker.runs.metric_names import VAL, task_metric
from ranker.runs.run_folder import METRICS, whole_lines

RATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # multiples of the present 1x
DEFAULT = ("small",)  # without --models
SEEDS = 8
MODELS = (*PAPER_MODELS, *MORE_MODELS)
LEARNED = 0.8  # of the way from an AUC of 0.5 to the best of naive Adagrad: the model had learned
TRAINS = 0.9  # of the same way: a quarter of 1x trains about as well as naive Adagrad ever does
QUARTER = 0.25
LEARNS = 0.55  # an AUC that naive Adagrad must reach at some rate; below it there is nothing to lose


class Judged(NamedTuple):
    """What one rate did.

    Attributes:
        lr_mult: multiple of the present 1x.
        lr: the learning rate.
        runs: number of seeds.
        lost: number of seeds that were lost.
        unsettled: number of seeds whose training ended during a divergence.
        step: median first step of the divergences that ended runs; None where no seed was lost.
        warmup: steps of warm-up.
        before: median of the best AUC at an evaluation before that step, 0.5 where there was none.
        auc: mean AUC at the end over the seeds that were not lost; None where all were.
    """

    lr_mult: float
    lr: float
    runs: int
    lost: int
    unsettled: int
    step: float | None
    warmup: int
    before: float
    auc: float | None

    @property
    def most_lost(self) -> bool:
        """Whether more than half of the seeds were lost."""
        return 2 * self.lost > self.runs


def calibration_jobs(setting: Setting) -> list[Job]:
    """Naive Adagrad at every rate, with several seeds, on the validation day."""
    axes: dict[str, Sequence[object]] = {
        "model": setting.models_of(DEFAULT if setting.models is None else MODELS),
        "optim": ("adagrad",),
        "lr_mult": RATES[2:5:2] if setting.quick else RATES,
        "seed": setting.seeds_or(SEEDS),
    }
    return grid((*setting.common, *FOLLOWED, *setting.validation), axes)


def read(setting: Setting, folder: Path, jobs: Sequence[Job]) -> tuple[pl.DataFrame, list[Job]]:
    """The rows of the runs with columns warmup (steps) and auc_before.

    auc_before is the best AUC at an evaluation before the divergence that ended the run; null for other runs. The last
    one would not do: where an evaluation falls between the first bad steps and the jump of the loss, it has fallen.
    """
    found, missing = find(folder, jobs)
    rows = []
    for job, (path, summary) in found:
        row = row_of(job, path, summary)
        row["warmup"] = warmup_of(path)
        row["auc_before"] = _auc_before(path, task_metric(VAL, setting.data.auc, "auc"), row["full_step"])
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None), missing


def _auc_before(folder: Path, name: str, step: int | None) -> float | None:
    if step is None:
        return None
    metrics = pl.read_csv(whole_lines(folder / METRICS), infer_schema_length=None)
    if name not in metrics.columns:
        return 0.5
    seen = metrics.filter(pl.col("step") < step).select(pl.col(name).cast(pl.Float64)).drop_nulls()
    return round(max(seen[name].drop_nans().to_list(), default=0.5), 5)


def judge(runs: pl.DataFrame, metric: str) -> list[Judged]:
    """One entry per rate, in ascending order.

    Args:
        runs: of one model, from ``read``.
        metric: such as ``is_click/auc``.
    """
    found = []
    for (rate,), mine in runs.sort("lr_mult").group_by("lr_mult", maintain_order=True):
        lost = mine.filter(pl.col("status") == "diverged")
        aucs = mine.filter(pl.col("status") == "completed")[metric].drop_nulls().drop_nans()
        step, before, auc = lost["full_step"].median(), lost["auc_before"].fill_null(0.5).median(), aucs.mean()
        found.append(
            Judged(
                lr_mult=float(str(rate)),
                lr=float(mine["lr"][0]),
                runs=mine.height,
                lost=lost.height,
                unsettled=mine.filter(pl.col("status") == "unsettled").height,
                step=_number(step),
                warmup=int(mine["warmup"][0]),
                before=_number(before) or 0.5,
                auc=_number(auc),
            )
        )
    return found


def naive_best(rates: Sequence[Judged]) -> float | None:
    """The best mean AUC of a rate at which every seed completed; None if there is none."""
    return max((r.auc for r in rates if r.auc is not None and not (r.lost or r.unsettled)), default=None)


def objections(rate: Judged, rates: Sequence[Judged]) -> list[str]:
    """Why a rate is not 1x; empty if it is.

    Args:
        rate: the rate to judge.
        rates: all rates, of which ``rate`` is one.
    """
    best = naive_best(rates)
    if best is None:
        return ["at every rate at least one seed is lost, so the best of naive Adagrad is not known"]
    if best < LEARNS:
        return [f"naive Adagrad learns next to nothing at any rate (AUC {best:.3f} at most)"]
    found = []
    if not rate.most_lost:
        return [f"lost in {rate.lost} of {rate.runs} seeds only"]
    if rate.step is not None and rate.step <= rate.warmup:
        found.append(f"lost at step {rate.step:g} (median), within the warm-up of {rate.warmup}: the start")
    elif rate.before < _way(LEARNED, best):
        found.append(
            f"lost at step {rate.step:g} (median) with an AUC of {rate.before:.3f}, "
            f"after the warm-up but before the model had learned ({_way(LEARNED, best):.3f})"
        )
    quarter = next((r for r in rates if r.lr_mult == QUARTER * rate.lr_mult), None)
    if quarter is None:
        found.append("a quarter of it was not tried")
    elif quarter.lost or quarter.unsettled:
        found.append(f"a quarter of it is lost too, in {quarter.lost} of {quarter.runs} seeds")
    elif quarter.auc is None or quarter.auc < _way(TRAINS, best):
        found.append(f"a quarter of it trains to {quarter.auc or 0.5:.3f} only, where the best is {best:.3f}")
    return found


def proposal(rates: Sequence[Judged]) -> str:
    """The smallest rate that can be 1x, or why there is none, in one paragraph."""
    able = [rate for rate in rates if not objections(rate, rates)]
    if able:
        one = able[0]
        return (
            f"**1x is {one.lr:g}** ({one.lr_mult:g} of the present 1x): naive Adagrad is lost in {one.lost} of "
            f"{one.runs} seeds, at step {one.step:g} (median) with an AUC of {one.before:.3f} before it, and a quarter "
            f"of the rate trains."
        )
    best = naive_best(rates)
    if best is not None and best < LEARNS:
        return (
            f"**No 1x**: naive Adagrad learns next to nothing at any rate (AUC {best:.3f} at most), so there is "
            "nothing to lose. Try a smaller G_0, more steps, or higher rates."
        )
    killing = [rate for rate in rates if rate.most_lost]
    if not killing:
        return f"**No 1x**: no rate up to {rates[-1].lr:g} loses most seeds. Try higher rates or longer training."
    first = killing[0]
    if all(_at_start(rate, rates) for rate in killing):
        return (
            f"**No 1x**: every rate that kills does so at the start, {first.lr:g} at step {first.step:g} (median). "
            "Not the rate is the cause but the start: the bias of the heads, the warm-up, or G_0."
        )
    return f"**No 1x**: the smallest rate that loses most seeds is {first.lr:g}: " + "; ".join(objections(first, rates))


def calibration_sections(data: Data, found: Found) -> Sections:
    """Per model: the table of its rates and the proposal."""
    made = {}
    runs = found["calibrate"]
    for model in (model for model in MODELS if model in runs["model"].unique()):
        rates = judge(runs.filter(pl.col("model") == model), f"{data.auc}/auc")
        rows = []
        for rate in rates:
            mine = runs.filter((pl.col("model") == model) & (pl.col("lr_mult") == rate.lr_mult))
            kept = mine.filter(pl.col("status") == "completed")
            aucs = spread(kept[f"{data.auc}/auc"].to_list(), percent=True)
            rows.append(
                [
                    f"{rate.lr:g} ({rate.lr_mult:g}x)",
                    f"{rate.lost} of {rate.runs}" + (f", {rate.unsettled} unsettled" if rate.unsettled else ""),
                    "-" if rate.step is None else f"{rate.step:g}",
                    f"{100 * rate.before:.2f}" if rate.lost else "-",
                    f"{aucs} (n={kept.height})" if aucs else "-",
                    "; ".join(objections(rate, rates)) or "can be 1x",
                ]
            )
        head = [f"{LABELS[model]}, learning rate", "lost", "at step (median)", f"best {data.auc} AUC before (median)"]
        table = as_markdown([*head, "AUC at the end of the others", "judgement"], rows)
        warmup = f"Warm-up over {rates[0].warmup} steps, batches of {runs['batch_size'][0]:,} rows.\n\n"
        made[model] = f"{warmup}{table}\n{proposal(rates)}\n"
    return made


def _at_start(rate: Judged, rates: Sequence[Judged]) -> bool:
    return any(reason.endswith("the start") for reason in objections(rate, rates))


def _way(share: float, best: float) -> float:
    """The AUC at a share of the way from 0.5 to the best."""
    return 0.5 + share * (best - 0.5)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


CALIBRATION = Study(
    name="calibrate",
    title="Where 1x is, judged on the day before the test day",
    phases=(Phase("calibrate", lambda setting, _: calibration_jobs(setting), read=read),),
    sections=calibration_sections,
)
