"""The runs with known events that scripts/bench/bench_stability.py judges the detector by.

Generated traces, events put into the recorded signals of real healthy runs, and real runs to which something is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import signal_traces as traces
from optim import build_optimizer
from ranker.data.batch import Batch
from ranker.data.loader import WindowedLoader
from ranker.data.synthetic import SyntheticLog
from ranker.data.synthetic_world import Difficulty
from ranker.data.windows import plan_windows
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC, TaskMetrics
from ranker.models import SharedBottom
from signal_traces import Trace

BATCH = 1024
LR = 0.2
SMALL = [64, 64]
Disturb = Callable[[int, Batch, torch.optim.Optimizer], Batch]
Inject = Callable[[Trace, int], Trace]


@dataclass(frozen=True)
class Case:
    """A run with one known event: its kind, its first step, and by how many steps the detector's may be off."""

    trace: Trace
    at: int
    kind: str
    within: int


def injections() -> Iterator[tuple[str, str, int, Inject]]:
    """Name, kind, tolerance in steps and injection of every event that can be put into a trace."""
    for length in (1, 10, 100):
        for factor in (3.0, 30.0):

            def spike(trace: Trace, at: int, length: int = length, factor: float = factor) -> Trace:
                return traces.spike(trace, at=at, length=length, factor=factor)

            yield f"spike {factor:g}x, {length} steps", "micro", 3, spike
    yield "nan, 1 step", "micro", 1, lambda t, at: traces.not_a_number(t, at=at, length=1)
    yield "nan for good", "full", 1, lambda t, at: traces.not_a_number(t, at=at, length=len(t))
    for rate in (0.01, 0.05):

        def blow_up(trace: Trace, at: int, rate: float = rate) -> Trace:
            return traces.blow_up(trace, at=at, rate=rate)

        yield f"blow-up, {rate:.0%} a step", "full", round(2 / rate), blow_up
    yield "5x for good", "full", 3, lambda t, at: traces.step_up(t, at=at, factor=5.0)
    yield "constant predictions", "full", 3, lambda t, at: traces.die(t, at=at)
    yield "AUC to 0.5, loss as before", "full", 200, lambda t, at: traces.forget(t, at=at)


def record(
    *,
    steps: int,
    seed: int,
    method: str = "clippy",
    lr: float = LR,
    jump: float = 0.0,
    disturb: Disturb | None = None,
    **options: Any,
) -> Trace:
    """Trains Small on the stream and keeps the signals of every step."""
    torch.manual_seed(seed)
    log = SyntheticLog(seed=seed, train_rows=steps * BATCH, eval_rows=16 * BATCH, difficulty=Difficulty(jump=jump))
    net = SharedBottom(log.schema, hidden=SMALL)
    optimizer = build_optimizer(method, net, lr=lr, **options)
    criterion, auc, held_out = MultitaskLoss(log.schema), StreamingAUC(log.schema), TaskMetrics(log.schema)
    rows = []
    plan = plan_windows(log, window=16 * BATCH, batch_size=BATCH)
    for step, batch in enumerate(WindowedLoader(log, plan=plan, seed=seed, num_workers=0), start=1):
        batch = disturb(step, batch, optimizer) if disturb else batch
        logits_BT = net(batch)
        loss = criterion(logits_BT, batch.labels_BT, batch.mask_BT)
        auc.update(logits_BT.detach(), batch.labels_BT, batch.mask_BT)
        stats = auc.stats()
        batch_only = stats.batch_auc_T, stats.positives_T, stats.variance_T
        rows.append((loss.task_T, stats.auc_T, stats.spread_T, stats.nonfinite_T.sum() > 0, *batch_only))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    net.eval()
    rest = log.read(log.train_rows, log.num_rows)
    with torch.no_grad():
        held_out.update(net(rest), rest.labels_BT, rest.mask_BT)
    values = held_out.compute()
    losses, aucs, spreads, nonfinite, batch_aucs, positives, variances = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    return Trace(
        losses_NT=losses,
        auc_NT=aucs,
        spread_NT=spreads,
        nonfinite_N=nonfinite,
        batch_auc_NT=batch_aucs,
        positives_NT=positives,
        variance_NT=variances,
        eval_auc_T=torch.tensor([values.get(f"{name}/auc", math.nan) for name in log.schema.task_names]),
    )


def scaled_features(at: int, length: int) -> Disturb:
    """All dense features 30 times as large for some steps."""

    def disturb(step: int, batch: Batch, _optimizer: torch.optim.Optimizer) -> Batch:
        return replace(batch, dense_BF=batch.dense_BF * 30.0) if at <= step < at + length else batch

    return disturb


def nan_features(at: int) -> Disturb:
    """One feature of one row is nan in one step."""

    def disturb(step: int, batch: Batch, _optimizer: torch.optim.Optimizer) -> Batch:
        if step != at:
            return batch
        dense_BF = batch.dense_BF.clone()
        dense_BF[0, 0] = math.nan
        return replace(batch, dense_BF=dense_BF)

    return disturb


def raised_lr(at: int, length: int, factor: float) -> Disturb:
    """The learning rate ``factor`` times as high for some steps; the first loss that shows it is a step later."""

    def disturb(step: int, batch: Batch, optimizer: torch.optim.Optimizer) -> Batch:
        for group in optimizer.param_groups:
            group.setdefault("usual_lr", group["lr"])
            group["lr"] = group["usual_lr"] * (factor if at - 1 <= step < at - 1 + length else 1.0)
        return batch

    return disturb


def real_cases(seeds: Sequence[int]) -> Iterator[tuple[str, list[Case]]]:
    """Runs to which something is really done at step 300, or whose learning rate is too high from the start."""
    for length in (1, 10, 100):
        made = [record(steps=550, seed=s, disturb=scaled_features(300, length)) for s in seeds]
        yield f"features 30x, {length} steps", [Case(t, 300, "micro", 2) for t in made]
    made = [record(steps=350, seed=s, disturb=nan_features(300)) for s in seeds]
    yield "nan in a feature", [Case(t, 300, "full", 1) for t in made]
    made = [record(steps=400, seed=s, disturb=nan_features(300), on_nonfinite="skip") for s in seeds]
    yield "nan in a feature, step skipped", [Case(t, 300, "micro", 1) for t in made]
    made = [record(steps=450, seed=s, method="adagrad", lr=0.05, disturb=raised_lr(300, 1, 100.0)) for s in seeds]
    kinds = ["micro" if t.eval_auc_T[0] > 0.55 else "full" for t in made]  # it may be lost for good, or not
    yield "learning rate 100x, 1 step (naive)", [Case(t, 300, k, 3) for t, k in zip(made, kinds, strict=True)]
    made = [record(steps=400, seed=s, method="adagrad", lr=3.2) for s in seeds]
    yield "learning rate 16x from the start (naive)", [Case(t, 2, "full", 3) for t in made]
