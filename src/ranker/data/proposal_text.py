"""A proposed schema as a file for people, and the commands that come after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ranker.data.columns import to_plain
from ranker.data.proposal import Proposal
from ranker.data.raw_log import RawLog, RawProfile
from ranker.data.raw_values import as_time_ms
from ranker.data.schema import SCHEMA_FILE
from ranker.data.times import DAY_MS
from ranker.installation import command_line

STEPS = 300  # that a run on a small log should have at least
BATCHES = (1024, 512, 256, 128, 64, 32)
MOST_EPOCHS = 2  # more passes over few rows learn them by heart
WIDE = 64  # characters of an entry before its remark


def as_yaml(proposal: Proposal, *, source: str) -> str:
    """The schema as YAML, one line an entry, with what each entry is based on."""
    schema = proposal.schema
    lines = [
        f"# Proposed from the {proposal.rows:,} rows of {source}. Read and correct it: names do not tell all.",
        "# What the keys mean: docs/data.md, and ranker/data/columns.py.",
        *(f"{key}: {_flow(value)}" for key, value in schema.to_dict().items() if not isinstance(value, list)),
    ]
    for key, entries in (("dense", schema.dense), ("categorical", schema.categorical), ("tasks", schema.tasks)):
        if entries:
            lines.append(f"{key}:")
        for entry in entries:
            line = f"- {_flow(to_plain(entry))}"
            remark = proposal.remarks.get(entry.column, "")
            lines.append(f"{line:{WIDE}}  # {remark}" if remark else line)
    if proposal.left_out:
        lines.append("# Left out:")
        lines += [f"# - {name}: {reason}" for name, reason in proposal.left_out.items()]
    return "\n".join(lines) + "\n"


def next_commands(proposal: Proposal, log: RawLog, profile: RawProfile, path: Path) -> tuple[list[str], Sequence[str]]:
    """The commands that lead from the files to a trained model, and why the files must be converted.

    Args:
        proposal: the schema.
        log: the files.
        profile: what is in them.
        path: where the schema was written.
    """
    commands = []
    folder = Path(log.source)
    if proposal.conversion:
        stem = folder.name.split(".")[0] if folder.is_file() else folder.name
        folder = folder.parent / f"{stem}_log"
        commands.append(f"{command_line('prepare')} log {_word(log.source)} {_word(folder)} --schema {_word(path)}")
    elif path.resolve() != (folder / SCHEMA_FILE).resolve():
        commands.append(f"cp {_word(path)} {_word(folder / SCHEMA_FILE)}")
    train = f"{command_line('train')} data=parquet data.source={_word(folder)} data.dense_statistics=past_windows"
    settings = _settings(proposal, profile)
    commands.append(" ".join([train, *settings]))
    search = f"{command_line('headroom')} --find-base-lr data=parquet data.source={_word(folder)}"
    commands.append(" ".join([search, "data.dense_statistics=past_windows", *settings]))
    return commands, proposal.conversion


def _settings(proposal: Proposal, profile: RawProfile) -> list[str]:
    """What a log of this size needs: a batch that leaves enough steps, and a hold-out where the last day is none."""
    name = proposal.schema.time_column
    column = pl.Series(name, pl.from_arrow(profile.sample[name]))
    times = pl.DataFrame({name: column}).select(as_time_ms(name, column.dtype, proposal.time))[name].drop_nulls()
    days = times // DAY_MS
    last = int((days == days.max()).sum()) / max(1, len(days))  # share of the rows on the last day
    found = []
    if days.n_unique() < 2 or not 0.02 <= last <= 0.5 or last * proposal.rows < 200:
        found.append("data.hold_out=0.1")
        last = 0.1
    training = proposal.rows * (1 - last)
    if training / BATCHES[0] < STEPS:
        batch = next((size for size in BATCHES if training / size >= STEPS), BATCHES[-1])
        steps = max(1, int(training / batch))
        epochs = min(MOST_EPOCHS, -(-STEPS // steps))
        found += [f"scale.batch_size={batch}", *([f"train.epochs={epochs}"] if epochs > 1 else [])]
        found.append(f"train.warmup_steps={min(100, max(1, steps * epochs // 10))}")
    return found


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _word(text: str | Path) -> str:
    """A word of a command line; quoted where a shell or Hydra would take it apart."""
    word = str(text)
    return word if all(c.isalnum() or c in "/._-~" for c in word) else f"'\"{word}\"'" if "=" in word else f"'{word}'"
