"""Sharded tables on disk, by torch.distributed.checkpoint: each rank writes and reads its own rows.

The folder of a step is complete or absent. It may be read by another number of ranks, under another plan, or by one
process as whole tables, without torchrec.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.runs.checkpoint_files import SHARD_FILES, checksum

WEIGHT, ACCUMULATOR = "weight", "accumulator"
# What torch pickles into the folder's index. Nothing else is loaded from it.
_ALLOWED = frozenset(
    [
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    ]
)  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index of tables")


class Reader(dcp.FileSystemReader):
    """torch's reader, which runs no code from the index: it is a pickle, and torch reads it as such."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the folder.

        Raises:
            UserError: it is missing, damaged, or names anything that an index does not need.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except Exception as error:  # whatever a damaged file makes pickle raise
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:160]})") from error
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def save(state: Mapping[str, Any], folder: Path, group: dist.ProcessGroup) -> None:
    """Writes sharded tensors into a folder, durably. All ranks call it.

    Raises:
        UserError: a rank cannot write, for example because its disk is full. The folder is absent then.
    """
    rank = dist.get_rank(group)
    draft = folder.with_name(f".{folder.name}.draft")
    if rank == 0:
        for left in (draft, folder):
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True, exist_ok=True)
    dist.barrier(group)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own sharded tensors
            dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(draft), process_group=group)
    except dcp.CheckpointException as error:  # raised on all ranks alike
        reason = next(iter(error.failures.values()), None) if hasattr(error, "failures") else None
        why = str(reason[0]) if isinstance(reason, tuple) else str(error)
        raise UserError(f"{folder} cannot be written: {' '.join(why.split())[:200]}") from error
    own = {path.name: [path.stat().st_size, checksum(path)] for path in draft.glob(f"__{rank}_*")}
    parts: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, own, group=group)
    if rank == 0:
        index = draft / ".metadata"
        files = {index.name: [index.stat().st_size, checksum(index)]}
        for part in parts:
            files |= part
        write_text(draft / SHARD_FILES, json.dumps(files))
        os.replace(draft, folder)
    dist.barrier(group)


def load(state: Mapping[str, Any], folder: Path, group: dist.ProcessGroup) -> None:
    """Reads a folder of ``save`` into sharded tensors, in place, whatever ranks and plan wrote it. All ranks call it.

    Raises:
        UserError: the folder is missing or damaged, or holds other tables.
    """
    known = Reader(folder).read_metadata().state_dict_metadata
    for key, tensor in state.items():
        here, there = tensor.metadata().size, getattr(known.get(key), "size", None)
        if there != here:
            shapes = f"{list(there)} there and {list(here)} here" if there else "not there"
            hint = (
                "; accumulators of row-wise Adagrad on column-wise shards need the number of shards that wrote them"
                if there and key.endswith(ACCUMULATOR)
                else ""
            )
            raise UserError(f"{folder} does not fit the tables: {key} is {shapes}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(state), storage_reader=Reader(folder), process_group=group)
    except dcp.CheckpointException as error:
        raise UserError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
