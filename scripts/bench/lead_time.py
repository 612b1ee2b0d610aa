"""Which early sign moves before the first bad loss of an event: ``python scripts/bench/lead_time.py TRACES --help``.

Every sign is compared with the run's own past, so that one threshold serves all models:

    z_t = (x_t - median of x over the 50 steps before) / (1.48 * median absolute deviation there + floor)

on the logarithm of signs that are positive, with the floor at 1 % of a unit. An alarm is a stretch of 50 steps with a z
above a threshold. The recall at a lead of L steps is the share of events with an alarm in the 50 steps that end L steps
before the event, among the events that begin late enough for that. False alarms are counted in runs without an event.
Only the first event of a run counts, and none of a run that had not learned by then (``natural_events.py``). Nothing of
the event itself is used: step e - 1 is the last one that a sign is read at, and its sign is known before the loss of
step e.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from natural_events import outcomes, recorded
from ranker.reports.comparison import as_markdown
from recorded_runs import Array, Recorded, first_event

WINDOW = 50  # steps of the past, of the stretch in which an alarm counts, and between two alarms
FIRST = 60  # first step that can give an alarm
LEADS = (1, 10, 100)
BUDGETS = (10.0, 30.0, 100.0)  # false alarms per 10,000 steps
FLOOR = 0.01
# Signs of layers by the way in which the layers are joined; "log" where the sign is positive.
LAYER_SIGNS = {
    "grad_over_weight": ("gradient over weight", np.fmax, True),
    "update_max": ("update r, infinity norm", np.fmax, True),
    "update_over_weight": ("step over weight, per unit of rate", np.fmax, True),
    "sigma_agc": ("sigma of AGC", np.fmin, True),
    "sigma_lamb": ("sigma of LAMB", np.fmin, True),
    "sigma_clippy": ("sigma of Clippy", np.fmin, True),
    "activation_max": ("activations", np.fmax, True),
    "dead_relus": ("dead ReLUs", np.fmax, False),
}
RUN_SIGNS = {
    "grad_norm": ("gradient norm, all layers (GC's sigma)", True),
    "logit_max": ("logits", True),
    "task_cosine_min": ("task cosine", False),
    "sharpness_ratio": ("sharpness ratio", True),
}
FALLS = ("sigma", "task cosine")  # signs that warn by falling


@dataclass(frozen=True)
class Scored:
    """What one sign of one run showed, as maxima of z.

    Attributes:
        quiet: of each stretch of ``WINDOW`` steps of a run without an event; empty for a run with one.
        before: by lead, of the ``WINDOW`` steps that end so many steps before the event; nothing for a lead that
            reaches back to before step ``FIRST``.
        z: of the 100 steps before the event, oldest first; fewer near the start of a run.
    """

    quiet: Array
    before: Mapping[int, float]
    z: Array


@dataclass(frozen=True)
class Curve:
    """A sign at all thresholds, from strict to loose.

    Attributes:
        thresholds: of z, [K].
        alarms: false alarms per 10,000 healthy steps, [K].
        recall: by lead, share of events with an alarm in time, [K].
        events: by lead, number of events that begin late enough.
        lead: median over the events of the steps from the first alarm in the last 100 steps to the event, [K].
    """

    thresholds: Array
    alarms: Array
    recall: Mapping[int, Array]
    events: Mapping[int, int]
    lead: Array

    def at(self, budget: float) -> int:
        """The loosest threshold with no more than a number of false alarms per 10,000 steps."""
        return int(np.flatnonzero(self.alarms <= budget)[-1])


def signs_of(run: Recorded) -> dict[str, Array]:
    """The signs of a run, [N] each, upwards where they warn; what is measured more rarely keeps its last value."""
    names, found = run.meta["sign_names"], {}
    for sign, (title, joined, log) in LAYER_SIGNS.items():
        layers = [run.sign(name) for name in names if name.endswith(f"/{sign}") and not name.startswith("head/")]
        if layers:
            x = joined.reduce(layers)
            # A rate that rises makes every step longer, whether the run is about to be hit or not.
            found[title] = _prepared(x / run.arrays["lr"] if sign == "update_over_weight" else x, log)
    for sign, (title, log) in RUN_SIGNS.items():
        if sign in names:
            found[title] = _prepared(run.sign(sign), log)
    if run.log2_g_NP.size:
        grown = np.zeros(run.steps)
        grown[24:] = np.quantile(run.log2_g_NP[24:] - run.log2_g_NP[:-24], 0.9, axis=1)
        found["step cut (9 of 10 coordinates)"] = grown
    found["the loss"] = _prepared(run.loss_N, True)
    return {title: -x if title.startswith(FALLS) else x for title, x in found.items()}


def _prepared(x: Array, log: bool) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.log(np.maximum(x.astype(np.float64), 1e-30)) if log else x.astype(np.float64)
    x = np.nan_to_num(x, nan=np.nan, posinf=1e30, neginf=-1e30)
    last = np.maximum.accumulate(np.where(np.isnan(x), -1, np.arange(len(x))))
    return np.where(last >= 0, x[last], np.nan)


def z_scores(x: Array) -> Array:
    """Z of each step against the ``WINDOW`` steps before it; -inf where there is no past."""
    z = np.full(len(x), -np.inf)
    if len(x) <= FIRST:
        return z
    pasts = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[FIRST - WINDOW : -1]  # those before FIRST, FIRST + 1...
    middle = np.median(pasts, axis=1)
    spread = 1.4826 * np.median(np.abs(pasts - middle[:, None]), axis=1)
    with np.errstate(invalid="ignore"):
        z[FIRST:] = np.nan_to_num((x[FIRST:] - middle) / (spread + FLOOR), nan=-np.inf)
    return z


def scored(run: Recorded) -> dict[str, Scored]:
    """The scores of a run, by sign."""
    event, found = first_event(run.loss_N.tolist()), {}
    for sign, x in signs_of(run).items():
        z = z_scores(x)
        if event is None:
            whole = (len(z) - FIRST) // WINDOW * WINDOW
            quiet = z[FIRST : FIRST + whole].reshape(-1, WINDOW).max(axis=1)
            found[sign] = Scored(quiet, {}, np.empty(0))
            continue
        last = {lead: event - lead for lead in LEADS}  # index of step event - lead, plus 1
        before = {lead: float(z[at - WINDOW : at].max()) for lead, at in last.items() if at - WINDOW >= FIRST}
        found[sign] = Scored(np.empty(0), before, z[max(event - 1 - 100, FIRST) : event - 1])
    return found


def curve(runs: Sequence[Scored]) -> Curve:
    """One sign over all runs."""
    thresholds = np.concatenate([[np.inf], np.geomspace(300.0, 0.1, 80)])
    quiet = np.concatenate([run.quiet for run in runs])
    maxima = {lead: np.array([run.before[lead] for run in runs if lead in run.before]) for lead in LEADS}
    leads = []
    for threshold in thresholds:
        first = [len(run.z) - int(np.argmax(run.z > threshold)) for run in runs if (run.z > threshold).any()]
        leads.append(float(np.median(first)) if first else np.nan)
    return Curve(
        thresholds=thresholds,
        alarms=(quiet > thresholds[:, None]).mean(1) * 10_000 / WINDOW,
        recall={lead: (x > thresholds[:, None]).mean(1) for lead, x in maxima.items()},
        events={lead: len(x) for lead, x in maxima.items()},
        lead=np.array(leads),
    )


def chance(rate: Array | float) -> Array | float:
    """Recall of alarms at random, at a rate of false alarms per 10,000 steps."""
    return rate * WINDOW / 10_000


def table(curves: Mapping[str, Curve], budget: float) -> tuple[list[str], list[list[str]]]:
    """Recall per sign and lead at no more than a number of false alarms per 10,000 steps."""
    header = ["sign", "threshold z", "false alarms", *[f"{lead} steps ahead" for lead in LEADS], "first alarm, median"]
    rows = []
    order = sorted(curves, key=lambda sign: -max(float(curves[sign].recall[x][curves[sign].at(budget)]) for x in LEADS))
    for sign in order:
        c = curves[sign]
        at = c.at(budget)
        cells = [f"{c.recall[lead][at]:.2f} of {c.events[lead]}" for lead in LEADS]
        first = "" if np.isnan(c.lead[at]) else f"{c.lead[at]:g} steps"
        rows.append([sign, f"{c.thresholds[at]:.3g}", f"{c.alarms[at]:.1f}", *cells, first])
    rows.append(["at random", "", f"{budget:g}", *[f"{chance(budget):.2f}"] * len(LEADS), ""])
    return header, rows


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Recall against false alarms, one panel a lead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(LEADS), figsize=(15, 5.2), sharey=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    rates = np.geomspace(1, 10_000 / WINDOW, 100)
    for panel, lead in zip(panels, LEADS, strict=True):
        for colour, (sign, c) in zip(colours, curves.items(), strict=False):
            style = {"color": "black", "linestyle": "--"} if sign == "the loss" else {"color": colour}
            panel.plot(np.maximum(c.alarms, 1.0), c.recall[lead], label=sign, linewidth=1.8, **style)
        panel.plot(rates, chance(rates), color="grey", linestyle=":", label="at random")
        counted = max(c.events[lead] for c in curves.values())
        panel.set(
            xscale="log", xlim=(1, 10_000 / WINDOW), ylim=(-0.02, 1.02), xlabel="false alarms per 10,000 healthy steps"
        )
        panel.set_title(f"{lead} step{'s' if lead > 1 else ''} before the first bad loss, {counted} events")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of events with an alarm")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> int:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="folder of record_traces.py")
    parser.add_argument("--csv", type=Path, help="write the curves to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this PNG file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    args = parser.parse_args()
    found = recorded(args.traces)
    runs = [found[x.name] for x in outcomes(found, tolerance=0.02) if x.kind != "start"]
    scores = [scored(run) for run in runs]
    signs = list(dict.fromkeys(sign for found in scores for sign in found))
    curves = {sign: curve([found[sign] for found in scores if sign in found]) for sign in signs}
    unhit = [run for run in runs if first_event(run.loss_N.tolist()) is None]
    lines = [f"{len(runs) - len(unhit)} events, {sum(x.steps for x in unhit):,} steps of {len(unhit)} unhit runs", ""]
    for budget in BUDGETS:
        lines += [f"At most {budget:g} false alarms per 10,000 healthy steps:", ""]
        lines += [as_markdown(*table(curves, budget)), ""]
    text = "\n".join(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["sign", "threshold", "false_alarms_per_10000", "recall", "lead", "events"])
            for sign, c in curves.items():
                for i, threshold in enumerate(c.thresholds):
                    writer.writerows(
                        [
                            sign,
                            f"{threshold:.4g}",
                            f"{c.alarms[i]:.4g}",
                            lead,
                            f"{c.recall[lead][i]:.4g}",
                            c.events[lead],
                        ]
                        for lead in LEADS
                    )
    if args.picture:
        draw(curves, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
