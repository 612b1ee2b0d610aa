"""``evenkeel export`` and ``evenkeel score``: hand out a model that passes the gate, and score files with it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from ranker.cli import add_trust, command
from ranker.data.columns import from_plain as from_mapping
from ranker.errors import UserError
from ranker.export.bundle import PROGRAMS, Export, counted, refuse_existing, write_json
from ranker.export.program_runtime import open_program
from ranker.export.scoring import ON_BAD_ROWS, UNSEEN_IDS, ParquetRows, score_file
from ranker.installation import conf_folder
from ranker.runs.checkpoint_files import Best, damage, step_of
from ranker.runs.config_identity import config_hash
from ranker.runs.lineage import parent
from ranker.runs.log_identity import check_schema
from ranker.runs.model_card import card_of
from ranker.runs.run_folder import SUMMARY, RunFolder, read_summary
from ranker.stability.gate import GateSettings, Verdict

DESCRIPTION = """Export the model of a run, if it passes the gate.

Exit status 0: exported. 2: refused, with one reason per line on standard error; nothing was written.
"""


@command
def export(arguments: Sequence[str] | None = None) -> int:
    """Exports the model of a run; exit status 0, or 2 where the gate refuses it."""
    given = _parser().parse_args(arguments)
    settings = _settings(given)
    destination: Path = given.out or given.run / "export"
    refuse_existing(destination, replace=given.force)
    try:
        verdict = _export(given, settings, destination)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if given.report:
        write_json(given.report, verdict.to_dict())
    for check in verdict.checks:
        if check.passed is False:
            names = " or ".join(f"--{name.replace('_', '-')}" for name in check.settings)
            print(f"refused: {check.about}: {check.words}{f' ({names} changes it)' if names else ''}", file=sys.stderr)
    for check in verdict.checks:
        if check.passed is None:
            print(f"note: {check.about}: {check.words}", file=sys.stderr)
    if verdict.passed:
        print(f"exported: {destination}")
        if given.wandb:
            from ranker.training import trackers

            trackers.keep_later(given.run, trackers.Artifact("export", destination))
    return 0 if verdict.passed else 2


def _export(given: argparse.Namespace, settings: GateSettings, destination: Path) -> Verdict:
    # Imported late: Lightning and torch's exporter cost seconds that --help need not wait for.
    from ranker.export.release import Candidate, Weights, origin, write_export
    from ranker.parts import make_net, open_log

    folder = RunFolder.existing(given.run)
    cfg = folder.load_config(trusted=given.trust)
    path, which = _chosen_checkpoint(given, folder)
    weights = Weights.read(path)
    log = open_log(cfg)
    check_schema(folder.path, log.schema)
    candidate = Candidate.load(make_net(cfg, log.schema), weights, log=log, eval_batch_size=cfg.scale.eval_batch_size)
    print(f"{path}: {cfg.model.name}, step {weights.step}, {which}", flush=True)
    rows = log.num_rows - log.train_rows
    with counted("evaluating on the hold-out", total=rows, console=Console(stderr=True)) as advance:
        metrics, positives = candidate.evaluate(advance)
    evidence = candidate.evidence(folder.path, metrics, positives, eval_max_rows=cfg.data.eval_max_rows)
    about = origin(
        cfg,
        weights,
        run=folder.path.name,
        which=which,
        log=log,
        config_hash=config_hash(cfg),
        parent=parent(cfg),
    )
    return write_export(
        candidate,
        evidence,
        settings,
        destination=destination,
        onnx=given.onnx,
        force=given.force,
        about=about,
        card=card_of(folder, log=log, step=weights.step, checkpoint=which, metrics=metrics),
    )


def _chosen_checkpoint(given: argparse.Namespace, folder: RunFolder) -> tuple[Path, str]:
    """The checkpoint to export, and which one it is in words.

    Raises:
        UserError: it is missing or damaged, or the last one is not of the step that summary.json reports.
    """
    if given.checkpoint is not None or given.best:
        path, which = given.checkpoint, "the checkpoint that was given"
        if given.best:
            best = Best.read(folder.checkpoints)
            if best is None:
                raise UserError(
                    f"{folder.path} keeps no best checkpoint; train.eval_every and checkpoint_every keep one"
                )
            path, which = best.path(folder.checkpoints), f"the best by {best.metric} ({best.value:.4f})"
        if path.is_file() and (reason := damage(path)):
            raise UserError(f"{path} is {reason}; give another one with --checkpoint")
        return path, which
    path = folder.newest_checkpoint()
    summary, step = read_summary(folder.path), step_of(path)
    if summary is not None and summary["steps"] != step:
        raise UserError(
            f"{SUMMARY} reports step {summary['steps']}, but the newest checkpoint is of step {step}; "
            f"resume the run to train the missing steps, or ask for these weights with --checkpoint {path}"
        )
    return path, "the last one"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="where the export goes (default: RUN_DIR/export)")
    parser.add_argument("--onnx", action="store_true", help="write an ONNX program too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the checkpoint that was best on the hold-out by objective")
    which.add_argument("--checkpoint", type=Path, help="a checkpoint file (default: the last one of the run)")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the gate's report here, also when refused")
    parser.add_argument("--wandb", action="store_true", help="add the export to the run in W&B, as an artifact")
    add_trust(parser)
    gate = parser.add_argument_group("the gate", "values stand in conf/gate; each of these replaces one")
    gate.add_argument("--gate", default="default", metavar="NAME", help="a file of conf/gate (default: %(default)s)")
    for field in dataclasses.fields(GateSettings):
        several = str(field.type).startswith("Sequence")
        kind = str if several else {"int": int, "float": float}[str(field.type)]
        gate.add_argument(f"--{field.name.replace('_', '-')}", type=kind, nargs="+" if several else None)
    return parser


def _settings(given: argparse.Namespace) -> GateSettings:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose(overrides=[f"+gate={given.gate}"])
    values: dict[str, Any] = OmegaConf.to_container(cfg.gate, resolve=True)  # type: ignore[assignment]
    names = [field.name for field in dataclasses.fields(GateSettings)]
    values |= {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return from_mapping(GateSettings, values, f"gate={given.gate}")


@command
def score(arguments: Sequence[str] | None = None) -> int:
    """Scores a Parquet file; exit status 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Score a Parquet file with an exported model.")
    parser.add_argument("export", metavar="EXPORT_DIR", type=Path, help="a folder that scripts/export.py wrote")
    parser.add_argument("file", metavar="FILE.parquet", type=Path, help="rows to score; labels may be missing")
    parser.add_argument("--out", type=Path, required=True, help="Parquet: the row id, and one column per task")
    parser.add_argument("--keep", metavar="COLUMN", nargs="+", default=[], help="columns of FILE that --out repeats")
    parser.add_argument("--format", choices=list(PROGRAMS), default="pt2", help="which program (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=8192, help="rows at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the library's own choice")
    parser.add_argument("--on-bad-rows", choices=ON_BAD_ROWS, default="raise", help="null gives such a row no score")
    parser.add_argument("--unseen-ids", choices=UNSEEN_IDS, default="raise", help="unknown: ids out of range as null")
    given = parser.parse_args(arguments)
    if given.threads < 0:
        raise UserError(f"--threads must be 0 or more, got {given.threads}")
    exported = Export.read(given.export)
    rows = ParquetRows(
        given.file,
        exported.schema,
        piece_rows=given.batch_rows,
        on_bad_rows=given.on_bad_rows,
        unseen_ids=given.unseen_ids,
        id_types=exported.about.get("id_types"),
        keep=given.keep,
    )
    engine = open_program(exported.program(given.format), schema=exported.schema, threads=given.threads)
    start = time.monotonic()
    try:
        with counted("scoring", total=rows.num_rows, console=Console(stderr=True)) as advance:
            missing = score_file(rows, engine, given.out, tasks=exported.schema.task_names, advance=advance)
    except KeyboardInterrupt:
        print(f"interrupted; {given.out} was not written", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    print(f"{given.out}: {rows.num_rows:,} rows, {rows.num_rows / max(seconds, 1e-9):,.0f} rows/s")
    if missing:
        print(f"{missing:,} rows could not be used and have no score")
    return 0
