"""Public data sets, from their published files to Parquet by day with a schema and a manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ranker.data.manifest import Manifest
from ranker.data.prepare.atomic_dir import locked, made_whole, refuse_foreign
from ranker.data.prepare.days import write_days
from ranker.data.prepare.kuairand import kuairand_files, kuairand_recipe
from ranker.data.prepare.movielens import movielens_files, movielens_recipe
from ranker.data.prepare.recipe import CODE_VERSION, Recipe, fingerprint
from ranker.data.prepare.report import print_summary, steps
from ranker.data.schema import SCHEMA_FILE
from ranker.errors import UserError, suggest

__all__ = ["RECIPES", "prepare", "prepare_cached", "prepare_kuairand", "prepare_movielens", "print_summary"]

# By kind: which files of a folder are used, and what is made of them.
RECIPES: Mapping[str, tuple[Callable[[str | Path], list[Path]], Callable[[Sequence[Path]], Recipe]]] = {
    "kuairand": (kuairand_files, kuairand_recipe),
    "movielens": (movielens_files, movielens_recipe),
}


def prepare(kind: str, source: str | Path, destination: str | Path, *, progress: bool = False) -> Manifest:
    """Prepares a data set, whole or not at all; where it is there already, made from the same files, it stays.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        destination: the folder to make; one that holds other prepared data is replaced in the last moment.
        progress: whether to show a progress bar.

    Raises:
        UserError: an unknown kind, a missing or broken file, a full disk, or a destination that holds other things.
    """
    files = _files(kind, source)
    return _prepare(kind, files, fingerprint(kind, files), Path(destination).expanduser(), progress=progress)


def prepare_kuairand(source: str | Path, destination: str | Path, *, progress: bool = False) -> Manifest:
    """:func:`prepare` for KuaiRand-Pure."""
    return prepare("kuairand", source, destination, progress=progress)


def prepare_movielens(source: str | Path, destination: str | Path, *, progress: bool = False) -> Manifest:
    """:func:`prepare` for MovieLens."""
    return prepare("movielens", source, destination, progress=progress)


def prepare_cached(kind: str, source: str | Path, cache_dir: str | Path, *, progress: bool = True) -> Path:
    """The prepared data set, made on first use. Of processes that ask at once, one makes it and the others wait.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        cache_dir: where prepared data are kept, by names, sizes and times of the source files.
        progress: whether to show a progress bar while it is made.

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


def _prepare(kind: str, files: Sequence[Path], key: str, root: Path, *, progress: bool) -> Manifest:
    there = _already(root, key)
    if there is not None:
        return there
    with locked(root):
        # Another process may have made it while this one waited for the lock.
        there = _already(root, key)
        if there is not None:
            return there
        refuse_foreign(root)
        recipe = RECIPES[kind][1](files)
        with made_whole(root) as draft, steps(visible=progress) as step:
            with tempfile.TemporaryDirectory(dir=draft, prefix="staging-") as staging:
                written = write_days(recipe, draft, staging=Path(staging), step=step)
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


def _already(root: Path, key: str) -> Manifest | None:
    """The manifest of what was made from the same files; it needs no lock (nor a folder that can be written)."""
    there = Manifest.read(root)
    return there if there is not None and there.source.get("fingerprint") == key else None
