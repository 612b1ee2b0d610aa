"""A capsule: a divergence on disk, with all that is needed to train its steps again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranker.atomic import write_text
from ranker.capsules.training_state import TrainingState
from ranker.data.batch import Batch, Ragged
from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError
from ranker.runs.run_folder import plain
from ranker.stability import Event

FORMAT = 2  # 2: maybe with the used rows of tables alone
MANIFEST, CONFIG, SNAPSHOT, ROWS = "capsule.json", "config.yaml", "snapshot.pt", "rows.pt"
_STATE = ("step", "net", "optimizer", "schedule", "auc", "detector", "rng")  # fields of TrainingState in SNAPSHOT


class UsedRows(NamedTuple):
    """The rows of a table of the run that a capsule has, in this order.

    Attributes:
        rows: their numbers, ascending, int64.
        first: row of the table's row 0 among all tables of its width, in the run.
    """

    rows: Tensor
    first: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``capsule.json``.

    Steps are optimizer steps: after step s the optimizer has taken s steps, and the first batch after the snapshot
    belongs to step ``snapshot_step + 1``. With accumulated gradients, several batches belong to a step.

    Attributes:
        event: the divergence.
        snapshot_step: steps taken when the snapshot was made.
        steps: the step of each batch, in order.
        numbers: the place of each batch in the training order (``Batch.number``).
        signals: the recorded signals of each batch, in the order of ``ranker.stability.pack``, float32,
            written as hexadecimal floats, hence exact.
        tasks: names of the tasks.
        world_size: ranks, each with a file of batches.
        accumulate: batches per step.
        seed: seed of the run.
        versions: versions of Python and packages.
        machine: what else decides the bits: processor, threads, device.
        note: what is missing, in one sentence; empty if nothing is.
        sharded: whether the run had sharded tables. Its sums were in another order than those of a replay.
        grouped: whether the run was trained as one with others. Its products may have been rounded in another way.
        format: version of the format of these files.
    """

    event: Event
    snapshot_step: int
    steps: Sequence[int]
    numbers: Sequence[int]
    signals: Sequence[Sequence[str]]
    tasks: Sequence[str]
    world_size: int
    accumulate: int
    seed: int
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    note: str = ""
    sharded: bool = False
    grouped: bool = False
    format: int = FORMAT

    def signals_SN(self) -> Tensor:  # noqa: N802
        """The recorded signals, float32, one row of ``pack`` per batch."""
        return torch.tensor([[float.fromhex(x) for x in row] for row in self.signals], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Capsule:
    """A capsule that has been read.

    Attributes:
        path: its folder.
        manifest: its description.
        schema: features and tasks of the log; tables of which not all rows are here have as many as are.
        batches: per batch, the shares of the ranks.
        state: the snapshot.
        rows: what these rows are in the run, by the feature that owns the table; empty where all rows are here.
    """

    path: Path
    manifest: Manifest
    schema: Schema
    batches: list[list[Batch]]
    state: TrainingState
    rows: Mapping[str, UsedRows] = field(default_factory=dict)

    @property
    def places(self) -> dict[int, Tensor]:
        """For tables of which not all rows are here, the place of each row in the run's tables of its width."""
        found: dict[int, list[Tensor]] = {}
        for feature in self.schema.categorical:
            if feature.name in self.rows:
                rows, first = self.rows[feature.name]
                found.setdefault(feature.embedding_dim, []).append(rows + first)
        return {dim: torch.cat(parts) for dim, parts in found.items()}

    @property
    def config(self) -> Path:
        """The run's resolved configuration."""
        return self.path / CONFIG

    @classmethod
    def load(cls, path: str | Path) -> Capsule:
        """Reads a capsule, without running any code from it.

        Raises:
            UserError: there is none, it is incomplete, or its format is newer.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"no {MANIFEST} in {path}; give a folder such as runs/NAME/capsules/step=120")
        try:
            raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if raw["format"] > FORMAT:
                raise UserError(
                    f"{path} has format {raw['format']}, this version reads up to {FORMAT}; update evenkeel"
                )
            depth = raw["event"]["depth"]
            raw["event"] = Event(**raw["event"] | {"depth": math.inf if depth is None else depth})
            manifest = Manifest(**raw)
            shares, pasts = zip(*(read_share(path / share_file(r)) for r in range(manifest.world_size)), strict=True)
            saved = torch.load(path / SNAPSHOT, map_location="cpu", weights_only=True)
            state = TrainingState(**saved | {"auc": torch.stack(pasts).sum(0)})
            used = torch.load(path / ROWS, weights_only=True) if (path / ROWS).is_file() else {}
            rows = {name: UsedRows(*each) for name, each in used.items()}
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read as a capsule: {' '.join(str(error).split())}") from error
        return cls(
            path=path,
            manifest=manifest,
            schema=Schema.from_yaml(path / SCHEMA_FILE),
            batches=[list(parts) for parts in zip(*shares, strict=True)],
            state=state,
            rows=rows,
        )


def share_file(rank: int) -> str:
    """Name of the file of one rank: its rows, and its training AUC."""
    return f"rank{rank}.pt"


def write_share(path: Path, batches: Sequence[Batch], auc: Tensor) -> None:
    """Writes one rank's share as plain tensors and numbers, which load with ``weights_only=True``."""
    torch.save({"batches": [_plain(batch) for batch in batches], "auc": _own(auc)}, path)


def read_share(path: Path) -> tuple[list[Batch], Tensor]:
    """Reads a file of ``write_share``."""
    share = torch.load(path, map_location="cpu", weights_only=True)
    return [_batch(part) for part in share["batches"]], share["auc"]


def write_state(path: Path, state: TrainingState) -> None:
    """Writes the part of a state that a replay needs: plain tensors, numbers, strings, lists and dicts."""
    torch.save({name: getattr(state, name) for name in _STATE}, path)


def write_rows(path: Path, rows: Mapping[str, UsedRows]) -> None:
    """Writes which rows of the run's tables a capsule has."""
    torch.save({name: tuple(used) for name, used in rows.items()}, path)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes ``capsule.json``. Must be the last file, because its presence means that the capsule is complete."""
    content = asdict(manifest) | {"event": manifest.event.to_dict()}
    write_text(path / MANIFEST, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def replace_event(path: Path, event: Event) -> None:
    """Writes another event into the ``capsule.json`` of a complete capsule: a later verdict on the same steps."""
    plain = json.loads((path / MANIFEST).read_text(encoding="utf-8")) | {"event": event.to_dict()}
    write_text(path / MANIFEST, json.dumps(plain, indent=1) + "\n")


def hexadecimal(rows_SN: Tensor) -> list[list[str]]:
    """Signals as hexadecimal floats, which are exact."""
    return [[x.hex() for x in row] for row in rows_SN.double().tolist()]


def differences(capsule: Manifest, versions: Mapping[str, str], machine: Mapping[str, Any]) -> list[str]:
    """How this process differs from the one that wrote a capsule, such as ``torch 2.13.0 there, 2.14.0 here``."""
    found = []
    for then, now in ((capsule.versions, versions), (capsule.machine, machine)):
        for name in dict.fromkeys([*then, *now]):
            there, here = then.get(name, "none"), now.get(name, "none")
            if there != here:
                found.append(f"{name} {there} there, {here} here")
    return found


def num_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    lists = [t for ragged in batch.ragged.values() for t in (ragged.values, ragged.offsets)]
    return sum(t.nbytes for t in (*batch.columns().values(), *lists))


def _plain(batch: Batch) -> dict[str, Any]:
    plain: dict[str, Any] = {name: _own(tensor) for name, tensor in batch.columns().items()}
    plain["ragged"] = {name: [_own(lists.values), _own(lists.offsets)] for name, lists in batch.ragged.items()}
    return plain | {"window": batch.window, "number": batch.number}


def _batch(plain: Mapping[str, Any]) -> Batch:
    ragged = {name: Ragged(values, offsets) for name, (values, offsets) in plain["ragged"].items()}
    return Batch(**{**plain, "ragged": ragged})


def _own(tensor: Tensor) -> Tensor:
    """The tensor alone; of a view, torch.save would write all of the memory behind it."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
