"""The model of an export as the parent of a new run: weights, schema and dense statistics, without accumulators."""

from __future__ import annotations

from pathlib import Path

import torch

from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.errors import UserError
from ranker.export.bundle import Export
from ranker.export.checked_archive import load_weights
from ranker.runs.lineage import LINEAGE
from ranker.training.warm_start import Parent

_NET = "net."


def exported_parent(path: Path, *, shards: bool = False) -> Parent:
    """The state that an export holds. Its weights lie in mapped files: nothing is read before it is used.

    Args:
        path: the folder.
        shards: the new run shards its tables.

    Raises:
        UserError: the folder is not an export, a file is damaged, the program cannot be read, or its tables are not as
            its schema says.
    """
    exported = Export.read(path)
    about = exported.about
    program = exported.program("pt2")
    try:
        state = load_weights(program)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise UserError(f"warm_start: {program} cannot be read ({' '.join(str(error).split())[:200]})") from error
    net, tables = {name.removeprefix(_NET): x for name, x in state.items() if name.startswith(_NET)}, None
    if shards:
        from ranker.training import stored_tables  # late: few runs have sharded tables

        tables = stored_tables.of_weights(net, exported.schema, path)
        net = {name: x for name, x in net.items() if not stored_tables.is_table(name)}
    known = about.get("dense_statistics")
    statistics = NOTHING
    if known:
        rows = int(known["rows"])
        mean, std = (
            torch.tensor([known[key][feature.name] for feature in exported.schema.dense], dtype=torch.float64)
            for key in ("mean", "std")
        )
        statistics = DenseStatistics.from_state({"rows": rows, "mean": mean, "squares": std.square() * rows})
    identity = {
        "kind": "export",
        "path": str(path.resolve()),
        "run": about.get("run"),
        "config_hash": about.get("config_hash"),
        "step": int(about["step"]),
        "steps": int(about["step"]),
        "windows": 0,
        "rows": 0,
        "last_time_ms": None,
        **(about.get(LINEAGE) or {}),
    }
    return Parent(identity=identity, net=net, schema=exported.schema, statistics=statistics, tables=tables)
