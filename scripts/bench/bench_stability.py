"""How good and how cheap divergence detection is: python scripts/bench/bench_stability.py [--json FILE] [--seeds N].

Three sources of runs with known events: generated traces, events put into the recorded signals of real healthy runs,
and real runs to which something is done (features scaled, learning rate raised, nan fed). Then healthy runs for false
alarms, the cost of a step's detection beside a training step of Large at laptop scale, and what all stability callbacks
cost at their defaults (``scripts/bench/stability_overhead.py``, which also runs by itself).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import signal_traces as traces
from bench_report import Line, finish, limited, met
from optim import build_optimizer
from ranker import config
from ranker.data.synthetic import SyntheticLog
from ranker.losses import MultitaskLoss
from ranker.metrics import StreamingAUC
from ranker.models import SharedBottom
from ranker.reports.comparison import as_markdown, as_rich
from ranker.stability import DivergenceDetector, Event, measure_sharpness, reduce_signals
from signal_traces import Trace
from stability_cases import BATCH, LR, Case, injections, real_cases, record
from stability_overhead import rows as overhead_rows

LARGE = [512] * 4
HEADER = ["what", "value", "unit", "target", "met"]


@dataclass(frozen=True)
class Detection:
    """A row of the table. Latencies in steps: until suspected, and until the verdict; median and largest."""

    source: str
    event: str
    runs: int
    found: int
    right_kind: int
    false_alarms: int
    suspected: tuple[float, float]
    judged: tuple[float, float]


def judge(trace: Trace) -> tuple[list[Event], int | None, DivergenceDetector]:
    """Events, the first step at which the detector was not content, and the detector."""
    detector = DivergenceDetector([str(t) for t in range(trace.losses_NT.shape[1])])
    events: list[Event] = []
    suspected: int | None = None
    for i in range(len(trace)):
        detector.update(i + 1, **trace.signals(i))
        events += detector.poll()
        if detector.status == "healthy":
            suspected = suspected if events else None
        elif suspected is None:
            suspected = i + 1
        if detector.status == "diverged":
            break
    return events + detector.finish(trace.eval_auc_T), suspected, detector


def score(source: str, name: str, cases: Sequence[Case]) -> Detection:
    """Recall, kinds, false alarms and latency over cases of one sort."""
    found = right = alarms = 0
    suspected, judged = [], []
    for case in cases:
        events, first, _ = judge(case.trace)
        events = [e for e in events if e.kind != "shift"]
        hits = [e for e in events if case.at - 3 <= e.step <= case.at + case.within]
        alarms += sum(e.step < case.at - 3 for e in events)
        found += bool(hits)
        right += any(e.kind == case.kind for e in hits)
        judged += [max(e.judged_at - case.at, 0) for e in hits[-1:]]
        if hits and first is not None:
            suspected.append(max(first - case.at, 0))
    return Detection(source, name, len(cases), found, right, alarms, _spread(suspected), _spread(judged))


def costs() -> dict[str, float]:
    """Microseconds a step for the detector, milliseconds for a step of Large, and what sharpness costs in gradients."""
    torch.manual_seed(0)
    log = SyntheticLog(train_rows=64 * BATCH, eval_rows=BATCH)
    net = SharedBottom(log.schema, hidden=LARGE)
    optimizer = build_optimizer("clippy", net, lr=LR)
    criterion, auc = MultitaskLoss(log.schema), StreamingAUC(log.schema)
    detector = DivergenceDetector(log.schema.task_names)
    batch = log.read(0, BATCH)
    step_s, detect_s = [], []
    for step in range(1, 41):
        start = time.perf_counter()
        logits_BT = net(batch)
        loss = criterion(logits_BT, batch.labels_BT, batch.mask_BT)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        step_s.append(time.perf_counter() - start)
        auc.update(logits_BT.detach(), batch.labels_BT, batch.mask_BT)
        stats = auc.stats()
        start = time.perf_counter()
        signals = reduce_signals(
            loss.task_T,
            stats.auc_T,
            stats.spread_T,
            stats.nonfinite_T.sum() > 0,
            batch_auc_T=stats.batch_auc_T,
            positives_T=stats.positives_T,
            labels_T=stats.labels_T,
            variance_T=stats.variance_T,
        )
        detector.update(step, **signals)
        detector.poll()
        detect_s.append(time.perf_counter() - start)
    dense = [p for name, p in net.named_parameters() if not name.startswith("embeddings.")]
    start = time.perf_counter()
    criterion(net(batch), batch.labels_BT, batch.mask_BT).total.backward()
    gradient_s = time.perf_counter() - start
    start = time.perf_counter()
    measure_sharpness(criterion(net(batch), batch.labels_BT, batch.mask_BT).total, dense, lr=LR, tolerance=1e-2)
    sharpness_s = time.perf_counter() - start
    return {
        "detector_us": 1e6 * statistics.median(detect_s[5:]),
        "large_step_ms": 1e3 * statistics.median(step_s[5:]),
        "detector_share_of_step": statistics.median(detect_s[5:]) / statistics.median(step_s[5:]),
        "sharpness_in_gradients": sharpness_s / gradient_s,
    }


def figures(lines: Sequence[Detection], *, alarms: int, healthy_steps: int, cost: dict[str, float]) -> list[Line]:
    """What the lines and the healthy runs come to, beside the targets."""
    runs, found = sum(x.runs for x in lines), sum(x.found for x in lines)
    rate = 100_000 * alarms / healthy_steps
    share = cost["detector_share_of_step"]
    made = [
        Line("events found", found / runs, "ratio", ">= 0.99", found / runs >= 0.99),
        Line("events of known kind", runs, "runs"),
        Line("kind told right", sum(x.right_kind for x in lines) / runs, "ratio"),
        Line("healthy steps", healthy_steps, "steps"),
        Line("false alarms", rate, "per 100,000 healthy steps", "<= 1", rate <= 1),
        limited("detector, share of a step of Large", share, 0.03),
    ]
    made += [Line(name.replace("_", " "), value, "") for name, value in cost.items() if "share" not in name]
    for x in lines:
        event = f"{x.source}: {x.event}"
        made += [
            Line(f"{event}: found", x.found / x.runs, "ratio"),
            Line(f"{event}: suspected after, median", x.suspected[0], "steps"),
            Line(f"{event}: judged after, median", x.judged[0], "steps"),
        ]
    return [x for x in made if math.isfinite(x.value)]  # no latency of an event that no run showed


def table_of(lines: Sequence[Detection]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was found, and after how many steps (median, and at most)."""
    header = ["runs", "event", "found", "right kind", "false alarms", "suspected after", "judged after"]
    rows = []
    for x in lines:
        after = (f"{a:g} (at most {b:g})" for a, b in (x.suspected, x.judged))
        counts = (f"{x.found} of {x.runs}", f"{x.right_kind} of {x.runs}", str(x.false_alarms))
        rows.append([x.source, x.event, *counts, *after])
    return header, rows


def main() -> int:
    """Measures and prints; returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--seeds", type=int, default=20, help="generated runs of each kind (real ones: a fifth)")
    parser.add_argument("--healthy-steps", type=int, default=300_000, help="generated healthy steps")
    parser.add_argument("--overhead-rounds", type=int, default=12, help="of the callbacks' cost; 0 leaves it out")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    console, lines = Console(width=140), []
    real_seeds = range(max(2, args.seeds // 5))
    console.print("training healthy runs")
    base = [record(steps=1500, seed=s, method=m) for s in real_seeds for m in ("clippy", "gc")]
    for name, kind, within, inject in injections():
        console.print(f"event: {name}")
        places = [600 + 13 * s for s in range(args.seeds)]
        made = [traces.healthy(steps=1500, seed=s) for s in range(args.seeds)]
        generated = [Case(inject(t, at), at, kind, within) for t, at in zip(made, places, strict=True)]
        recorded = [Case(inject(t, 600 + 13 * i), 600 + 13 * i, kind, within) for i, t in enumerate(base)]
        lines += [score("generated", name, generated), score("recorded, event put in", name, recorded)]
    console.print("training runs that something is done to")
    lines += [score("real", name, cases) for name, cases in real_cases(real_seeds)]
    console.print(f"{args.healthy_steps:,} healthy steps")
    healthy = [
        *base,
        *(traces.healthy(steps=50_000, seed=1000 + s) for s in range(args.healthy_steps // 50_000)),
    ]
    alarms = sum(len([e for e in judge(t)[0] if e.kind != "shift"]) for t in healthy)
    found = figures(
        lines,
        alarms=alarms + sum(x.false_alarms for x in lines),
        healthy_steps=sum(len(t) for t in healthy),
        cost=costs(),
    )
    header, rows = table_of(lines)
    console.print(as_rich(header, rows, title="events"))
    summary = [[x.name, f"{x.value:.4g}", x.unit, x.target, met(x)] for x in found if ": " not in x.name]
    console.print(as_rich(HEADER, summary, title="the detector"))
    callbacks = []
    if args.overhead_rounds:
        console.print("what the callbacks cost")
        torch.set_num_threads(threads)
        config.register()
        callbacks = [Line(**row) for row in overhead_rows(args.overhead_rounds)]
        found += callbacks
    costs_of = [[x.name, f"{x.value:.2f}", x.unit, x.target, met(x)] for x in callbacks]
    if callbacks:
        console.print(as_rich(HEADER, costs_of, title="the callbacks"))
    if args.markdown:
        text = "\n".join((as_markdown(HEADER, summary), as_markdown(header, rows), as_markdown(HEADER, costs_of)))
        args.markdown.write_text(text, encoding="utf-8")
    return finish(found, args.json)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return (statistics.median(values), max(values)) if values else (math.nan, math.nan)


if __name__ == "__main__":
    sys.exit(main())
