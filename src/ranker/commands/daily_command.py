"""``evenkeel daily``: trains day after day, from yesterday's model, and promotes what passes the gate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ranker import atomic, config, stop_signals
from ranker.cli import command
from ranker.config_overrides import quoted, warm_start_word
from ranker.errors import UserError
from ranker.installation import conf_folder

PAGE = "index.html"
DESCRIPTION = """Train day after day on a log that grows: from yesterday's model, one run a day.

    python scripts/daily.py data.source=DIR daily.dir=DIR model=small optim=clippy
    python scripts/daily.py data.source=s3://BUCKET/LOG daily.dir=DIR --watch 600

`evenkeel daily` takes the same arguments: overrides as train.py takes them (data=parquet is the default), options of
daily.* below, and --watch SECONDS, which stays and looks for new days. A call does what is missing and ends. For each
day that has a day after it: trains on it, starting from the last good model; evaluates on the day after; promotes the
model if it passes the gate, by moving the pointer DIR/serving, or keeps yesterday's and says why. A killed call goes on
exactly when it is started again.

Exit status 0: nothing is left to do. 1: a job failed, or the drift guard stopped before a day. 2: a mistake in the
arguments or the data, or another process works in daily.dir.

"""
# Set by daily training itself for each run.
OWN = ("resume", "force", "data.days", "data.eval_days", "data.hold_out", "warm_start.path", "hydra.run.dir")


@dataclass(frozen=True)
class Given:
    """The arguments of a call.

    Attributes:
        words: overrides of the runs.
        daily: overrides of ``daily``.
        flags: other arguments of ``train.py``.
        watch: seconds between two looks for new days; None for one look.
    """

    words: list[str]
    daily: list[str]
    flags: list[str]
    watch: float | None


@command
def daily(arguments: Sequence[str] | None = None, *, jobs: Any = None) -> int:
    """Trains day after day; the exit status is explained in ``--help``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in ("-h", "--help") for word in words):
        print(DESCRIPTION + (conf_folder() / "daily" / "default.yaml").read_text(encoding="utf-8"), end="")
        return 0
    given = _parsed(words)
    with stop_signals.taken_over():
        try:
            return _run(given, jobs)
        except KeyboardInterrupt:
            number = stop_signals.received()
            print(f"stopped by {stop_signals.name_of(number)}; the same command goes on", file=sys.stderr)
            return stop_signals.exit_status(number)


def _run(given: Given, jobs: Any) -> int:
    # Imported late: torch and Lightning cost seconds that --help need not wait for.
    from ranker.daily.cycle import Daily
    from ranker.daily.jobs import Processes
    from ranker.daily.settings import DailySettings
    from ranker.runs import run_lock

    cfg, plain, gate = _composed(given)
    settings = DailySettings.of(plain)
    folder = Path(settings.dir).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"daily.dir={folder} cannot be made: {error.strerror}; choose another folder") from error
    if settings.start_from is not None:
        settings = replace(settings, start_from=str(Path(settings.start_from).resolve()))
    cycle = Daily(
        folder=folder,
        cfg=cfg,
        words=given.words,
        flags=given.flags,
        settings=settings,
        gate=gate,
        jobs=jobs or Processes(),
        say=lambda line: print(line, flush=True),
    )
    if given.watch is not None and settings.complete == "later_rows":
        print(
            "note: a model is judged on what the day after has by then; daily.complete=marker or delay waits until it "
            "is complete",
            flush=True,
        )
    with run_lock.held(folder):
        while True:
            try:
                status = _once(cycle)
            except UserError as error:  # such as a file that is being written
                if given.watch is None:
                    raise
                print(f"error: {config.one_line(error)}", file=sys.stderr, flush=True)
            if given.watch is None:
                return status
            until = time.monotonic() + given.watch
            while time.monotonic() < until:
                time.sleep(min(1.0, given.watch))


def _once(cycle: Any) -> int:
    """One look for new days. The page is written whatever happens."""
    from ranker.daily.attempts import JobFailedError
    from ranker.daily.cycle import DriftStopError
    from ranker.daily.ledger import Ledger
    from ranker.daily.page import render
    from ranker.daily.shelf import Shelf

    waiting, status = "", 0
    write: Callable[[], None] = lambda: atomic.write_text(  # noqa: E731
        cycle.folder / PAGE, render(Ledger(cycle.folder), served=Shelf(cycle.folder).served, waiting=waiting)
    )
    try:
        decided, waiting = cycle.run(after_each=write)
        served = Shelf(cycle.folder).served
        more = f"; waiting: {waiting}" if waiting else ""
        print(f"{decided} new days; served: {served or 'nothing yet'} ({cycle.folder / PAGE}){more}", flush=True)
    except (JobFailedError, DriftStopError) as error:
        waiting, status = str(error), 1
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, JobFailedError) and error.by_user:
            status = 2
    write()
    return status


def _parsed(words: list[str]) -> Given:
    """Sorts the arguments.

    Raises:
        UserError: an argument is none of this command's, or sets what daily training sets itself.
    """
    own: list[str] = []
    flags: list[str] = []
    mine: list[str] = []
    watch: float | None = None
    rest = iter(words)
    for word in rest:
        if word == "--watch" or word.startswith("--watch="):
            value = word.partition("=")[2] or next(rest, "")
            try:
                watch = float(value)
            except ValueError as error:
                raise UserError(f"--watch needs seconds, such as --watch 600, got '{value}'") from error
            if not watch > 0:
                raise UserError(f"--watch needs more than 0 seconds, got {value}")
        elif word in ("--config-dir", "-cd"):
            flags += ["--config-dir", str(Path(next(rest, "")).resolve())]
        elif word.startswith("--config-dir="):
            flags += ["--config-dir", str(Path(word.partition("=")[2]).resolve())]
        elif word.startswith("-") or "=" not in word.lstrip("~"):
            raise UserError(f"daily: '{word}' is no option; give overrides such as model=small, or --watch SECONDS")
        elif word.lstrip("+").startswith("daily."):
            mine.append(word.lstrip("+"))
        else:
            own.append(warm_start_word(word))
    for word in own:
        key = word.split("=", 1)[0].lstrip("+~")
        if key in OWN:
            instead = {"warm_start.path": "; the first model can start from daily.start_from=PATH"}.get(key, "")
            raise UserError(f"daily: {key} is set for each day by this command; leave it out{instead}")
    if not any(word.startswith("data=") for word in own):
        own.insert(0, "data=parquet")
    return Given(own, mine, flags, watch)


def _composed(given: Given) -> tuple[DictConfig, dict[str, Any], dict[str, Any]]:
    """The configuration of the runs, the options of daily training, and the settings of the gate."""
    config.register()
    GlobalHydra.instance().clear()
    outside = [f"hydra.searchpath=[{quoted(f'file://{path}')}]" for path in given.flags[1::2]]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", overrides=[*given.words, *outside])
        options = compose(overrides=["+daily=default", *given.daily])
        gate = compose(overrides=[f"+gate={options.daily.gate}"])
    if cfg.data.get("log") is not None and not OmegaConf.select(cfg, "data.source"):
        raise UserError("daily training needs a log of files by day: data.source=DIR, a folder or URL with schema.yaml")
    config.check(cfg)
    plain: dict[str, Any] = OmegaConf.to_container(options.daily, resolve=True)  # type: ignore[assignment]
    rules: dict[str, Any] = OmegaConf.to_container(gate.gate, resolve=True)  # type: ignore[assignment]
    return cfg, plain, rules
