"""Schemas and Parquet files drawn at random: each gives the right rows, or one clear line that refuses it.

The right rows come from plain Python, value by value. The default tests draw a few; the slow ones draw thousands.
"""

from __future__ import annotations

import datetime as dt
import math
import tempfile
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranker.data.hashing import hash_bytes, splitmix64
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError

START_MS = 1_650_844_800_000
DAY_MS = 86_400_000
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))

# ---- schemas

WORDS = st.sampled_from(["x", "item", "", "a.b", "a\nb", "é", "no", "time_ms", "none", "log1p", "sequence", "one_hot"])
SCALARS = st.one_of(
    WORDS,
    st.text(max_size=4),
    st.integers(-3, 5),
    st.sampled_from([2**63, -(2**63), 10**30, 0.5, 0.0, -1.0, 1e300, math.nan, math.inf, True, False, None]),
    st.dates(),
    st.binary(max_size=2),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2))
VALID = {
    "name": "shop",
    "time_column": "ts",
    "time_unit": "s",
    "dense": [{"name": "price", "transform": "log1p", "scale": 0.01, "fill_null": 0}],
    "categorical": [
        {"name": "item", "hash_buckets": 100, "embedding_dim": 4},
        {"name": "seen", "kind": "sequence", "table": "item", "embedding_dim": 4, "max_length": 5},
        {"name": "country", "vocabulary": ["de", "fr"]},
    ],
    "tasks": [{"name": "buy", "weight": 2}, {"name": "stars", "type": "regression", "mask": "rated"}],
}
KEYS = {
    "": ["name", "time_column", "time_unit", "dense", "categorical", "tasks", "row_id", "unknown"],
    "dense": ["name", "column", "transform", "scale", "fill_null", "unknown"],
    "categorical": ["name", "column", "kind", "num_embeddings", "hash_buckets", "vocabulary", "embedding_dim"],
    "tasks": ["name", "type", "column", "transform", "scale", "mask", "weight", "at_least"],
}
KEYS["categorical"] += ["max_length", "table"]


@st.composite
def changed_schemas(draw):
    raw = yaml.safe_load(yaml.safe_dump(VALID))
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(sorted(KEYS)))
        target = raw if not part else raw[part][draw(st.integers(0, len(VALID[part]) - 1))] if part in raw else raw
        if not isinstance(target, dict):
            continue
        key = draw(st.sampled_from(KEYS[part]))
        if draw(st.booleans()) or not part:
            target[key] = draw(VALUES)
        else:
            target.pop(key, None)
        if not all(isinstance(raw.get(p), list) and len(raw[p]) == len(VALID[p]) for p in KEYS if p):
            break
    return raw


def clear(error):
    line = str(error)
    assert line
    assert line.isprintable(), repr(line)
    return line


def check_schema(raw):
    try:
        schema = Schema.from_dict(raw, source="schema.yaml")
    except UserError as error:
        clear(error)
        return
    again = yaml.safe_dump(schema.to_dict(), allow_unicode=True)
    assert Schema.from_text(again) == schema


def check_yaml(text):
    try:
        Schema.from_text(text, source="schema.yaml")
    except UserError as error:
        clear(error)


@st.composite
def damaged_yaml(draw):
    text = yaml.safe_dump(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        text = (
            text[:at]
            + draw(st.sampled_from(["", " ", ":", "\n", "[", "{", "&a ", "*a", "!!x ", "- ", "\0", "'"]))
            + text[at + cut :]
        )
    return text


@QUICK
@given(changed_schemas())
def test_a_changed_schema_is_one_or_is_refused(raw):
    check_schema(raw)


@QUICK
@given(damaged_yaml())
def test_a_damaged_schema_file_is_one_or_is_refused(text):
    check_yaml(text)


@pytest.mark.slow
@LONG
@given(changed_schemas())
def test_many_changed_schemas_are_ones_or_are_refused(raw):
    check_schema(raw)


@pytest.mark.slow
@LONG
@given(damaged_yaml() | st.text() | st.binary())
def test_many_damaged_schema_files_are_ones_or_are_refused(text):
    check_yaml(text)


# ---- columns

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
OTHERS = [
    *(pa.null(), pa.bool_(), pa.date32(), pa.timestamp("ns"), pa.binary(), pa.decimal128(9, 2), pa.duration("ms")),
    *(pa.struct([("a", pa.int64())]), pa.dictionary(pa.int8(), pa.int64()), pa.time32("ms")),
]
SINGLE = [*INTEGERS, *TEXTS, *FLOATS, *OTHERS]
ROWS = 6


def values_of(kind, small=False):
    """A strategy of values of an Arrow type. ``small``: such as an id of a small table or a label."""
    if pa.types.is_dictionary(kind):
        return values_of(kind.value_type, small)
    if pa.types.is_integer(kind):
        width = kind.bit_width - (0 if str(kind).startswith("uint") else 1)
        low = 0 if str(kind).startswith("uint") else -(2**width)
        return st.integers(0, 4) if small else st.integers(0, 4) | st.integers(low, 2**width - 1)
    if pa.types.is_floating(kind):
        plain = st.sampled_from([0.0, 1.0, 0.5, 3.0, -2.0])
        return plain if small else plain | st.floats(width=kind.bit_width) | st.sampled_from([math.nan, math.inf])
    others = {
        pa.bool_(): st.booleans(),
        pa.date32(): st.dates(),
        pa.timestamp("ns"): st.integers(0, 2**60),
        pa.duration("ms"): st.integers(0, 2**40),
        pa.time32("ms"): st.integers(0, DAY_MS - 1),
        pa.binary(): st.binary(max_size=3),
        pa.decimal128(9, 2): st.integers(-999, 999).map(lambda i: Decimal(i) / 100),
        pa.struct([("a", pa.int64())]): st.just({"a": 1}),
        pa.null(): st.none(),
    }
    return others.get(kind, st.sampled_from(["de", "fr", "", "é", "3", "a\nb"]))


@st.composite
def columns(draw):
    """An Arrow column of any type, with or without nulls."""
    kind, small = draw(st.sampled_from(SINGLE)), draw(st.booleans())
    item = values_of(kind, small)
    item = item if draw(st.booleans()) else item | st.none()
    listed = draw(
        st.sampled_from(
            [None, None, pa.list_, pa.large_list, lambda k: pa.list_(k, 2), lambda k: pa.list_(pa.list_(k))]
        )
    )
    if listed is not None and not pa.types.is_dictionary(kind):
        kind = listed(kind)
        inner = (
            st.lists(item, min_size=2, max_size=2) if pa.types.is_fixed_size_list(kind) else st.lists(item, max_size=3)
        )
        item = st.lists(inner, max_size=2) if pa.types.is_list(kind) and pa.types.is_list(kind.value_type) else inner
        item = item if draw(st.booleans()) else item | st.none()
    values = draw(st.lists(item, min_size=ROWS, max_size=ROWS))
    return pa.array(values, kind)


IDS = [
    {"num_embeddings": 5},
    {"hash_buckets": 11},
    {"vocabulary": ("de", "fr", "é")},
    {"vocabulary": (3, 1, -7)},
]
NUMBERS = [{}, {"scale": 1e-3, "transform": "log1p"}, {"scale": 1e30}]
ROLES = [
    *((CategoricalFeature, ids | {"kind": kind}) for ids in IDS for kind in ("one_hot", "multi_hot")),
    (CategoricalFeature, {"kind": "sequence", "max_length": 2, "num_embeddings": 5}),
    *((DenseFeature, numbers) for numbers in [*NUMBERS, {"fill_null": 2.0}]),
    *((Task, {"type": "regression", **numbers}) for numbers in NUMBERS),
    (Task, {}),
    (Task, {"at_least": 1.5}),
    (Task, {"mask": "x", "column": "y"}),
    (Task, {"row_id": True}),
]


def outcome(columns, schema):
    """The rows, or the line that refuses them."""
    with tempfile.TemporaryDirectory() as root:
        schema.to_yaml(Path(root) / "schema.yaml")
        pq.write_table(pa.table(columns), Path(root) / "a.parquet", row_group_size=4)
        try:
            log = ParquetLog(root, hold_out=0.2)
            return log.read(0, log.num_rows), ""
        except UserError as error:
            return None, clear(error)


def check_column(column, role):
    kind, options = role
    options = dict(options)
    row_id = "x" if options.pop("row_id", False) else ""
    made = kind(name="x" if not row_id else "y", **options)
    other = DenseFeature(name="d")
    schema = Schema(
        name="s",
        time_column="t",
        row_id=row_id,
        dense=(made,) if kind is DenseFeature else (other,),
        categorical=(made,) if kind is CategoricalFeature else (),
        tasks=(made,) if kind is Task else (Task(name="y"),),
    )
    table = {
        "t": pa.array(START_MS + np.arange(ROWS)),
        "d": pa.array(np.zeros(ROWS)),
        "y": pa.array([0, 1] * (ROWS // 2)),
        "x": column,
    }
    batch, refusal = outcome(table, schema)
    if batch is None:
        assert "'x'" in refusal
        assert not must_be_read(column, made, row_id), refusal
        return
    plain = column.to_pylist()
    if row_id:
        assert batch.row_B.tolist() == plain
    elif kind is DenseFeature:
        wanted = [made.fill_null if value is None else value for value in plain]
        assert batch.dense_BF[:, 0].tolist() == pytest.approx([number(v, made) for v in wanted], rel=1e-6)
    elif kind is CategoricalFeature and made.kind == "one_hot":
        assert batch.onehot_BC[:, 0].tolist() == [row_of(value, made) for value in plain]
    elif kind is CategoricalFeature:
        lists, ends = batch.ragged["x"].values.tolist(), batch.ragged["x"].offsets.tolist()
        kept = slice(-made.max_length, None) if made.max_length else slice(None)
        wanted = [[row_of(value, made) for value in (ids or [])[kept]] for ids in plain]
        assert [lists[a:b] for a, b in pairwise(ends)] == wanted
    elif made.mask:
        assert batch.mask_BT[:, 0].tolist() == [bool(value) for value in plain]
    else:
        assert batch.mask_BT[:, 0].tolist() == [value is not None for value in plain]
        wanted = [0.0 if value is None else label(value, made) for value in plain]
        assert batch.labels_BT[:, 0].tolist() == pytest.approx(wanted, rel=1e-6)


def number(value, made):
    value = np.float32(made.scale) * np.float32(value)
    return math.copysign(math.log1p(abs(value)), value) if made.transform == "log1p" else float(value)


def label(value, made):
    return float(value >= made.at_least) if made.at_least is not None else number(value, made)


def row_of(value, made):
    if value is None:
        return 0
    if made.vocabulary:
        return made.vocabulary.index(value) + 1 if value in made.vocabulary else 0
    if made.num_embeddings:
        assert 0 <= value < made.num_embeddings
        return int(value) + 1
    if isinstance(value, str):
        data = np.frombuffer(value.encode(), dtype=np.uint8)
        return int(hash_bytes(data, np.array([0, len(data)]))[0] % np.uint64(made.hash_buckets)) + 1
    return int(splitmix64(np.array([value], dtype=np.int64))[0] % np.uint64(made.hash_buckets)) + 1


def must_be_read(column, made, row_id):
    """Whether a column is plain enough that refusing it is a fault."""
    kind = column.type
    plain = [value for value in column.to_pylist() if value is not None]
    if row_id or made.__class__ is Task:
        fits = pa.types.is_integer(kind) and all(value in (0, 1) for value in plain)
        return fits and (not row_id or not column.null_count)
    if isinstance(made, DenseFeature):
        numeric = pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64())
        small = all(math.isfinite(value) and abs(value) < 1e6 for value in plain) if numeric else False
        return small and made.scale <= 1 and (made.fill_null is not None or not column.null_count)
    if made.kind != "one_hot":
        return False
    if made.num_embeddings:
        return pa.types.is_integer(kind) and all(0 <= value < made.num_embeddings for value in plain)
    texts = made.vocabulary and isinstance(made.vocabulary[0], str)
    if kind in TEXTS:
        return bool(texts or made.hash_buckets)
    return kind in (pa.int8(), pa.int32(), pa.int64()) and not texts


@QUICK
@given(columns(), st.sampled_from(ROLES))
def test_a_column_is_read_rightly_or_refused(column, role):
    check_column(column, role)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(columns(), st.sampled_from(ROLES))
def test_many_columns_are_read_rightly_or_refused(column, role):
    check_column(column, role)


# ---- times


@st.composite
def time_columns(draw):
    """Times in ms, the same as an Arrow column, and whether they must be read."""
    steps = draw(
        st.lists(st.sampled_from([0, 1000, 60_000, DAY_MS, 40 * DAY_MS]), min_size=ROWS - 1, max_size=ROWS - 1)
    )
    times = START_MS + np.cumsum([0, *steps])
    good = True
    for _ in range(draw(st.sampled_from([0, 0, 1]))):
        at = draw(st.integers(0, ROWS - 1))
        times = times.copy()
        times[at] = draw(st.sampled_from([0, START_MS - DAY_MS, 1_930_000_000_000, 2**55, -(2**60), START_MS * 1000]))
        good = False
    kind = draw(st.sampled_from(["int", "timestamp", "string", "date", "float", "float32", "null", "other"]))
    if kind == "int":
        unit = draw(st.sampled_from(["s", "ms", "us"]))
        factor = {"s": 1000, "ms": 1, "us": 0.001}[unit]
        raw = [int(t // factor) if unit == "s" else int(t) * (1000 if unit == "us" else 1) for t in times.tolist()]
        wanted = [int(t) // 1000 * 1000 if unit == "s" else int(t) for t in times]
        if not all(-(2**63) <= value < 2**63 for value in raw):
            return [0] * ROWS, pa.array([0] * ROWS), unit, False
        return wanted, pa.array(raw), unit, good
    if kind == "timestamp":
        zone = draw(st.sampled_from([None, "UTC", "+03:00"]))
        unit = draw(st.sampled_from(["ms", "us", "ns"]))
        try:
            return (
                times.tolist(),
                pa.array(times).cast(pa.timestamp("ms", zone)).cast(pa.timestamp(unit, zone)),
                "ms",
                good,
            )
        except pa.ArrowInvalid:
            return times.tolist(), pa.array(times).cast(pa.timestamp("ms", zone)), "ms", False
    if kind in ("string", "date") and good:
        moments = [dt.datetime.fromtimestamp(t / 1000, dt.UTC) for t in times.tolist()]
        if kind == "date":
            return [t // DAY_MS * DAY_MS for t in times.tolist()], pa.array([m.date() for m in moments]), "ms", True
        form = draw(st.sampled_from(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S+0000"]))
        texts = [m.strftime(form) for m in moments]
        broken = draw(st.sampled_from([None, None, "soon", "", "2026-13-01", "12:30"]))
        if broken is not None:
            texts[draw(st.integers(0, ROWS - 1))] = broken
        return times.tolist(), pa.array(texts), "ms", broken is None
    if kind == "float":
        raw = times.astype(np.float64) / 1000
        bad = draw(st.sampled_from([None, None, math.nan, math.inf]))
        if bad is not None:
            raw[draw(st.integers(0, ROWS - 1))] = bad
        return times.tolist(), pa.array(raw), "s", good and bad is None
    if kind == "float32":
        return None, pa.array(times.astype(np.float32)), "ms", False
    if kind == "null":
        values = times.tolist()
        values[draw(st.integers(0, ROWS - 1))] = None
        return None, pa.array(values), "ms", False
    return None, draw(st.sampled_from([pa.nulls(ROWS), pa.array([True] * ROWS), pa.array([[1]] * ROWS)])), "ms", False


def check_times(drawn):
    wanted, column, unit, good = drawn
    schema = Schema(name="s", time_column="t", time_unit=unit, dense=(DenseFeature(name="d"),), tasks=(Task(name="y"),))
    table = {"t": column, "d": pa.array(np.zeros(ROWS)), "y": pa.array([0, 1] * (ROWS // 2))}
    batch, refusal = outcome(table, schema)
    if batch is None:
        assert "'t'" in refusal
        assert not good, refusal
        return
    assert wanted is not None
    assert batch.time_ms_B.tolist() == wanted
    assert max(np.diff(wanted)) <= 730 * DAY_MS


@QUICK
@given(time_columns())
def test_times_are_read_rightly_or_refused(drawn):
    check_times(drawn)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(time_columns())
def test_many_times_are_read_rightly_or_refused(drawn):
    check_times(drawn)
