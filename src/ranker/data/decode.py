"""Decoding of Arrow columns into a batch, a whole column at a time. Ids are int64 throughout.

Each function takes one column of a row group, returns its values and appends the faults found in it. A faulty row gets
a harmless value (0), so that the policy for bad rows is applied later, in one place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ranker.data.arrow_types import is_string, value_type
from ranker.data.batch import NO_GROUP, Batch, Ragged
from ranker.data.hashing import hash_bytes, splitmix64
from ranker.data.row_faults import Fault, Place
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task, Transform
from ranker.data.times import times_ms

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_LARGEST_LABEL = 1e15  # the squared errors of a batch are added in float32, which ends at 3e38
_LARGEST_WEIGHT = 1e9  # times the largest error, likewise


def decode(
    table: pa.Table,
    *,
    schema: Schema,
    first_row: int,
    place: Place,
    labelled: bool = True,
    unseen_ids: bool = False,
) -> tuple[Batch, list[Fault]]:
    """Decodes the rows of one row group.

    Args:
        table: the columns in ``schema.columns()``, of types accepted by ``checks.check_columns``.
        schema: the meaning of the columns.
        first_row: position of the first row in the log. It is the row id if the schema has no row_id column.
        place: origin of the rows, for errors.
        labelled: False for rows to be scored. Time, labels and row id may then be missing and count as unknown.
        unseen_ids: an id out of range reads as unknown (row 0) and is no fault.

    Returns:
        The rows, and the faults of some of them.

    Raises:
        UserError: a time that is null or no time, or an integer that does not fit int64.
    """
    names = schema.columns() if labelled else [*schema.feature_columns(), schema.row_id]
    columns = {name: _one_chunk(table[name]) for name in names if labelled or name in table.column_names}
    faults: list[Fault] = []
    rows = table.num_rows
    dense_BF = np.empty((rows, len(schema.dense)), dtype=np.float32)
    for f, feature in enumerate(schema.dense):
        dense_BF[:, f] = dense_values(columns[feature.column], feature, faults)
    onehot_BC = np.empty((rows, len(schema.one_hot)), dtype=np.int64)
    for c, categorical in enumerate(schema.one_hot):
        owner = schema.table_of(categorical)
        onehot_BC[:, c] = embedding_rows(columns[categorical.column], owner, categorical.column, faults, place)
    ragged = {}
    for categorical in schema.ragged:
        owner = schema.table_of(categorical)
        ragged[categorical.name] = ragged_rows(columns[categorical.column], categorical, owner, faults, place)
    labels_BT = np.zeros((rows, len(schema.tasks)), dtype=np.float32)
    mask_BT = np.zeros((rows, len(schema.tasks)), dtype=np.bool_)
    for t, task in enumerate(schema.tasks if labelled else ()):
        mask = columns[task.mask] if task.mask else None
        labels_BT[:, t], mask_BT[:, t] = label_values(columns[task.column], task, mask, faults)
    weight_B = groups_BG = None
    if schema.weight and labelled:
        weight_B = weight_values(columns[schema.weight], schema.weight, faults)
        mask_BT &= (weight_B > 0)[:, None]
    if schema.groups and labelled:
        groups_BG = np.stack([group_keys(columns[g.column], g.column, place) for g in schema.groups], axis=1)
    time_ms_B = times_ms(columns[schema.time_column], schema, place) if labelled else np.zeros(rows, dtype=np.int64)
    if unseen_ids:
        faults = [fault for fault in faults if not fault.unseen_id]
    batch = Batch(
        dense_BF=torch.from_numpy(dense_BF),
        onehot_BC=torch.from_numpy(onehot_BC),
        ragged=ragged,
        labels_BT=torch.from_numpy(labels_BT),
        mask_BT=torch.from_numpy(mask_BT),
        time_ms_B=torch.from_numpy(time_ms_B),
        row_B=torch.from_numpy(_row_ids(columns, schema, first_row, rows, faults, place)),
        weight_B=None if weight_B is None else torch.from_numpy(weight_B),
        groups_BG=None if groups_BG is None else torch.from_numpy(groups_BG),
    )
    return batch, faults


def dense_values(column: pa.Array, feature: DenseFeature, faults: list[Fault]) -> Floats:
    """``transform(scale * x)``, float32 [B]. A null reads as ``fill_null``."""
    missing = _nulls(column)
    if missing is not None and feature.fill_null is None:
        faults.append(_fault(feature.column, "null", f"give dense feature '{feature.name}' a fill_null", missing))
    values = _floats(column, feature.fill_null or 0.0)
    values = transformed(values, feature.transform, feature.scale)
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, np.float32(0.0))
        faults.append(_fault(feature.column, "NaN or infinity", "clean the column (null where unknown)", ~finite))
    return values


def embedding_rows(column: pa.Array, owner: CategoricalFeature, name: str, faults: list[Fault], place: Place) -> Ints:
    """Rows of the embedding table, int64 [B]. 0 for null and unknown ids.

    Args:
        column: integers, booleans or strings.
        owner: the feature whose table and id mapping are used.
        name: the Parquet column, for faults.
        faults: faults found are appended here.
        place: origin of the rows, for errors.
    """
    if pa.types.is_null(value_type(column.type)):
        return np.zeros(len(column), dtype=np.int64)
    if pa.types.is_dictionary(column.type) and not is_string(column.type.value_type):
        column = column.dictionary_decode()
    if is_string(column.type) or pa.types.is_dictionary(column.type):
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        distinct = embedding_rows_of_strings(encoded.dictionary, owner)
        codes = encoded.indices.cast(pa.int64())
        # Null strings get an index one past the dictionary, where row 0 is appended.
        return np.append(distinct, 0)[codes.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]
    if owner.vocabulary:
        known_ids = pa.array(owner.vocabulary, pa.int64())
        found = pc.index_in(_as_int64(column, name, place), value_set=known_ids, skip_nulls=True)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    ids = _int64(column, name, place, fill=0)
    missing = _nulls(column)
    if owner.hash_buckets:
        rows = _bucket(splitmix64(ids), owner.hash_buckets)
    else:
        outside = _outside(ids, owner.num_embeddings)
        rows = ids + 1
        if outside is not None:
            rows[outside] = 0
            cure = (
                f"ids of '{owner.name}' are 0 .. {owner.num_embeddings - 1}: raise num_embeddings or use hash_buckets"
            )
            for reason, wrong in (("id below 0", ids < 0), ("id out of range", ids >= owner.num_embeddings)):
                if wrong.any():
                    fault = _fault(name, f"{reason} ({ids[wrong][0]})", cure, wrong)
                    faults.append(replace(fault, unseen_id=True))
    if missing is not None:
        rows[missing] = 0
    return rows


def embedding_rows_of_strings(strings: pa.Array, owner: CategoricalFeature) -> Ints:
    """Rows of the embedding table for distinct strings. Null gives row 0."""
    if owner.vocabulary:
        found = pc.index_in(strings.cast(pa.large_string()), value_set=pa.array(owner.vocabulary, pa.large_string()))
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    rows = _bucket(_hashes(strings), owner.hash_buckets)
    missing = _nulls(strings)
    if missing is not None:
        rows[missing] = 0
    return rows


def hashes_of(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """The 64-bit hashes of which ``hash_buckets`` takes the remainder.

    Args:
        ids: integers, booleans or strings, without nulls.
    """
    return _hashes(ids) if is_string(ids.type) else splitmix64(_int64(ids, "ids", Place(file="", row_group=0), fill=0))


def ragged_rows(
    column: pa.Array, feature: CategoricalFeature, owner: CategoricalFeature, faults: list[Fault], place: Place
) -> Ragged:
    """Rows of the embedding table for a column of lists. A null list is an empty list, a null id is row 0."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.null()))  # of integers or strings, as the feature has them
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    found: list[Fault] = []
    values = embedding_rows(column.flatten(), owner, feature.column, found, place)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    for fault in found:
        rows = np.unique(np.searchsorted(offsets, fault.rows, side="right") - 1)
        faults.append(replace(fault, rows=rows))
    if feature.max_length and lengths.max(initial=0) > feature.max_length:
        kept = np.minimum(lengths, feature.max_length)
        starts = offsets[1:] - kept
        offsets = np.zeros_like(offsets)
        np.cumsum(kept, out=offsets[1:])
        values = values[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)]
    return Ragged(torch.from_numpy(values), torch.from_numpy(offsets))


def label_values(column: pa.Array, task: Task, mask: pa.Array | None, faults: list[Fault]) -> tuple[Floats, Bools]:
    """Labels, float32 [B], 0 where not observed, and the mask, bool [B], true where observed."""
    missing = _nulls(column)
    observed = np.ones(len(column), dtype=np.bool_) if missing is None else ~missing
    if mask is not None:
        observed &= _mask_values(mask, task, faults)
    if task.at_least is not None:
        numbers = _as_number(column, pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
        values = (numbers >= task.at_least).astype(np.float32)
        finite = np.isfinite(numbers)  # a comparison would make a NaN an observed 0
    else:
        values = transformed(_floats(column, 0.0), task.transform, task.scale)
        finite = np.isfinite(values)
    finite |= ~observed
    if not finite.all():
        faults.append(_fault(task.column, "label NaN or infinity", "make it null where it is unknown", ~finite))
    values = np.where(observed & finite, values, np.float32(0.0))
    if task.type == "regression":
        large = np.abs(values) > _LARGEST_LABEL
        if large.any():
            cure = f"its square does not fit float32: give task '{task.name}' a scale or transform: log1p"
            faults.append(_fault(task.column, f"label above {_LARGEST_LABEL:g} ({values[large][0]:g})", cure, large))
            values = np.where(large, np.float32(0.0), values)
    if task.type == "binary":
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            cure = f"labels of binary task '{task.name}' are 0 or 1: give it at_least, or make it a regression"
            faults.append(_fault(task.column, f"label neither 0 nor 1 ({values[wrong][0]:g})", cure, wrong))
    return values, observed


def _mask_values(mask: pa.Array, task: Task, faults: list[Fault]) -> Bools:
    if pa.types.is_boolean(mask.type):
        return mask.fill_null(False).to_numpy(zero_copy_only=False)
    values = _floats(mask, 0.0)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        cure = f"the mask of task '{task.name}' is true or false, 1 or 0"
        faults.append(_fault(task.mask, f"mask neither 0 nor 1 ({values[wrong][0]:g})", cure, wrong))
    return values == 1


def weight_values(column: pa.Array, name: str, faults: list[Fault]) -> Floats:
    """Weights of the rows, float32 [B]. One that is null, negative, not finite or huge is a fault and reads as 0."""
    missing = _nulls(column)
    values = _floats(column, 0.0)
    if missing is not None:
        faults.append(_fault(name, "null weight", "give every row a weight; 0 for a row that does not count", missing))
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values <= _LARGEST_WEIGHT))
    if wrong.any():
        cure = f"weights are numbers from 0 to {_LARGEST_WEIGHT:g}"
        faults.append(_fault(name, f"weight {values[wrong][0]:g}", cure, wrong))
        return np.where(wrong, np.float32(0.0), values)
    return values.copy()  # Arrow's memory is read-only


def group_keys(column: pa.Array, name: str, place: Place) -> Ints:
    """Keys of a group, int64 [B]: the integers themselves, or a 64-bit hash of strings. ``NO_GROUP`` for null."""
    if pa.types.is_null(column.type):
        return np.full(len(column), NO_GROUP, dtype=np.int64)
    if pa.types.is_dictionary(column.type) and not is_string(column.type.value_type):
        column = column.dictionary_decode()
    if is_string(column.type) or pa.types.is_dictionary(column.type):
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        distinct = _hashes(encoded.dictionary).view(np.int64)
        missing = _nulls(encoded.dictionary)
        if missing is not None:
            distinct[missing] = NO_GROUP
        codes = encoded.indices.cast(pa.int64()).fill_null(len(distinct))
        return np.append(distinct, np.int64(NO_GROUP))[codes.to_numpy(zero_copy_only=False)]
    return _int64(column, name, place, fill=NO_GROUP).copy()


def transformed(values: Floats, transform: Transform, scale: float) -> Floats:
    """``transform(scale * x)``. log1p is signed: ``sign(x) * log(1 + |x|)``."""
    if scale != 1.0:
        with np.errstate(over="ignore"):  # an infinity is reported by the caller
            values = values * np.float32(scale)
    if transform == "log1p":
        values = np.copysign(np.log1p(np.abs(values)), values)
    return values


def _row_ids(
    columns: dict[str, pa.Array], schema: Schema, first_row: int, rows: int, faults: list[Fault], place: Place
) -> Ints:
    if schema.row_id not in columns:
        return np.arange(first_row, first_row + rows, dtype=np.int64)
    column = columns[schema.row_id]
    missing = _nulls(column)
    if missing is not None:
        faults.append(_fault(schema.row_id, "null", "give every row an id, or leave row_id out of the schema", missing))
    return _int64(column, schema.row_id, place, fill=-1).copy()  # a copy, because Arrow's memory is read-only


def _fault(column: str, reason: str, cure: str, wrong: Bools) -> Fault:
    return Fault(column=column, reason=reason, cure=cure, rows=np.flatnonzero(wrong))


def _outside(ids: Ints, size: int) -> Bools | None:
    """Mask of the ids outside of 0 .. size-1. None if there are none, which the minimum and maximum show cheaply."""
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < size):
        return None
    return (ids < 0) | (ids >= size)


def _hashes(strings: pa.Array) -> npt.NDArray[np.uint64]:
    flat = pa.concat_arrays([strings.cast(pa.large_string())])  # makes the offsets of a slice start at 0
    _, offsets, data = flat.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64, count=len(flat) + 1, offset=8 * flat.offset)
    return hash_bytes(np.frombuffer(data or b"", dtype=np.uint8), bounds)


def _bucket(hashed: npt.NDArray[np.uint64], buckets: int) -> Ints:
    hashed %= np.uint64(buckets)
    rows = hashed.view(np.int64)
    rows += 1
    return rows


def _nulls(column: pa.Array) -> Bools | None:
    return column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None


def _floats(column: pa.Array, fill: float) -> Floats:
    column = _as_number(column, pa.float32())
    if column.null_count:
        column = column.fill_null(pa.scalar(fill, pa.float32()))
    return column.to_numpy(zero_copy_only=False)


def _as_number(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type == kind else column.cast(kind, safe=False)


def _int64(column: pa.Array, name: str, place: Place, fill: int) -> Ints:
    column = _as_int64(column, name, place)
    return (column.fill_null(fill) if column.null_count else column).to_numpy(zero_copy_only=False)


def _as_int64(column: pa.Array, name: str, place: Place) -> pa.Array:
    try:
        return column if column.type == pa.int64() else column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise place.error(name, "an integer does not fit int64; write the column as int64") from error


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
