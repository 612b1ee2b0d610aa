"""The events of recorded runs, and what the detector says of them: ``python scripts/bench/natural_events.py --help``.

A loss (the sum that the optimizer minimises) is bad where it is not finite, or at least twice its median over the 100
steps before. An event begins at the first bad loss after step 100, if 3 of the 10 losses from there on are bad: one
alone is an outlier among the labels. Only the first event of a run counts. What it did is told by the AUC, 400 to 500
steps later (or in the last 100 steps of a run that ends sooner, but at least 150 steps later):

    recovered   at most ``--tolerance`` below the twin
    lost        it has gained less than a quarter of what the twin is above the AUC before the event
    set back    between the two: the event or the rate cost something; neither verdict would be wrong
    unsettled   the run ends too soon to tell
    start       no mid-run event: the AUC before the event, or at the end of a run without one, is below 0.53

The AUC is that of the predictions before each step, over 100 steps, averaged over the binary tasks with at least 200
positive rows there. The twin is a run without an event on the same rows in the same order (the same data and seed), as
much like the run as there is one: of the same model, then of the same G_0, then of the same optimizer and rate (where
the scale of a feature jumps in the run and not in the twin), then plain Adagrad, then of the lowest rate. The detector
takes no part in this.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ranker.reports.comparison import as_markdown
from ranker.stability import DivergenceDetector
from recorded_runs import BLOCK, LEARNED, PAST, Recorded, first_event, read

SETTLED = 150  # steps after the event from which on its outcome can be told
FEWEST_POSITIVES = 200
GAINED = 0.25  # share of the way from the AUC before the event to the twin's, below which the run is lost
EARLY, LATE = 3, 20  # a detected event belongs to the true one if it begins in this many steps around it


@dataclass(frozen=True)
class Outcome:
    """A recorded run and its first event.

    Attributes:
        name: name of its file.
        kind: ``healthy`` without an event; ``recovered``, ``lost``, ``set back`` or ``unsettled``; ``start`` for a run
            that is lost before it has learned, and left out.
        step: first step of the event; 0 without one.
        depth: largest ratio of the loss to its median before.
        before: AUC over the last 100 steps before the event.
        after: AUC at the end of what was recorded, at most 500 steps after the event.
        twin: AUC of the twin over the same steps.
    """

    name: str
    data: str
    model: str
    optim: str
    lr: float
    start: float
    seed: int
    steps: int
    kind: str
    step: int = 0
    depth: float = math.nan
    before: float = math.nan
    after: float = math.nan
    twin: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """What a detector said of a run: its first micro and its full divergence; 0 where there is none."""

    name: str
    micro: int
    micro_judged: int
    full: int
    full_judged: int
    suspected: int


def skill(run: Recorded, stop: int) -> dict[int, float]:
    """AUC per task over the last two whole blocks that end at or before a step; only tasks with enough positives."""
    last = stop // BLOCK
    tasks = len(run.meta["tasks"])
    positives_T = run.arrays["signals"][(last - 2) * BLOCK : last * BLOCK, 4 * tasks : 5 * tasks].sum(0)
    aucs_T = run.arrays["block_auc"][max(last - 2, 0) : last].mean(0)
    return {
        t: float(aucs_T[t])
        for t in range(tasks)
        if run.meta["task_types"][t] == "binary" and positives_T[t] >= FEWEST_POSITIVES
    }


def outcomes(runs: Mapping[str, Recorded], tolerance: float) -> list[Outcome]:
    """The outcome of every run, by the twins among the runs."""
    events = {name: first_event(run.loss_N.tolist()) for name, run in runs.items()}
    learned = {name: len(run.arrays["block_auc"]) >= 6 and (events[name] or _alive(run)) for name, run in runs.items()}
    unhit = {name: runs[name] for name in runs if events[name] is None and learned[name]}
    return [
        _outcome(name, run, events[name], bool(learned[name]), _twin(run, unhit), tolerance)
        for name, run in runs.items()
    ]


def _alive(run: Recorded) -> bool:
    """Whether a run knows more than chance at its end. One that was lost without three bad losses is no twin."""
    aucs = list(skill(run, run.steps).values())
    return not aucs or statistics.mean(aucs) >= LEARNED


def _twin(run: Recorded, unhit: Mapping[str, Recorded]) -> Recorded | None:
    """The unhit run on the same rows that is most like the run."""
    same = ("data", "seed", "batch_size", "rows")
    found = [
        x
        for x in unhit.values()
        if x.meta["tasks"] == run.meta["tasks"] and all(x.meta.get(k) == run.meta.get(k) for k in same)
    ]
    alike = ("model", "initial_accumulator_value")
    return min(
        found,
        key=lambda x: (
            *(x.meta[k] != run.meta[k] for k in alike),
            (x.meta["optim"], x.meta["lr"]) != (run.meta["optim"], run.meta["lr"]),
            x.meta["optim"] != "adagrad",
            x.meta["lr"],
        ),
        default=None,
    )


def _outcome(
    name: str, run: Recorded, step: int | None, learned: bool, twin: Recorded | None, tolerance: float
) -> Outcome:
    meta = run.meta
    made = (meta["data"], meta["model"], meta["optim"], meta["lr"], meta["initial_accumulator_value"], meta["seed"])
    if step is None:
        return Outcome(name, *made, run.steps, "healthy" if learned else "start")
    past = float(np.median(run.loss_N[step - 1 - PAST : step - 1]))
    depth = float(np.nan_to_num(run.loss_N[step - 1 :], nan=math.inf, posinf=math.inf).max() / past)
    before = _mean(skill(run, step - 1).values())
    if not before >= LEARNED:
        return Outcome(name, *made, run.steps, "start", step, depth, before)
    own = skill(run, run.steps)
    if run.steps - 2 * BLOCK < step + SETTLED or twin is None:
        return Outcome(name, *made, run.steps, "unsettled", step, depth, before)
    others = skill(twin, run.steps)
    after, expected = (_mean(x[t] for t in own.keys() & others.keys()) for x in (own, others))
    if after >= expected - tolerance:
        kind = "recovered"
    else:
        kind = "set back" if after >= before + GAINED * (expected - before) else "lost"  # nan is lost
    return Outcome(name, *made, run.steps, kind, step, depth, before, after, expected)


def judge(name: str, run: Recorded) -> Verdict:
    """What the detector of the code that is imported says, with every setting at its default, polled at each step."""
    detector = DivergenceDetector(run.meta["tasks"])
    known = inspect.signature(detector.update).parameters
    found = {"micro": (0, 0), "full": (0, 0)}
    suspected = 0
    for step, signals in enumerate(_signals(run), start=1):
        detector.update(step, **{key: value for key, value in signals.items() if key in known})
        for event in detector.poll():
            if event.kind in found and not found[event.kind][0]:
                found[event.kind] = (event.step, event.judged_at)
        if detector.status != "healthy" and not suspected and step > PAST:
            suspected = step
        if detector.status == "diverged":
            break
    for event in detector.finish(run.arrays["eval_auc"][-1].tolist(), run.arrays["eval_ne"][-1].tolist()):
        if event.kind in found and not found[event.kind][0]:
            found[event.kind] = (event.step, event.judged_at)
    return Verdict(name, *found["micro"], *found["full"], suspected)


def _signals(run: Recorded) -> Iterator[dict[str, torch.Tensor]]:
    rows, tasks = torch.from_numpy(run.arrays["signals"]), len(run.meta["tasks"])
    for row in rows:
        losses, aucs, spreads, batch, positives, labels, variances, flag, cut = row.split([tasks] * 7 + [1, 3])
        yield {
            "losses_T": losses,
            "auc_T": aucs,
            "spread_T": spreads,
            "nonfinite": flag[0] > 0,
            "batch_auc_T": batch,
            "positives_T": positives,
            "labels_T": labels,
            "variance_T": variances,
            "step_cut_3": cut,
        }


def table(truth: Sequence[Outcome], verdicts: Mapping[str, Mapping[str, Verdict]]) -> tuple[list[str], list[list[str]]]:
    """Recall, precision, latency and false alarms of several detectors, by name of the detector."""
    header = ["detector", "event", "events", "found", "right kind", "called so", "precision", "judged after", "at most"]
    rows = []
    for detector, said in verdicts.items():
        judged = [x for x in truth if x.name in said]
        for kind, called in (("lost", "full"), ("recovered", "micro")):
            events = [x for x in judged if x.kind == kind]
            found = [x for x in events if _near(said[x.name].micro, x.step) or _near(said[x.name].full, x.step)]
            right = [x for x in events if _called(said[x.name], x) == called]
            so = [x for x in judged if x.kind in ("lost", "recovered") and _called(said[x.name], x) == called]
            so += [x for x in judged if x.kind == "healthy" and getattr(said[x.name], called) > PAST]
            latencies = [getattr(said[x.name], f"{called}_judged") - x.step for x in right]
            rows.append(
                [
                    detector,
                    f"{kind} ({called})",
                    str(len(events)),
                    _ratio(len(found), len(events)),
                    _ratio(len(right), len(events)),
                    str(len(so)),
                    _ratio(len([x for x in so if x.kind == kind]), len(so)),
                    f"{statistics.median(latencies):g}" if latencies else "",
                    f"{max(latencies):g}" if latencies else "",
                ]
            )
    return header, rows


def false_alarms(truth: Sequence[Outcome], said: Mapping[str, Verdict]) -> tuple[int, int]:
    """Alarms (of either kind) and healthy steps: of runs without an event, and of the others before theirs."""
    alarms = steps = 0
    for x in truth:
        if x.kind == "start" or x.name not in said:
            continue
        stop = x.step or x.steps + 1
        steps += stop - PAST - 1
        alarms += any(PAST < at < stop - EARLY for at in (said[x.name].micro, said[x.name].full))
    return alarms, steps


def _called(verdict: Verdict, event: Outcome) -> str:
    """``full`` where the detector calls the run lost from the event on or later, else ``micro``, else empty."""
    if verdict.full and verdict.full >= event.step - EARLY:
        return "full"
    return "micro" if _near(verdict.micro, event.step) else ""


def _near(step: int, event: int) -> bool:
    return event - EARLY <= step <= event + LATE


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.2f} ({part} of {whole})" if whole else ""


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def write_rows(path: Path, rows: Sequence[Outcome] | Sequence[Verdict]) -> None:
    """Writes a CSV file, numbers to five digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(asdict(rows[0]))
        writer.writerows([[f"{x:.5g}" if isinstance(x, float) else x for x in asdict(row).values()] for row in rows])


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Reads what ``write_rows`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [Verdict(row.pop("name"), **{k: int(v) for k, v in row.items()}) for row in csv.DictReader(file)]
    return {verdict.name: verdict for verdict in rows}


def read_outcomes(path: Path) -> list[Outcome]:
    """Reads what ``write_rows`` wrote."""
    kinds = {"str": str, "int": int, "float": float}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Outcome(**{x.name: kinds[str(x.type)](row[x.name] or "nan") for x in fields(Outcome)}) for row in rows]


def recorded(folder: Path) -> dict[str, Recorded]:
    """All runs of a folder, by name."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.npz"))}


def main() -> int:
    """Labels the runs, judges them, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="folder of record_traces.py")
    parser.add_argument("--outcomes", type=Path, help="write the outcomes to this CSV file")
    parser.add_argument("--verdicts", type=Path, help="write the verdicts of this code's detector to this CSV file")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], help="verdicts of another version's detector to show too"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows of both files whose runs are not in the folder any more"
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the AUC, below the twin's")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    runs = recorded(args.traces)
    truth = outcomes(runs, args.tolerance)
    verdicts = {path.stem: read_verdicts(path) for path in args.beside}
    for path, said in zip(args.beside, verdicts.values(), strict=True):
        if not args.keep and (missing := runs.keys() - said.keys()):
            parser.error(f"{path} has no verdict on {min(missing)} and {len(missing) - 1} more; make it again")
    own = {name: judge(name, run) for name, run in runs.items()}
    if args.keep:
        truth = [x for x in read_outcomes(args.outcomes) if x.name not in runs] + truth
        own = {name: said for name, said in read_verdicts(args.verdicts).items() if name not in runs} | own
    if args.outcomes:
        write_rows(args.outcomes, truth)
    if args.verdicts:
        write_rows(args.verdicts, list(own.values()))
    verdicts[args.verdicts.stem if args.verdicts else "this version"] = own
    kinds = ("healthy", "recovered", "lost", "set back", "unsettled", "start")
    lines = [", ".join(f"{sum(x.kind == kind for x in truth)} {kind}" for kind in kinds), ""]
    lines += [as_markdown(*table(truth, verdicts)), ""]
    for name, said in verdicts.items():
        alarms, steps = false_alarms(truth, said)
        lines.append(f"{name}: {alarms} false alarms in {steps:,} healthy steps")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
