"""``evenkeel prepare``, ``download`` and ``inspect``: public data sets, own logs, and what is in them."""

from __future__ import annotations

import argparse
import datetime as dt
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ranker import atomic, config
from ranker.cli import command
from ranker.data.batch import Batch
from ranker.data.collisions import collisions_of, lines_of, warnings_of
from ranker.data.filesystem import open_root
from ranker.data.inspection import broken_checksums, imprecise_columns, inspect_log, out_of_order
from ranker.data.log_profile import LogProfiler
from ranker.data.manifest import MANIFEST_FILE, FileEntry, Manifest
from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import RECIPES, print_summary, steps
from ranker.data.prepare import prepare as prepare_log
from ranker.data.prepare.download import ARCHIVES, Archive, fetch, unpack
from ranker.data.prepare.generated import write_generated
from ranker.data.prepare.own import prepare_own
from ranker.data.prepare.rewrite import rewrite
from ranker.data.prepare.spark import Cluster, cluster
from ranker.data.proposal import propose
from ranker.data.proposal_text import as_yaml, next_commands
from ranker.data.raw_log import RawLog, profiled
from ranker.data.schema import Schema
from ranker.data.synthetic import SyntheticLog
from ranker.errors import UserError
from ranker.installation import command_line, conf_folder

REWRITE = "rewrite"  # the kind of preparation that sorts Parquet of one's own and makes large row groups
SYNTHETIC = "synthetic"  # the kind that writes the generated log of data=synthetic
OWN = "log"  # the kind that converts a log of one's own, such as CSV


@command
def prepare(arguments: Sequence[str] | None = None) -> int:
    """Converts a public data set; exit status 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        description="Write published files or a log of one's own as Parquet by UTC day, a schema, a manifest."
    )
    parser.add_argument(
        "kind",
        choices=[*sorted(RECIPES), OWN, REWRITE, SYNTHETIC],
        help=f"the data set; {OWN}: CSV or Parquet of your own, with --schema; {REWRITE}: Parquet with a "
        "schema.yaml, sorted by time, one file per day, large row groups; "
        f"{SYNTHETIC}: the log that data=synthetic generates",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help=f"folder with the published files, or with the log; {SYNTHETIC} has none",
    )
    parser.add_argument("destination", metavar="DST", help="folder to create")
    parser.add_argument("--schema", type=Path, help=f"for {OWN}: the schema.yaml; inspect_data.py --propose writes one")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"for {SYNTHETIC}: its options as for train.py, such as data.log.train_rows=100000000",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--engine",
        choices=["polars", "spark"],
        default="polars",
        help="what does the work: polars on this machine, or spark on a cluster that sees SRC and DST (%(default)s)",
    )
    parser.add_argument(
        "--master", metavar="URL", help="for --engine spark: the cluster (local[2], spark://HOST:7077, yarn, ...)"
    )
    parser.add_argument(
        "--spark-conf", metavar="KEY=VALUE", nargs="+", default=[], help="for --engine spark: options of Spark"
    )
    given = parser.parse_args(arguments)
    if (given.source is None) != (given.kind == SYNTHETIC):
        parser.error(f"{SYNTHETIC} takes DST alone, the other kinds take SRC and DST")
    if given.set and given.kind != SYNTHETIC:
        parser.error(f"--set belongs to {SYNTHETIC}")
    if given.engine == "polars" and (given.master or given.spark_conf):
        parser.error("--master and --spark-conf belong to --engine spark")
    if wrong := [pair for pair in given.spark_conf if not re.match(r"[\w.]+=", pair)]:
        parser.error(f"--spark-conf {wrong[0]}: write KEY=VALUE")
    if given.engine == "spark" and given.kind in (REWRITE, SYNTHETIC):
        parser.error(f"{given.kind} runs on this machine only: leave out --engine")
    if (given.schema is None) == (given.kind == OWN):
        propose = f"{command_line('inspect')} {given.source} --propose schema.yaml"
        parser.error(f"--schema belongs to {OWN}, and {OWN} needs it: {propose} proposes one")
    if given.engine == "spark":
        with cluster(given.master, dict(pair.split("=", 1) for pair in given.spark_conf)) as spark:
            _prepare(given, spark)
        return 0
    if given.kind == SYNTHETIC:
        with steps(visible=not given.quiet) as step:
            log = _synthetic(given.set)
            manifest = write_generated(log, given.destination, settings=given.set, step=step)
        held_out = f"the last is the hold-out, with data.log.eval_rows={log.num_rows - log.train_rows}"
        print(f"{given.destination}: {manifest.rows:,} rows in {manifest.days} days; {held_out}")
        return 0
    if given.kind == REWRITE:
        with steps(visible=not given.quiet) as step:
            manifest = rewrite(given.source, given.destination, step=step)
        print(f"{given.destination}: {manifest.rows:,} rows in {manifest.days} days")
        return 0
    _prepare(given, None)
    return 0


def _synthetic(settings: Sequence[str]) -> SyntheticLog:
    """The log of ``data=synthetic`` with these options."""
    for word in settings:
        if not word.startswith("data.log."):
            raise UserError(f"--set takes options of the generated log, data.log.NAME=VALUE; got {word}")
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=["data=synthetic", *settings])
        except HydraException as error:
            raise UserError(f"--set: {' '.join(str(error).split())}") from error
    log: SyntheticLog = instantiate(cfg.data.log, _convert_="all")
    return log


def _prepare(given: argparse.Namespace, spark: Cluster | None) -> None:
    """Prepares a public data set or a log of one's own, and says what is in it."""
    progress = not given.quiet
    if given.kind == OWN:
        schema = Schema.from_yaml(given.schema)
        with steps(visible=progress) as step:
            manifest = prepare_own(given.source, given.destination, schema, step=step, cluster=spark)
    else:
        manifest = prepare_log(given.kind, given.source, given.destination, progress=progress, cluster=spark)
    print_summary(manifest, where=given.destination)


@command
def download(arguments: Sequence[str] | None = None) -> int:
    """Downloads a public data set; exit status 0, 1 without consent to the licence, 2 for an error."""
    parser = argparse.ArgumentParser(description="Download (resuming), verify and unpack a public data set.")
    parser.add_argument("name", choices=sorted(ARCHIVES), help="the data set")
    parser.add_argument("folder", nargs="?", default="data", type=Path, help="where to put it (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="accept the licence without being asked")
    parser.add_argument("--mirror", metavar="URL", help="download from this folder instead of the publisher")
    given = parser.parse_args(arguments)
    archive = ARCHIVES[given.name]
    if given.mirror:
        archive = replace(archive, url=f"{given.mirror.rstrip('/')}/{archive.file_name}")
    print(f"{given.name}, {archive.size}, from {archive.url}\n{archive.licence}")
    if not given.yes and not _agrees():
        return 1
    try:
        data = unpack(archive, _fetch(archive, given.folder), given.folder)
    except OSError as error:
        raise UserError(str(error)) from error
    print(f"ready: {command_line('train')} data={archive.kind} data.source={data}")
    return 0


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise UserError("no terminal to accept the licence on; add --yes")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _fetch(archive: Archive, folder: Path) -> Path:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(archive.file_name, total=None)
        return fetch(archive, folder, progress=lambda done, total: bar.update(task, completed=done, total=total))


@command
def inspect(arguments: Sequence[str] | None = None) -> int:
    """Checks a prepared log; exit status 0, also with warnings, or 2 where the log cannot be trained on."""
    about = "Check a log: files, label rates, bad rows, columns. Or propose a schema for one that has none."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "root", metavar="DIR", help="a folder or URL with schema.yaml and Parquet files; for --propose CSV or Parquet"
    )
    parser.add_argument("--propose", metavar="FILE", type=Path, help="write a schema for a log that has none to FILE")
    parser.add_argument("--time", metavar="COLUMN", help="for --propose: the column that orders the log")
    parser.add_argument("--tasks", metavar="COLUMN", nargs="+", default=[], help="for --propose: what to predict")
    parser.add_argument("--force", action="store_true", help="for --propose: replace FILE")
    parser.add_argument("--quick", action="store_true", help="read the manifest and footers only, not the rows")
    parser.add_argument("--html", action="store_true", help="also write a page: features, drift, labels by day, leaks")
    parser.add_argument("--out", type=Path, help="the page (default: inspection.html in DIR, or here for a URL)")
    given = parser.parse_args(arguments)
    if given.html and given.quick:
        parser.error("--html reads the rows, --quick does not: give one of them")
    if given.propose is not None:
        return _propose(given)
    if given.time or given.tasks:
        parser.error("--time and --tasks belong to --propose FILE")
    warnings: list[str] = []
    manifest: Manifest | None = None
    try:
        text = open_root(given.root).read_bytes(MANIFEST_FILE)
        manifest = Manifest.from_json(text, where=f"{given.root}/{MANIFEST_FILE}") if text is not None else None
        if manifest is None:
            warnings.append(f"no {MANIFEST_FILE}: cannot tell whether the files are complete and unchanged")
        elif given.quick:
            _print_files(manifest.files, title=f"{MANIFEST_FILE}: {manifest.rows:,} rows")
        else:
            warnings += broken_checksums(Path(given.root), manifest)
        log = _opened(given.root, warnings)
        warnings += [*log.schema.label_features(), *imprecise_columns(log.index.metadata, log.schema)]
        if not given.quick:
            warnings += _looked_at(log, warnings, given)
    except UserError:
        if manifest is not None and not given.quick:
            _print_files(manifest.files, title=f"{MANIFEST_FILE}: {manifest.rows:,} rows")
        _print_warnings([*warnings, *out_of_order(manifest.files if manifest is not None else ())])
        raise
    _print_warnings(warnings)
    if not warnings:
        print("nothing looks wrong")
    return 0


def _propose(given: argparse.Namespace) -> int:
    """Writes a schema for a log that has none and prints the next commands."""
    path: Path = given.propose
    if path.exists() and not given.force:
        raise UserError(f"{path} exists; --force replaces it")
    log = RawLog.open(given.root)
    with _row_progress() as bar:
        task = bar.add_task("reading rows", total=None)
        profile = profiled(log, advance=lambda rows: bar.advance(task, rows))
    name = Path(given.root).name.split(".")[0] or "log"
    proposal = propose(log, profile, name=name, time=given.time, tasks=given.tasks)
    atomic.write_text(path, as_yaml(proposal, source=given.root))
    schema = proposal.schema
    tasks = ", ".join(f"{task.name} ({task.type})" for task in schema.tasks)
    print(
        f"{path}: {len(schema.dense)} dense and {len(schema.categorical)} categorical features of {profile.rows:,} rows"
    )
    print(f"time: {schema.time_column}\ntasks: {tasks}")
    if log.skipped:
        print(f"warning: {sum(log.skipped.values()):,} lines with too many or too few fields were left out")
    for column, reason in proposal.left_out.items():
        print(f"left out: {column}: {reason}")
    commands, reasons = next_commands(proposal, log, profile, path)
    if reasons:
        print(f"to be converted: {'; '.join(reasons)}")
    print("next, after a look at it:", *commands, sep="\n  ")
    return 0


def _looked_at(log: ParquetLog, before: Sequence[str], given: argparse.Namespace) -> list[str]:
    """Reads the rows, prints what is in each file and writes the page that was asked for. Returns the warnings."""
    profiler = LogProfiler(log) if given.html else None

    with _row_progress() as bar:
        task = bar.add_task("reading rows", total=log.num_rows)

        def look(group: int, batch: Batch) -> None:
            if profiler is not None:
                profiler.add(group, batch)
            bar.advance(task, len(batch))

        findings = inspect_log(log, look=look)
    _print_files(findings.files, title=f"{log.num_rows:,} rows, of which {findings.bad:,} cannot be used")
    with _row_progress() as bar:
        task = bar.add_task("reading ids", total=log.num_rows)
        shared = collisions_of(log, advance=lambda rows: bar.advance(task, rows))
    print(*lines_of(shared), sep="\n", end="\n" if shared else "")
    warnings = [*findings.warnings, *warnings_of(shared)]
    if profiler is not None:
        from ranker.reports import log_page

        profile = profiler.profile()
        warnings += log_page.lines(profile)
        folder = Path() if "://" in given.root else Path(given.root).expanduser()
        out: Path = given.out or folder / "inspection.html"
        page = log_page.render(profile, findings, [*before, *warnings], log.schema, where=given.root)
        atomic.write_text(out, page)
        print(f"page: {out}")
    return warnings


def _row_progress(*, disable: bool = False) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=disable or not console.is_terminal)


def _print_files(files: Sequence[FileEntry], *, title: str) -> None:
    """One line per file; plain text, because label rates make it wider than most terminals."""
    print(f"{title}\n{'file':28} {'rows':>12}  {'first (UTC)':19}  {'last (UTC)':19}  rate of positives, or mean label")
    for entry in files:
        first, last = (_time(time_ms) for time_ms in (entry.time_min_ms, entry.time_max_ms))
        rates = [f"{name} {'-' if rate is None else f'{rate:.4g}'}" for name, rate in entry.label_rates.items()]
        print(f"{entry.path:28} {entry.rows:12,}  {first:19}  {last:19}  {', '.join(rates)}")


def _opened(root: str, warnings: list[str]) -> ParquetLog:
    """The log. What opening it warns about is added to the warnings, which this command prints in one place."""
    logger = logging.getLogger("ranker.data")
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        return ParquetLog(root, on_bad_rows="drop")
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def _time(time_ms: int | None) -> str:
    if time_ms is None:
        return "-"
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
