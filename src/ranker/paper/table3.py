"""Table 3: what makes naive Adagrad diverge, one thing taken away at a time."""

from __future__ import annotations

import polars as pl

from ranker.paper.jobs import BARE, Data, Job, Setting, grid
from ranker.paper.markdown import spread, table
from ranker.paper.statistics import clopper_pearson
from ranker.paper.store import matching
from ranker.paper.study import Found, Phase, Sections, Study

PAPER = ("5 of 5", "1 of 3", "2 of 3", "2 of 3", "2 of 3", "2 of 3", "0 of 3")  # in the order of ``rows``
KEYS = ("model", "model.net.hidden", "data.drop_features", "data.tasks")

SEEDS = 10
PAPER_RATE = 0.4


def rows(data: Data) -> dict[str, Job]:
    """Label of each row and the overrides that make it; all start from Large+DCN."""
    one, two = data.dropped
    return {
        "Large+DCN": ("model=large_dcn",),
        "smaller model": ("model=large_dcn", "model.net.hidden='${model.widths.small.${scale.name}}'"),
        "no DCN": ("model=large",),
        "subset of the features": ("model=large_dcn", *data.fewer_features),
        f"one task fewer ({one})": ("model=large_dcn", _tasks(data, one)),
        f"one task fewer ({two})": ("model=large_dcn", _tasks(data, two)),
        f"two tasks fewer ({one}, {two})": ("model=large_dcn", _tasks(data, one, two)),
    }


def jobs(setting: Setting, *, lr_mult: float = PAPER_RATE) -> list[Job]:
    """Naive Adagrad, several seeds a row."""
    seeds = tuple(range(2 if setting.quick else max(SEEDS, setting.seeds)))
    return [
        job
        for row in rows(setting.data).values()
        for job in grid((*setting.common, *BARE, *row, "optim=adagrad"), {"lr_mult": (lr_mult,), "seed": seeds})
    ]


def _tasks(data: Data, *without: str) -> str:
    return "data.tasks=[" + ",".join(task for task in data.tasks if task not in without) + "]"


def sections(data: Data, found: Found) -> Sections:
    """How many of n, with an exact interval at each learning rate, beside the paper's counts."""
    made = {}
    for phase, rate in RATES.items():
        lines = []
        for (label, overrides), paper in zip(rows(data).items(), PAPER, strict=True):
            runs = matching(found[phase], overrides, KEYS)
            if runs.is_empty():
                continue
            lost, n = runs.filter(pl.col("status") == "diverged").height, runs.height
            interval = clopper_pearson(lost, n)
            kept = runs.filter(pl.col("status") == "completed")[f"{data.auc}/auc"].to_list()
            share = f"{100 * interval.low:.0f} to {100 * interval.high:.0f} %"
            lines.append([label, f"{lost} of {n}", share, spread(kept, percent=True) or "-", paper])
        made[f"at-{rate:g}x"] = table(
            ["naive Adagrad", "diverged", "95 % interval", f"{data.auc} AUC of the others", "paper, at its own 0.4x"],
            lines,
        )
    return made


RATES = {"table3": PAPER_RATE}

STUDY = Study(
    name="table3",
    title="Table 3, what makes naive Adagrad diverge",
    phases=(Phase("table3", lambda setting, _: jobs(setting)),),
    sections=sections,
)
