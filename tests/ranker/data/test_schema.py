from __future__ import annotations

import dataclasses

import pytest

from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError

PLAIN = {
    "name": "shop",
    "time_column": "ts",
    "time_unit": "s",
    "row_id": "row",
    "dense": [{"name": "price", "transform": "log1p", "scale": 0.01, "fill_null": 0}],
    "categorical": [
        {"name": "item", "column": "item_id", "hash_buckets": 100, "embedding_dim": 4},
        {"name": "seen", "kind": "sequence", "table": "item", "embedding_dim": 4, "max_length": 5},
        {"name": "country", "vocabulary": ["de", "fr"]},
    ],
    "tasks": [
        {"name": "buy", "weight": 2},
        {"name": "stars", "type": "regression", "mask": "rated"},
    ],
}


def changed(**parts):
    return {**PLAIN, **parts}


def test_a_schema_file_comes_back_as_it_was_written(tmp_path):
    schema = Schema.from_dict(PLAIN)
    schema.to_yaml(tmp_path / "schema.yaml")
    assert Schema.from_yaml(tmp_path / "schema.yaml") == schema
    assert Schema.from_dict(schema.to_dict()) == schema


def test_columns_default_to_names_and_are_listed_once():
    schema = Schema.from_dict(PLAIN)
    assert schema.columns() == ["ts", "row", "price", "item_id", "seen", "country", "buy", "stars", "rated"]
    assert [f.name for f in schema.one_hot] == ["item", "country"]
    assert [f.name for f in schema.ragged] == ["seen"]


def test_a_table_has_a_row_for_the_unknown_and_sharers_have_none():
    schema = Schema.from_dict(PLAIN)
    assert [f.rows for f in schema.categorical] == [101, 0, 3]
    assert schema.table_of(schema.categorical[1]) is schema.categorical[0]


def test_tasks_and_features_can_be_chosen():
    schema = Schema.from_dict(PLAIN)
    assert schema.select(tasks=["stars"]).task_names == ["stars"]
    assert schema.select(features=["price", "item"]).feature_names == ["price", "item"]
    assert schema.select(drop_features=["seen"]).feature_names == ["price", "item", "country"]
    assert schema.select() == schema


def test_a_sharer_takes_the_table_over_when_its_owner_is_left_out():
    schema = Schema.from_dict(PLAIN).select(drop_features=["item"])
    seen = schema.categorical[0]
    assert (seen.name, seen.column, seen.kind, seen.max_length) == ("seen", "seen", "sequence", 5)
    assert (seen.hash_buckets, seen.table) == (100, "")


def test_a_second_sharer_follows_the_first():
    more = [*PLAIN["categorical"], {"name": "liked", "kind": "multi_hot", "table": "item", "embedding_dim": 4}]
    schema = Schema.from_dict(changed(categorical=more)).select(drop_features=["item"])
    assert schema.table_of(schema.categorical[-1]).name == "seen"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "a schema is a mapping"),
        (changed(dens=[]), "unknown key 'dens'; did you mean 'dense'"),
        ({k: v for k, v in PLAIN.items() if k != "time_column"}, "'time_column' is missing"),
        (changed(time_unit="min"), "time_unit 'min' is unknown"),
        (changed(tasks=[]), "no task"),
        (changed(dense=[], categorical=[]), "no feature"),
        (changed(tasks="buy"), "'tasks' must be a list"),
        (changed(tasks=["buy"]), r"tasks\[0\]: expected a mapping"),
        (changed(tasks=[{"name": "buy", "typ": "binary"}]), r"tasks\[0\]: unknown key 'typ'; did you mean 'type'"),
        (changed(tasks=[{"name": "buy"}, {"name": "buy"}]), "two tasks are called 'buy'"),
        (changed(tasks=[{"name": "a/b"}]), "must not hold"),
        (changed(tasks=[{"name": "buy", "weight": 0}]), "weight must be above 0"),
        (changed(tasks=[{"name": "buy", "weight": "2"}]), "weight must be float"),
        (changed(tasks=[{"name": "buy", "weight": True}]), "weight must be float"),
        (changed(tasks=[{"name": "buy", "transform": "log1p"}]), "use at_least on a binary task"),
        (changed(tasks=[{"name": "s", "type": "regression", "at_least": 4}]), "at_least is for binary"),
        (changed(dense=[{"name": "price", "transform": "sqrt"}]), "transform 'sqrt' is unknown"),
        (changed(dense=[{"name": "item"}]), "two features are called 'item'"),
        (changed(categorical=[{"name": "c"}]), "give exactly one of num_embeddings"),
        (changed(categorical=[{"name": "c", "hash_buckets": 5, "num_embeddings": 5}]), "give exactly one of"),
        (changed(categorical=[{"name": "c", "hash_buckets": 5, "kind": "bag"}]), "kind 'bag' is unknown"),
        (
            changed(categorical=[{"name": "c", "hash_buckets": 5, "embedding_dim": 0}]),
            "embedding_dim must be at least 1",
        ),
        (changed(categorical=[{"name": "c", "table": "itme"}]), "table 'itme' is no feature"),
        (
            changed(categorical=[*PLAIN["categorical"], {"name": "c", "table": "item", "embedding_dim": 9}]),
            "embedding_dim differs from that of 'item'",
        ),
    ],
)
def test_a_wrong_schema_is_refused_in_one_line(raw, message):
    with pytest.raises(UserError, match=message) as caught:
        Schema.from_dict(raw, source="schema.yaml")
    assert "\n" not in str(caught.value)


def test_an_unknown_choice_names_the_nearest():
    schema = Schema.from_dict(PLAIN)
    with pytest.raises(UserError, match="no task 'buys'; did you mean 'buy'"):
        schema.select(tasks=["buys"])
    with pytest.raises(UserError, match="no feature 'prise'; did you mean 'price'"):
        schema.select(drop_features=["prise"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no schema at .*schema\.yaml"):
        Schema.from_yaml(tmp_path / "schema.yaml")
    (tmp_path / "schema.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match=r"schema\.yaml is not YAML") as caught:
        Schema.from_yaml(tmp_path / "schema.yaml")
    assert "\n" not in str(caught.value)


def test_parts_are_immutable():
    schema = Schema(
        name="s",
        time_column="t",
        dense=(DenseFeature(name="x"),),
        categorical=(CategoricalFeature(name="c", vocabulary=["a"]),),
        tasks=(Task(name="y"),),
    )
    assert hash(schema)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.tasks[0].weight = 3


def categorical(**parts):
    return changed(categorical=[{"name": "c", **parts}])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (categorical(vocabulary="de"), r"vocabulary must be a list, such as \[de, fr\], got 'de'"),
        (categorical(vocabulary={"de": 1}), "vocabulary must be a list"),
        (categorical(vocabulary=5), "vocabulary must be a list"),
        (categorical(vocabulary=[0.5, 1]), "0.5 is neither a string nor an integer"),
        (
            categorical(vocabulary=["de", False]),
            "False is a boolean, as YAML reads no, NO, on and yes; put it in quotes",
        ),
        (categorical(vocabulary=["de", None]), "None is neither a string"),
        (categorical(vocabulary=["de", 5]), "holds strings and integers"),
        (categorical(vocabulary=["de", "fr", "de"]), "holds 'de' twice"),
        (categorical(vocabulary=[2**63]), "does not fit 64 bits"),
        (categorical(hash_buckets=-3), "hash_buckets must be 0"),
        (categorical(num_embeddings=-3), "num_embeddings must be 0"),
        (categorical(hash_buckets=10**40), "hash_buckets must fit 64 bits"),
        (categorical(hash_buckets=5, kind="sequence", max_length=-2), "max_length must be 0"),
        (categorical(hash_buckets=5, max_length=2), "max_length is for lists"),
        (categorical(hash_buckets=2.5), "hash_buckets must be int"),
        (changed(dense=[{"name": "x", "scale": 0}]), "scale must be a number other than 0"),
        (changed(dense=[{"name": "x", "scale": float("nan")}]), "scale must be a number other than 0"),
        (changed(dense=[{"name": "x", "scale": 1e300}]), "scale must be a number other than 0"),
        (changed(dense=[{"name": "x", "scale": "1e-3"}]), "write it without quotes, and 1e-3 as 1.0e-3"),
        (changed(dense=[{"name": "x", "fill_null": float("nan")}]), "fill_null must be a number that fits float32"),
        (changed(dense=[{"name": "x", "fill_null": 1e39}]), "fill_null must be a number that fits float32"),
        (changed(tasks=[{"name": "y", "at_least": float("inf")}]), "at_least must be a number"),
        (changed(tasks=[{"name": "y", "weight": float("nan")}]), "weight must be above 0"),
        (changed(tasks=[{"name": "y", "type": "regression", "scale": 0}]), "scale must be a number other than 0"),
        (changed(tasks=[{"name": " "}]), "a task has no name"),
        (changed(tasks=[{"name": "a\nb"}]), "must be one line of printable characters"),
        (changed(tasks=[{"name": False}]), "name must be str, got False; put it in quotes"),
        (changed(time_column=""), "time_column is empty"),
    ],
)
def test_a_value_that_would_be_misread_later_is_refused_by_name(raw, message):
    with pytest.raises(UserError, match=message) as caught:
        Schema.from_dict(raw, source="schema.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ntime_column: t\nname: b", "key 'name' occurs twice, in line 3 again"),
        ("tasks:\n- {name: y, scale: 1.0, scale: 2.0}", "key 'scale' occurs twice"),
        ("? [a, b]\n: c", "a key must be a word"),
        ("name: 2026-02-30", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("a: &x [*x]", "is not YAML|a schema is|unknown key"),
        ("name: " + "9" * 5000, "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_yaml_that_is_ambiguous_or_broken_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        Schema.from_text(text, source="schema.yaml")
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_one_line_whatever_it_is():
    with pytest.raises(UserError, match=r"dense\[0\]: unknown key 'a\\nb'; known: ") as caught:
        Schema.from_dict({"name": "shop", "dense": [{"a\nb": 1}]})
    assert str(caught.value).isprintable()


def test_merged_keys_may_be_overridden():
    text = "defaults: &d {name: x, scale: 2.0}\ndense: [{<<: *d, scale: 3.0}]"
    with pytest.raises(UserError, match="unknown key 'defaults'"):  # but not: key 'scale' occurs twice
        Schema.from_text(text)


def test_a_label_or_mask_among_the_features_is_named():
    tasks = [{"name": "buy", "column": "price"}, {"name": "stars", "type": "regression", "mask": "country"}]
    price, country = Schema.from_dict(changed(tasks=tasks)).label_features()
    assert "column 'price' is the label of task 'buy' and feature 'price'" in price
    assert "column 'country' is the mask of task 'stars'" in country
    assert "data.drop_features=[country]" in country
    assert list(Schema.from_dict(PLAIN).label_features()) == []
