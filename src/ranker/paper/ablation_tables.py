"""Ablation tables of Clippy: its two ideas one at a time, its two lambdas, and its bound applied to Adam."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ranker.paper.jobs import LABELS, Data, Job, Setting, grid
from ranker.paper.rendering import cell
from ranker.paper.study import Found, Phase, Sections, Study
from ranker.reports.comparison import as_markdown

MODELS = ("small", "large_dcn")
RULES = ("clippy", "clippy_norm2", "clippy_gradient", "clippy_gradient_norm2")
# A bound on the gradient has another unit than a bound on the update, so both lambdas are tried at three sizes, in the
# paper's ratio.
SIZES = ((0.5, 1e-2), (0.05, 1e-3), (5e-3, 1e-4))
LAMBDA_REL = (0.0, 0.1, 0.5, 1.0)
LAMBDA_ABS = (1e-3, 1e-2, 1e-1)
# Adam's updates are about as large as the learning rate, so 1x of the data set (meant for Adagrad) is far too high.
ADAM_RATES = (0.005, 0.02, 0.1, 0.5)
UNCLIPPED = 1e9


def rule_jobs(setting: Setting) -> list[Job]:
    """Bound on the update or on the gradient, in the infinity norm or the 2-norm."""
    jobs = []
    for rel, absolute in SIZES[:1] if setting.quick else SIZES:
        axes: dict[str, Sequence[object]] = {
            "model": _models(setting),
            "optim": RULES,
            "lr_mult": (2,),
            "optim.lambda_rel": (rel,),
            "optim.lambda_abs": (absolute,),
        }
        jobs += grid(setting.bare, {**axes, "seed": setting.seed_list})
    return jobs


def lambda_jobs(setting: Setting) -> list[Job]:
    """The grid of lambda_rel and lambda_abs at 2x."""
    axes: dict[str, Sequence[object]] = {
        "model": _models(setting),
        "optim": ("clippy",),
        "lr_mult": (2,),
        "optim.lambda_rel": LAMBDA_REL[::2] if setting.quick else LAMBDA_REL,
        "optim.lambda_abs": LAMBDA_ABS[:2] if setting.quick else LAMBDA_ABS,
    }
    return grid(setting.bare, {**axes, "seed": setting.seed_list})


def adam_jobs(setting: Setting) -> list[Job]:
    """Adam with and without Clippy's bound. Embeddings use Adagrad with a separate learning rate."""
    axes: dict[str, Sequence[object]] = {
        "model": _models(setting),
        "optim": ("clippy_adam",),
        "lr_mult": ADAM_RATES[1::2] if setting.quick else ADAM_RATES,
        "optim.lambda_abs": (1e-2, UNCLIPPED),
    }
    return grid((*setting.bare, "+optim.embedding.lr=0.4"), {**axes, "seed": setting.seed_list})


def _models(setting: Setting) -> tuple[str, ...]:
    return setting.models_of(MODELS)


RULE_LABELS = {
    "clippy": "update, infinity norm (Clippy)",
    "clippy_norm2": "update, 2-norm",
    "clippy_gradient": "gradient, infinity norm",
    "clippy_gradient_norm2": "gradient, 2-norm",
}


def _rules(data: Data, found: Found) -> Sections:
    made = {}
    for model, runs in _by_model(found["rules"]):
        rows = []
        for rule in RULES:
            mine = runs.filter(pl.col("optim") == rule)
            sizes = [mine.filter(pl.col("optim.lambda_rel") == rel) for rel, _ in SIZES]
            rows.append([RULE_LABELS[rule], *(cell(size, f"{data.auc}/auc") for size in sizes)])
        header = [f"lambda_rel {rel:g}, lambda_abs {absolute:g}" for rel, absolute in SIZES]
        made[model] = as_markdown([f"{LABELS[model]}, what is bounded", *header], rows)
    return made


def _lambdas(data: Data, found: Found) -> Sections:
    made = {}
    for model, runs in _by_model(found["lambdas"]):
        columns = sorted(runs["optim.lambda_abs"].unique())
        rows = []
        for (rel,), mine in runs.sort("optim.lambda_rel").group_by("optim.lambda_rel", maintain_order=True):
            at = [mine.filter(pl.col("optim.lambda_abs") == absolute) for absolute in columns]
            rows.append([f"{rel:g}", *(cell(runs, f"{data.auc}/auc") for runs in at)])
        made[model] = as_markdown([f"{LABELS[model]}, lambda_rel", *(f"lambda_abs {a:g}" for a in columns)], rows)
    return made


def _adam(data: Data, found: Found) -> Sections:
    made = {}
    for model, runs in _by_model(found["adam"]):
        rows = []
        for (rate,), mine in runs.sort("lr").group_by("lr", maintain_order=True):
            clipped = pl.col("optim.lambda_abs") < UNCLIPPED
            cells = [cell(mine.filter(which), f"{data.auc}/auc") for which in (~clipped, clipped)]
            rows.append([f"{rate:g}", *cells])
        made[model] = as_markdown([f"{LABELS[model]}, lr", "Adam", "Adam with Clippy's bound"], rows)
    return made


def _by_model(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [(m, runs.filter(pl.col("model") == m)) for m in LABELS if m in runs["model"].unique()]


RULE = Study(
    name="rules",
    title="Clippy's two ideas, one at a time, at 2x",
    phases=(Phase("rules", lambda setting, _: rule_jobs(setting)),),
    sections=_rules,
)
LAMBDA = Study(
    name="lambdas",
    title="Clippy's lambda_rel and lambda_abs, at 2x",
    phases=(Phase("lambdas", lambda setting, _: lambda_jobs(setting)),),
    sections=_lambdas,
)
ADAM = Study(
    name="adam",
    title="Clippy's bound on Adam",
    phases=(Phase("adam", lambda setting, _: adam_jobs(setting)),),
    sections=_adam,
)
