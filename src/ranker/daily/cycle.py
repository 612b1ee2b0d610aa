"""Does what is missing: for each new day trains, judges, promotes or refuses, and writes a line. Safe to kill anywhere.

What is on the disk says how far a day is, and every step can be made again:

    runs/DAY/plan.json      the day is begun: its files, what it starts from
    runs/DAY/try=N/         attempts; a killed one goes on from its checkpoint
    runs/DAY/verdict.json   the last attempt is judged, and its export is complete if it passed
    serving                 points to the export
    days.jsonl              the day is done
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from ranker.atomic import write_text
from ranker.daily import ledger as kinds
from ranker.daily.attempts import Attempt, JobFailedError, Plan, Say, attempt, train_words
from ranker.daily.complete import Completeness
from ranker.daily.day_statistics import DayStatistics, digest_of
from ranker.daily.days import LogDays, checked_day
from ranker.daily.drift import Drift, compare
from ranker.daily.jobs import OUTPUT, Jobs, last_error
from ranker.daily.judge import Request
from ranker.daily.ledger import Ledger
from ranker.daily.settings import DailySettings, Retry
from ranker.daily.shelf import Shelf, free_run
from ranker.data.times import DAY_MS
from ranker.errors import UserError
from ranker.parts import open_log
from ranker.runs.run_folder import RunFolder
from ranker.trust import targets

RUNS, STATISTICS, VERDICT = "runs", "statistics", "verdict.json"


class Outcome(NamedTuple):
    """What a call came to.

    Attributes:
        decided: days that were decided.
        waiting: what the next day waits for; empty if there is none.
    """

    decided: int
    waiting: str


class DriftStopError(Exception):
    """A day is far from the past, and ``daily.on_drift=stop``."""


@dataclass(frozen=True, kw_only=True)
class Daily:
    """One call of daily training.

    Attributes:
        folder: ``daily.dir``.
        cfg: the composed configuration of the runs.
        words: the overrides behind it, as ``train.py`` takes them.
        flags: other arguments of ``train.py``, such as ``--config-dir DIR``.
        settings: of daily training.
        gate: settings of the quality gate, as plain values.
        jobs: starts the processes.
        say: shows a line.
    """

    folder: Path
    cfg: DictConfig
    words: Sequence[str]
    flags: Sequence[str]
    settings: DailySettings
    gate: dict[str, Any]
    jobs: Jobs
    say: Say

    def run(self, *, after_each: Callable[[], None] = lambda: None) -> Outcome:
        """Does what is missing. The caller holds the lock of the folder.

        Args:
            after_each: called when a day is decided.

        Returns:
            How many days were decided, and what the next one waits for.

        Raises:
            UserError: the log or an option is wrong.
            JobFailedError: a job failed; the days before it are done.
            DriftStopError: a day is far from the past; the days before it are done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ledger, shelf, log = Ledger(self.folder), Shelf(self.folder), LogDays.open(self.cfg)
        self._report_late(ledger, log)
        decided, complete = 0, Completeness(settings=self.settings, log=log)
        while (day := self._next_day(ledger, log)) is not None:
            if lacking := self._lacking(day, ledger, log, complete):
                return Outcome(decided, lacking)
            if gap := log.missing_around(day, since=list(ledger.days)[-1:]):
                self.say(f"{day}: the log has no rows of {gap}; what comes for these days later may not be trained on")
            self._do(day, ledger, shelf, log)
            decided += 1
            after_each()
        return Outcome(decided, "")

    # Which day.

    def _lacking(self, day: str, ledger: Ledger, log: LogDays, complete: Completeness) -> str:
        """What is missing of a day, of those of the first model, or of the day that it is judged on.

        A day with a verdict goes on.
        """
        if (self.folder / RUNS / day / VERDICT).is_file():
            return ""
        after = log.after(day)
        assert after is not None
        first = day if ledger.good is not None else self._first_day(log)
        return complete.lacking(*(name for name in log.names if first <= name <= after))

    def _next_day(self, ledger: Ledger, log: LogDays) -> str | None:
        """The first day after the last decided one that has a day after it."""
        done = list(ledger.days)
        first = self._first_day(log)
        if done:
            days = [day for day in log.names if day > done[-1]]
        else:
            days = [day for day in log.names if day >= first][self.settings.bootstrap_days - 1 :]
        return days[0] if days and log.after(days[0]) is not None else None

    def _first_day(self, log: LogDays) -> str:
        asked = self.settings.first_day
        return log.names[0] if asked is None else checked_day(asked, "daily.first_day")

    def _report_late(self, ledger: Ledger, log: LogDays) -> None:
        """Says once of each file that came or changed after its day was done. Whole days that came late count too."""
        done = ledger.days
        first = self._first_day(log)
        for day in log.names:
            if day < first or not done or day > max(done):
                continue
            late = log.late(day, ledger.known_files(day)) if day in done else self._late_day(day, ledger, log)
            if late:
                names = ", ".join(sorted(late))
                self.say(f"{day}: late: {names} came or changed after this day was done; it is not trained on")
                ledger.append({"day": day, "verdict": kinds.LATE, "files": late})

    def _late_day(self, day: str, ledger: Ledger, log: LogDays) -> dict[str, str]:
        """The files of a day without a line of its own: one of the first model's days, or one that came late."""
        known: dict[str, str] = {}
        for line in ledger.lines:
            if (line["verdict"] == kinds.LATE and line["day"] == day) or (
                line["verdict"] in kinds.VERDICTS and line["first"] <= day <= line["day"]
            ):
                known |= line["files"]
        return log.late(day, known)

    # One day.

    def _do(self, day: str, ledger: Ledger, shelf: Shelf, log: LogDays) -> None:
        folder = self.folder / RUNS / day
        plan = self._plan(day, folder, ledger, shelf, log)
        answer = self._answer(folder / VERDICT)
        attempts = self._attempts(folder, plan, judged=answer is not None)
        if answer is None:
            answer = self._judge(attempts[-1], folder, shelf)
        line = self._line(plan, attempts, answer)
        if answer["passed"]:
            if not shelf.state(day).is_dir():
                run = folder / answer["run"]
                shelf.keep_state(day, run, RunFolder.existing(run).newest_checkpoint())
            shelf.serve(day)
        line["serving"] = shelf.served
        ledger.append(line)
        self.say(f"{day}: {said(line)}")
        for each in attempts:
            free_run(each.run, capsules=each.lost)
        shelf.prune(self.settings.keep)

    def _plan(self, day: str, folder: Path, ledger: Ledger, shelf: Shelf, log: LogDays) -> Plan:
        """The plan of a day: that of an earlier call, if the day's files are still the same, or a new one."""
        known = Plan.read(folder)
        if known is not None:
            files = self._files(known.first, day, log)
            same = known.files == files and known.judged == dict(log.files.get(known.after, {}))
            if same or (folder / VERDICT).is_file():  # what comes after the verdict is late
                if known.parent is None or ledger.good is None:
                    return known
                return replace(known, parent=str(shelf.state(Path(known.parent).name)))  # the folder may have moved
            self.say(f"{day}: its files changed while it was trained on; it starts over")
            shutil.rmtree(folder)
        good, after = ledger.good, log.after(day)
        assert after is not None
        # Without a good model, a day is trained on together with all days before it.
        first = day if good is not None else self._first_day(log)
        parent = self.settings.start_from if good is None else str(shelf.state(good))
        drift = self._guard(day, ledger, log)
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            day=day,
            first=first,
            after=after,
            parent=parent,
            files=self._files(first, day, log),
            judged=dict(log.files[after]),
            drift=drift.to_dict(),
        )
        plan.write(folder)
        return plan

    def _files(self, first: str, last: str, log: LogDays) -> dict[str, str]:
        return {name: x for day in log.names if first <= day <= last for name, x in log.files[day].items()}

    def _attempts(self, folder: Path, plan: Plan, *, judged: bool) -> list[Attempt]:
        """Tries until a run is not lost, or no retry is left."""
        made: list[Attempt] = []
        retries: list[Retry | None] = [None, *self.settings.retries]
        if judged:  # they are made, whatever is configured by now
            there = len(list(folder.glob("try=*/")))
            retries = (retries + [None] * there)[:there]
        for number, retry in enumerate(retries, start=1):
            run = folder / f"try={number}"
            if not run.is_dir():
                start = "random weights" if plan.parent is None else Path(plan.parent).name
                days = plan.day if plan.first == plan.day else f"{plan.first} to {plan.day}"
                self.say(f"{plan.day}: training on {days}, from {start}" + (f", with {retry}" if retry else ""))
            words = train_words(
                run, plan, words=self.words, flags=self.flags, retry=retry, lr_mult=float(self.cfg.lr_mult)
            )
            found = attempt(run, words, number=number, retry=retry, jobs=self.jobs, say=self.say)
            made.append(found)
            if not found.lost:
                break
            self.say(f"{plan.day}: diverged ({found.summary['reason']})")
        return made

    def _answer(self, path: Path) -> dict[str, Any] | None:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _judge(self, last: Attempt, folder: Path, shelf: Shelf) -> dict[str, Any]:
        day = folder.name
        request = Request(
            run=str(last.run),
            candidate=not last.lost,
            served=str(shelf.state(shelf.served)) if shelf.served and shelf.served != day else None,
            destination=str(shelf.model(day)),
            answer=str(folder / VERDICT),
            gate=self.gate,
            max_auc_drop=self.settings.max_auc_drop,
            onnx=self.settings.onnx,
            trusted=[str(name) for _, name in targets(self.cfg)],
        )
        if not request.candidate and request.served is None:  # nothing to evaluate
            nothing = {
                "passed": False,
                "run": last.run.name,
                "reasons": [],
                "metrics": None,
                "served": None,
                "note": "",
            }
            write_text(folder / VERDICT, json.dumps(nothing) + "\n")
            return nothing
        output = folder / f"judge.{OUTPUT}"
        status = self.jobs.judge(request, output)
        found = self._answer(folder / VERDICT)
        if found is None:
            why = last_error(output) or f"exit status {status}"
            raise JobFailedError(f"judging failed: {why} ({output})", by_user=status == 2)
        return found

    def _line(self, plan: Plan, attempts: Sequence[Attempt], answer: dict[str, Any]) -> dict[str, Any]:
        last = attempts[-1]
        verdict = kinds.PROMOTED if answer["passed"] else kinds.SKIPPED if last.lost else kinds.REFUSED
        summary = last.summary
        sharpness = summary.get("sharpness") or {}
        return {
            "day": plan.day,
            "first": plan.first,
            "after": plan.after,
            "verdict": verdict,
            "reasons": list(answer["reasons"]) or ([summary["reason"]] if last.lost else []),
            "parent": None if plan.parent is None else Path(plan.parent).name,
            "tries": [each.to_dict(self.folder) for each in attempts],
            "metrics": answer["metrics"],
            "served_before": answer["served"],
            "note": answer["note"],
            "events": summary["divergence"],
            "headroom": 1 / sharpness["last_ratio"] if sharpness.get("last_ratio") else None,
            "steps": summary["steps"],
            "rows": summary["examples"],
            "bad_rows": summary["bad_rows"],
            "rows_per_second": summary["examples_per_second"],
            "seconds": sum(each.summary["seconds"] for each in attempts),
            "lr": summary["lr"],
            "optim": summary["optim"],
            "files": dict(plan.files),
            "drift": dict(plan.drift),
        }

    # The drift guard.

    def _guard(self, day: str, ledger: Ledger, log: LogDays) -> Drift:
        """Compares a day with the past before it is trained on."""
        folder, settings = self.folder / STATISTICS, self.settings.drift
        earlier = [name for name in log.names if self._first_day(log) <= name < day][-settings.days :]
        opened = open_log(_with_days(self.cfg, earlier[0] if earlier else day, str(log.after(day))))
        past = [self._statistics(name, folder, opened, log) for name in earlier]
        now = self._statistics(day, folder, opened, log)
        lines = ledger.days
        shares = [lines[name]["drift"].get("new_ids", {}) for name in earlier if name in lines]
        drift = compare(now, past, shares, opened.schema, settings)
        for alarm in drift.alarms:
            self.say(f"{day}: drift: {alarm}")
        if drift.alarms and self.settings.on_drift == "stop":
            raise DriftStopError(
                f"{day} is far from the past and was not trained on ({len(drift.alarms)} alarms, above). Mend the "
                "data, or go on with daily.on_drift=warn"
            )
        return drift

    def _statistics(self, day: str, folder: Path, opened: Any, log: LogDays) -> DayStatistics:
        files = dict(log.files[day])
        known = DayStatistics.read(folder, day)
        if known is not None and (known.files, known.schema) == (files, digest_of(opened.schema)):
            return known
        start_ms = _midnight_ms(day)
        start, stop = opened.row_at_time(start_ms), opened.row_at_time(start_ms + DAY_MS)
        if start >= stop:
            raise UserError(f"{day} has no rows in {self.cfg.data.source}")
        made = DayStatistics.of(opened, start, stop, sample_rows=self.settings.drift.sample_rows, files=files)
        made.save(folder, day)
        return made


def said(line: dict[str, Any]) -> str:
    """A day's line in words."""
    if line["verdict"] == kinds.PROMOTED:
        tries = len(line["tries"])
        return (
            f"promoted{f' at try {tries}' if tries > 1 else ''}, judged on {line['after']}: {scores(line['metrics'])}"
        )
    kept = f"{line['serving']} stays" if line["serving"] else "nothing is served yet"
    why = "; ".join(line["reasons"]) or "no reason given"
    return f"{line['verdict']}, {kept}: {why}"


def scores(metrics: dict[str, float | None] | None) -> str:
    """AUC and NE by task, in words."""
    found = [
        f"{name} {value:.4f}"
        for name, value in (metrics or {}).items()
        if name.endswith(("/auc", "/ne", "/rmse")) and value
    ]
    return ", ".join(found)


def _with_days(cfg: DictConfig, first: str, last: str) -> DictConfig:
    changed = cfg.copy()
    changed.data.days = [first, last]
    changed.data.eval_days = 1
    changed.data.hold_out = None
    return changed


def _midnight_ms(day: str) -> int:
    return (dt.date.fromisoformat(day) - dt.date(1970, 1, 1)).days * DAY_MS
