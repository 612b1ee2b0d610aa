"""Tables of when training diverges: table 3, batch size, window, mitigations, and learning rates up to 16x."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from omegaconf import OmegaConf

from ranker.installation import conf_folder
from ranker.paper.jobs import LABELS, METHODS, Data, Job, Setting, grid
from ranker.paper.rendering import cell, lost_at, spread
from ranker.paper.store import matching
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.paper.survival import survival_jobs
from ranker.reports.comparison import as_markdown

# Table 3: naive Adagrad on Large+DCN, with one thing removed at a time.
PAPER_DIVERGED = ("5 of 5", "1 of 3", "2 of 3", "2 of 3", "2 of 3", "2 of 3", "0 of 3")  # as ``table3_rows``
TABLE3_KEYS = ("model", "model.net.hidden", "data.drop_features", "data.tasks")
TABLE3_SEEDS = 10
TABLE3_RATE = 0.4

# Batch size and window. Naive Adagrad trains at 0.25x and is lost at 1x, so a change in either direction is visible.
CONDITION_RATES: dict[str, tuple[float, ...]] = {"adagrad": (0.25, 0.5, 1), "clippy": (1,)}
BATCHES = (256, 1024, 4096)
WINDOWS = (1024, 16384, 262144)  # rows; the first is nearly strict time order, the last is more than a day of KuaiRand
# The first four are about the start of training: what the regime's warm-up and biases are worth.
MITIGATIONS: dict[str, Job] = {
    "none": (),
    "no warm-up": ("train.warmup_steps=0",),
    "heads start at 0": ("train.head_bias=zero",),
    "no warm-up, heads start at 0": ("train.warmup_steps=0", "train.head_bias=zero"),
    "warm-up, 400 steps": ("train.warmup_steps=400",),
    "activations clipped at 10": ("model.net.clip_activations=10",),
    "layer norm": ("model.net.layer_norm=true",),
    "widest window": ("data.window=262144",),
    "a quarter of the rate": ("lr_mult=0.25",),
}

# High rates: multiples of 1x in addition to those of the survival curves.
ABOVE = (8, 16)
BELOW = (0.5, 0.25, 0.125, 0.0625)  # for naive Adagrad, which is lost at 1x


def table3_rows(data: Data) -> dict[str, Job]:
    """Label and overrides of each row of table 3."""
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


def table3_jobs(setting: Setting) -> list[Job]:
    """Naive Adagrad with several seeds per row."""
    seeds = setting.seeds_or(TABLE3_SEEDS)
    return [
        job
        for row in table3_rows(setting.data).values()
        for job in grid((*setting.bare, *row, "optim=adagrad"), {"lr_mult": (TABLE3_RATE,), "seed": seeds})
    ]


def table3_sections(data: Data, found: Found) -> Sections:
    """Diverged runs of n with the exact binomial interval (Clopper, Pearson 1934), next to the paper's counts."""
    from scipy.stats import binomtest

    lines = []
    for (label, overrides), paper in zip(table3_rows(data).items(), PAPER_DIVERGED, strict=True):
        runs = matching(found["table3"], overrides, TABLE3_KEYS)
        if runs.is_empty():
            continue
        lost, n = runs.filter(pl.col("status") == "diverged").height, runs.height
        interval = binomtest(lost, n).proportion_ci(0.95, method="exact")
        kept = runs.filter(pl.col("status") == "completed")[f"{data.auc}/auc"].to_list()
        auc = f"{spread(kept, percent=True)} (n={len(kept)})" if kept else "-"
        share = f"{100 * interval.low:.0f} to {100 * interval.high:.0f} %"
        unsettled = runs.filter(pl.col("status") == "unsettled").height
        count = f"{lost} of {n}" + (f", {unsettled} unsettled" if unsettled else "")
        lines.append([label, count, share, lost_at(runs) or "-", auc, paper])
    header = ["naive Adagrad", "diverged", "95 % interval", "at step (median)", f"{data.auc} AUC of the others"]
    return {f"at-{TABLE3_RATE:g}x": as_markdown([*header, "paper, at its own 0.4x"], lines)}


def condition_jobs(setting: Setting, key: str, values: tuple[int, ...]) -> list[Job]:
    """Small, or other models on request, with each value of one setting, at the rates of ``CONDITION_RATES``."""
    jobs = []
    models = setting.models_of(("small",) if setting.models is None else tuple(LABELS))
    for method, rates in CONDITION_RATES.items():
        axes: dict[str, Sequence[object]] = {"model": models, "optim": (method,), "lr_mult": rates}
        axes[key] = values[::2] if setting.quick else values
        jobs += grid(setting.bare, {**axes, "seed": setting.seed_list})
    return jobs


def batch_jobs(setting: Setting) -> list[Job]:
    """Each batch size, with a warm-up over the same number of rows; a warm-up of the same steps could last all day."""
    files = ("_base", setting.data.name)
    regime = OmegaConf.merge(*(OmegaConf.load(conf_folder() / "data" / f"{name}.yaml") for name in files))
    rows = regime.batch_size[setting.scale] * regime.warmup_steps[setting.scale]
    jobs = condition_jobs(setting, "scale.batch_size", BATCHES)
    return [(*job, f"train.warmup_steps={round(rows / _batch_of(job))}") for job in jobs]


def _batch_of(job: Job) -> int:
    return int(next(override for override in job if override.startswith("scale.batch_size=")).split("=")[1])


def condition_sections(data: Data, runs: pl.DataFrame, key: str, label: str) -> Sections:
    """One section per model: AUC and lost runs for each value of one setting."""
    columns = [(method, rate) for method, rates in CONDITION_RATES.items() for rate in rates]
    made = {}
    for model in (model for model in LABELS if model in runs["model"].unique()):
        rows = []
        for (value,), here in runs.filter(pl.col("model") == model).sort(key).group_by(key, maintain_order=True):
            cells = []
            for method, rate in columns:
                mine = here.filter((pl.col("optim") == method) & (pl.col("lr_mult") == rate))
                cells.append(cell(mine, f"{data.auc}/auc"))
            rows.append([f"{value:,.0f}", *cells])
        head = [f"{LABELS[model]}, {label}", *(f"{method} {rate:g}x" for method, rate in columns)]
        made[model] = as_markdown(head, rows)
    return made


def mitigation_jobs(setting: Setting) -> list[Job]:
    """Each mitigation at 1x, with naive Adagrad and with Clippy."""
    jobs = []
    for model in setting.models_of(("small", "large_dcn")):
        for method in ("adagrad", "clippy"):
            for overrides in MITIGATIONS.values():
                rate = () if any(o.startswith("lr_mult=") for o in overrides) else ("lr_mult=1",)
                axes: dict[str, Sequence[object]] = {"model": (model,), "optim": (method,)}
                jobs += grid((*setting.bare, *rate, *overrides), {**axes, "seed": setting.seed_list})
    return jobs


def mitigation_sections(data: Data, found: Found) -> Sections:
    """AUC and diverged runs for each mitigation, one section per model."""
    runs = found["mitigations"]
    keys = sorted({o.split("=")[0] for overrides in MITIGATIONS.values() for o in overrides} - {"lr_mult"})
    made = {}
    for model in (m for m in LABELS if m in runs["model"].unique()):
        rows = []
        for label, overrides in MITIGATIONS.items():
            rate = next((o for o in overrides if o.startswith("lr_mult=")), "lr_mult=1")
            chosen = (f"model={model}", *(o for o in overrides if not o.startswith("lr_mult=")), rate)
            mine = matching(runs, chosen, ("model", "lr_mult", *keys))
            cells = [_with_step(mine.filter(pl.col("optim") == m), data) for m in ("adagrad", "clippy")]
            if cells != ["-", "-"]:  # there are runs
                rows.append([label, *cells])
        made[model] = as_markdown([f"{LABELS[model]}, {data.auc} AUC", "naive Adagrad", "Clippy"], rows)
    return made


def rate_jobs(setting: Setting) -> list[Job]:
    """Naive Adagrad at lower rates than those of the survival curves, the other methods at higher ones."""
    models = list(dict.fromkeys(override for job in survival_jobs(setting) for override in job if "model=" in override))
    jobs = []
    for method in METHODS[::4] if setting.quick else METHODS:
        rates: tuple[float, ...] = BELOW if method == "adagrad" else ABOVE
        axes: dict[str, Sequence[object]] = {
            "model": [model.removeprefix("model=") for model in models],
            "optim": (method,),
            "lr_mult": rates[:1] if setting.quick else rates,
        }
        jobs += grid(setting.bare, {**axes, "seed": setting.seed_list})
    return jobs


def largest_stable(runs: pl.DataFrame) -> float | None:
    """The largest multiple below the first one at which a run diverged; None if that is the smallest one.

    Args:
        runs: of one model and method.
    """
    largest = None
    for (multiple,), tried in runs.sort("lr_mult").group_by("lr_mult", maintain_order=True):
        if (tried["status"] != "completed").any():
            break
        largest = float(multiple)
    return largest


def rate_sections(data: Data, found: Found) -> Sections:
    """The largest stable multiple of each cell, and the AUC at every multiple."""
    runs = pl.concat([found["survival"], found["rates"]], how="diagonal_relaxed")
    stable, aucs = [], []
    for model in (model for model in LABELS if model in runs["model"].unique()):
        here = runs.filter(pl.col("model") == model)
        stable.append([LABELS[model], *(_stable(here.filter(pl.col("optim") == method)) for method in METHODS)])
        for multiple in sorted(here["lr_mult"].unique()):
            at = here.filter(pl.col("lr_mult") == multiple)
            cells = []
            for method in METHODS:
                mine = at.filter(pl.col("optim") == method)
                cells.append("" if mine.is_empty() else cell(mine, f"{data.auc}/auc"))
            aucs.append([LABELS[model], f"{multiple:g}x", *cells])
    return {
        "largest-stable": as_markdown(["largest stable lr", *METHODS], stable),
        "auc": as_markdown([f"{data.auc} AUC", "lr", *METHODS], aucs),
    }


def _with_step(runs: pl.DataFrame, data: Data) -> str:
    """The cell, and the median first step of what ended the lost runs."""
    step = lost_at(runs)
    return cell(runs, f"{data.auc}/auc") + (f", at step {step} (median)" if step else "")


def _stable(runs: pl.DataFrame) -> str:
    largest = largest_stable(runs)
    if largest is None:
        return f"below {min(runs['lr_mult'].to_list()):g}x"
    return f"{largest:g}x" + (" or more" if largest == runs["lr_mult"].max() else "")


def _tasks(data: Data, *without: str) -> str:
    return "data.tasks=[" + ",".join(task for task in data.tasks if task not in without) + "]"


TABLE3 = Study(
    name="table3",
    title="Table 3, what makes naive Adagrad diverge",
    phases=(Phase("table3", lambda setting, _: table3_jobs(setting)),),
    sections=table3_sections,
)
BATCH = Study(
    name="batch",
    title="Whether divergence moves with the batch size, over the same rows",
    phases=(Phase("batch", lambda setting, _: batch_jobs(setting)),),
    sections=lambda data, found: condition_sections(data, found["batch"], "scale.batch_size", "rows a step"),
)
WINDOW = Study(
    name="window",
    title="Whether divergence moves with the width of the window",
    phases=(Phase("window", lambda setting, _: condition_jobs(setting, "data.window", WINDOWS)),),
    sections=lambda data, found: condition_sections(data, found["window"], "data.window", "rows in the window"),
)
MITIGATION = Study(
    name="mitigations",
    title="Ad-hoc mitigations, alone and with Clippy",
    phases=(Phase("mitigations", lambda setting, _: mitigation_jobs(setting)),),
    sections=mitigation_sections,
)
HIGH_RATES = Study(
    name="rates",
    title="Learning rates up to 16x",
    phases=(Phase("rates", lambda setting, _: rate_jobs(setting)),),
    sections=rate_sections,
    needs=("survival",),
)
