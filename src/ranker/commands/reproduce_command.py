"""``evenkeel reproduce``: reproduce a table or a figure of the paper."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from ranker.atomic import write_text
from ranker.cli import command
from ranker.errors import UserError, suggest
from ranker.installation import clone
from ranker.paper.jobs import DATA, LABELS, QUICK, Data, Job, Setting, launch
from ranker.paper.published import BY_NAME, STUDIES, differences, folder_of, load_found, publish, render
from ranker.paper.store import find, unique
from ranker.paper.study import Phase, Study

TRAIN = Path(__file__).with_name("train.py")
SLICE = "kuairand_pure_slice"


DESCRIPTION = """Reproduce a table or a figure of the paper, such as: table2 data=kuairand scale=laptop

Runs what is missing, reads the run folders into CSV files, and writes Markdown and pictures from those. The same
command continues after it was killed. `all` makes everything, `check` compares what is published with what the CSV
files say, `publish` writes it again. Outside a clone, results go to the folder results of the current folder.
"""


@command
def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Reproduces a study; exit status 0, 1 where a published number differs from its runs, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help=f"all, check, publish, or one of {', '.join(BY_NAME)}")
    parser.add_argument(
        "overrides", nargs="*", help="data=kuairand|synthetic, scale=laptop|paper, others go to each run"
    )
    parser.add_argument("--quick", action="store_true", help="few short runs: does the machinery work; no results")
    parser.add_argument("--seeds", type=int, help="seeds of each cell; 3, and 10 in table 3")
    parser.add_argument("--models", nargs="+", choices=LABELS, help="run these models only, of those a study has")
    parser.add_argument("--trials", type=int, default=8, help="combinations that a search tries per model and method")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument(
        "--vectorize",
        type=int,
        default=1,
        metavar="K",
        help="train up to K runs that differ only in seed, rate or optimizer as one (docs/sweeps.md); they share the "
        "order of rows of seed 0, and tables have no capsules",
    )
    parser.add_argument("--out", type=Path, default=Path("multirun/reproduce"), help="where run folders go")
    parser.add_argument(
        "--results", type=Path, help="where CSV, Markdown and pictures go (default: OUT/results, see --publish)"
    )
    parser.add_argument("--publish", action="store_true", help="write to results/, where the published numbers are")
    parser.add_argument("--no-run", action="store_true", help="only read the runs that are there")
    options = parser.parse_intermixed_args(arguments)
    if options.what == "check":
        wrong = differences(_published_root())
        if wrong:
            print("published numbers that the runs do not give:", *wrong, sep="\n", file=sys.stderr)
        return 1 if wrong else 0
    if options.what == "publish":
        print(*publish(_published_root()), sep="\n")
        return 0
    if options.what != "all" and options.what not in BY_NAME:
        raise UserError(f"unknown table or figure '{options.what}'; {suggest(options.what, [*BY_NAME, 'all'])}")
    out = options.out / "quick" if options.quick else options.out
    if options.publish and (options.quick or options.results):
        raise UserError("--publish writes the full results to results/; leave --quick and --results out")
    results = options.results or (_root() / "results" if options.publish else out / "results")
    setting = _setting(options)
    for study in list(STUDIES) if options.what == "all" else _with_needs(BY_NAME[options.what]):
        if options.what not in ("all", study.name) and _is_made(
            study, results / folder_of(study, setting.data, setting.scale)
        ):
            print(f"{options.what}: takes {study.name} from {results}; to renew it, make it first", flush=True)
            continue
        make(
            study,
            setting,
            out=out.resolve(),
            results=results,
            parallel=options.jobs,
            run=not options.no_run,
            vectorize=options.vectorize,
        )
    return 0


def make(
    study: Study, setting: Setting, *, out: Path, results: Path, parallel: int, run: bool, vectorize: int = 1
) -> None:
    """Runs a study's phases one after another and writes its files.

    Args:
        study: the study; what it needs must have been made.
        setting: data, scale, seeds.
        out: where run folders go; one folder below for each data set and scale.
        results: where the files go; one folder below likewise.
        parallel: runs at a time.
        run: whether to run what is missing.
        vectorize: runs that are trained as one, at most.
    """
    name = folder_of(study, setting.data, setting.scale)
    folder, sweep = results / name, out / name
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, pl.DataFrame] = {}
    for need in study.needs:
        found |= load_found(BY_NAME[need], folder)
    for phase in study.phases:
        if phase.rounds is not None:
            jobs = every = _rounds(study, phase, setting, sweep, parallel=parallel, run=run, vectorize=vectorize)
        else:
            jobs = phase.jobs(setting, found)
            print(f"{study.name}: {phase.name}, {len(jobs)} runs", flush=True)
            if jobs and run:
                launch(TRAIN, sweep, unique(jobs), parallel=parallel, vectorize=vectorize)
            # Runs of models that were asked for at another time stay in the results.
            every = jobs if setting.quick else phase.jobs(replace(setting, models=tuple(LABELS)), found)
        runs, missing = phase.read(setting, sweep, every)
        missing = [job for job in missing if job in jobs]
        if missing:
            print(f"{study.name}: {len(missing)} of {len(jobs)} runs of {phase.name} are missing", file=sys.stderr)
        if jobs and len(missing) == len(jobs):
            raise UserError(f"{study.name}: no run of {phase.name} in {sweep}")
        if "base_lr" in runs.columns and runs["base_lr"].n_unique() > 1:
            rates = ", ".join(f"{rate:g}" for rate in sorted(runs["base_lr"].drop_nulls().unique()))
            print(f"{study.name}: runs of several base rates ({rates}) in {sweep}; use a new --out", file=sys.stderr)
        write_text(folder / f"{phase.name}.csv", runs.write_csv())
        found[phase.name] = runs
    path = folder / f"{study.name}.md"
    text = render(study, setting.data, load_found(study, folder), name)
    write_text(path, text)
    if study.draw is not None:
        study.draw(setting.data, found, folder / study.name)
    print(text, path, sep="\n", flush=True)


def _rounds(
    study: Study, phase: Phase, setting: Setting, sweep: Path, *, parallel: int, run: bool, vectorize: int
) -> list[Job]:
    """Launches a phase round by round; returns the jobs of all rounds."""
    assert phase.rounds is not None
    jobs: list[Job] = []
    for made in phase.rounds(setting, sweep):
        jobs += made.jobs
        missing = find(made.folder, made.jobs)[1] if run else []
        if missing:
            print(f"{study.name}: {phase.name}, {made.folder.name}, {len(missing)} runs", flush=True)
            launch(TRAIN, made.folder, unique(missing), parallel=parallel, vectorize=vectorize)
    return jobs


def _root() -> Path:
    """The clone, or the current folder where the package is installed without one."""
    return clone() or Path.cwd()


def _published_root() -> Path:
    root = _root()
    if not (root / "results").is_dir():
        raise UserError(f"no folder results in {root}; run this command in a clone of the project")
    return root


def _with_needs(study: Study) -> list[Study]:
    return [*(needed for name in study.needs for needed in _with_needs(BY_NAME[name])), study]


def _is_made(study: Study, folder: Path) -> bool:
    """Whether all files of a study are there. Its search alone can take longer than the study that needs it."""
    return all((folder / f"{phase.name}.csv").is_file() for phase in study.phases)


def _setting(options: argparse.Namespace) -> Setting:
    given = dict(override.split("=", 1) for override in options.overrides if "=" in override)
    if len(given) < len(options.overrides):
        raise UserError(f"'{next(o for o in options.overrides if '=' not in o)}' is no override; write key=value")
    name, scale = given.pop("data", "kuairand"), given.pop("scale", "laptop")
    if name not in DATA:
        raise UserError(f"data={name}: {suggest(name, list(DATA))}")
    extra = tuple(f"{key}={value}" for key, value in given.items())
    if name == "kuairand" and "data.source" not in given:
        extra = (f"data.source={_slice()}", *extra)
    quick = QUICK if options.quick else ()
    data: Data = DATA[name]
    seeds = 1 if options.quick else options.seeds
    if options.vectorize < 1:
        raise UserError(f"--vectorize must be 1 or more, got {options.vectorize}")
    if options.trials < 1 or (options.seeds is not None and options.seeds < 1):
        raise UserError(f"--trials and --seeds must be 1 or more, got {options.trials} and {options.seeds}")
    return Setting(
        data=data,
        scale=scale,
        seeds=seeds,
        models=tuple(options.models) if options.models else None,
        trials=2 if options.quick else options.trials,
        quick=options.quick,
        extra=(*extra, *quick),
    )


def _slice() -> Path:
    """The KuaiRand slice where the tests look for it too."""
    places = [Path(os.environ["EVENKEEL_DATA"])] if "EVENKEEL_DATA" in os.environ else []
    for place in (*places, _root().parent / "shared" / "data"):
        if (place / SLICE).is_dir():
            return (place / SLICE).resolve()
    raise UserError(
        "give data.source=DIR, the folder with KuaiRand's published files (docs/data.md says how to get them)"
    )
