"""Preparation of published data sets: from their files to one Parquet file per UTC day, a schema and a manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ranker.atomic import locked, replacing_folder
from ranker.data.manifest import MANIFEST_FILE, Manifest
from ranker.data.prepare.buckets import Step
from ranker.data.prepare.days import write_days
from ranker.data.prepare.kuairand import kuairand_files, kuairand_recipe
from ranker.data.prepare.movielens import movielens_files, movielens_recipe
from ranker.data.prepare.recipe import CODE_VERSION, Recipe, fingerprint
from ranker.data.prepare.spark import Cluster
from ranker.data.schema import SCHEMA_FILE
from ranker.errors import UserError, suggest

__all__ = ["RECIPES", "prepare", "prepare_cached", "print_summary", "steps"]

# By kind: the function that finds the files to use in a folder, and the one that makes a recipe of them.
RECIPES: Mapping[str, tuple[Callable[[str | Path], list[Path]], Callable[[Sequence[Path]], Recipe]]] = {
    "kuairand": (kuairand_files, kuairand_recipe),
    "movielens": (movielens_files, movielens_recipe),
}


def prepare(
    kind: str,
    source: str | Path,
    destination: str | Path,
    *,
    progress: bool = False,
    cluster: Cluster | None = None,
) -> Manifest:
    """Prepares a data set, atomically. If it has already been prepared from the same files, it is kept.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        destination: the folder to write. Other prepared data in it are replaced at the end.
        progress: show a progress bar.
        cluster: Spark, which does the work and writes several files per day. None: this machine.

    Raises:
        UserError: the kind is unknown, a file is missing or broken, the disk is full, or the destination contains
            something other than prepared data.
    """
    files = _files(kind, source)
    target = Path(destination).expanduser()
    if cluster is not None:  # whose tasks may run elsewhere
        files, target = [file.absolute() for file in files], target.absolute()
    return _prepare(kind, files, fingerprint(kind, files), target, progress=progress, cluster=cluster)


def prepare_cached(kind: str, source: str | Path, cache_dir: str | Path, *, progress: bool = True) -> Path:
    """The prepared data set, made on first use. If several processes need it at once, one makes it and others wait.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        cache_dir: folder for prepared data. The key is made of names, sizes and times of the source files.
        progress: show a progress bar while the data are prepared.

    Returns:
        The folder of the prepared data.

    Raises:
        UserError: as :func:`prepare`.
    """
    files = _files(kind, source)
    key = fingerprint(kind, files)
    root = Path(cache_dir).expanduser() / f"{kind}-{key}"
    _prepare(kind, files, key, root, progress=progress)
    return root


def _files(kind: str, source: str | Path) -> list[Path]:
    if kind not in RECIPES:
        raise UserError(f"unknown data set '{kind}'; {suggest(kind, RECIPES)}")
    return RECIPES[kind][0](source)


def _prepare(
    kind: str, files: Sequence[Path], key: str, root: Path, *, progress: bool, cluster: Cluster | None = None
) -> Manifest:
    existing = _existing(root, key)
    if existing is not None:
        return existing
    with locked(root):
        # Another process may have made it while this one waited for the lock.
        existing = _existing(root, key)
        if existing is not None:
            return existing
        _check_replaceable(root)
        recipe = RECIPES[kind][1](files)
        with replacing_folder(root) as draft, steps(visible=progress) as step:
            with tempfile.TemporaryDirectory(dir=draft, prefix="staging-") as staging:
                write = write_days if cluster is None else cluster.write_days
                written = write(recipe, draft, staging=Path(staging), step=step)
            recipe.schema.to_yaml(draft / SCHEMA_FILE)
            manifest = Manifest(
                files=written.entries,
                source={
                    "kind": kind,
                    "fingerprint": key,
                    "code_version": CODE_VERSION,
                    "files": {file.name: file.stat().st_size for file in files},
                    "rows_read": written.rows_read,
                    "duplicates_dropped": written.rows_read - sum(entry.rows for entry in written.entries),
                    "notes": list(recipe.notes),
                },
            )
            manifest.write(draft)
    return manifest


def _existing(root: Path, key: str) -> Manifest | None:
    """The manifest of data prepared from the same files. It needs neither a lock nor a writable folder."""
    manifest = Manifest.read(root)
    return manifest if manifest is not None and manifest.source.get("fingerprint") == key else None


def _check_replaceable(target: Path) -> None:
    """Raises a UserError if the target contains files that are not prepared data."""
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise UserError(f"{target} is not empty and holds no prepared data; name a new folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder")


@contextmanager
def steps(*, visible: bool) -> Iterator[Step]:
    """A progress bar of several steps. Yields the ``Step`` function. Shows nothing if ``visible`` is False."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as progress:

        @contextmanager
        def step(words: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            task = progress.add_task(words, total=total)
            yield lambda rows: progress.advance(task, rows)
            done = progress.tasks[task].completed
            progress.update(task, total=done or 1, completed=done or 1)

        yield step


def print_summary(manifest: Manifest, *, where: str, console: Console | None = None) -> None:
    """Prints a summary of a prepared folder: rows, days, dropped duplicates, label rates, notes.

    Args:
        manifest: the folder's manifest, written by a preparation.
        where: the folder.
        console: output. Default: standard output.
    """
    console = console or Console(soft_wrap=True)
    source: Mapping[str, Any] = manifest.source
    console.print(f"{where}: {manifest.rows:,} rows in {manifest.days} days")
    console.print(f"read {source['rows_read']:,} rows, dropped {source['duplicates_dropped']:,} exact duplicates")
    table = Table("task", "mean label", title="labels (rate of positives, or mean after the transform)")
    for task in manifest.files[0].label_rates:
        # Days are weighted by their rows. This is exact unless a label is missing in some rows.
        known = [(f.rows, rate) for f in manifest.files if (rate := f.label_rates[task]) is not None]
        rows = sum(n for n, _ in known)
        table.add_row(task, f"{sum(n * r for n, r in known) / rows:.5f}" if rows else "none observed")
    console.print(table)
    for note in source.get("notes", ()):
        console.print(f"note: {note}")
