"""Exported programs give the outputs of the eager model, for every model and any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ranker.data.batch import Batch, Ragged
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.export.program import Served, Signature, to_onnx, to_program
from ranker.export.program_runtime import difference, open_program
from ranker.models import PLE, MMoE, Ranker, SharedBottom
from ranker.models.ranker_base import head_key

SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"), DenseFeature(name="y", transform="log1p", scale=2.0, fill_null=1.0)),
    categorical=(
        CategoricalFeature(name="user", num_embeddings=4, embedding_dim=2),
        CategoricalFeature(name="tags", kind="multi_hot", num_embeddings=3, embedding_dim=3),
        CategoricalFeature(name="item", hash_buckets=5, embedding_dim=3),
        CategoricalFeature(name="seen", kind="sequence", table="item", max_length=7, embedding_dim=3),
    ),
    tasks=(Task(name="click"), Task(name="watch", type="regression", transform="log1p", scale=0.5)),
)
MODELS: dict[str, Callable[[Schema], Ranker]] = {
    "small": lambda schema: SharedBottom(schema, hidden=[6, 5]),
    "large": lambda schema: SharedBottom(schema, hidden=[6, 5, 4, 4], sparse_embeddings=True),
    "large_dcn": lambda schema: SharedBottom(schema, hidden=[6, 5], cross_layers=1),
    "moe": lambda schema: MMoE(schema, experts=2, expert_hidden=[5]),
    "ple": lambda schema: PLE(schema, shared_experts=1, task_experts=1, expert_hidden=[4], levels=2),
}
STATISTICS = DenseStatistics(10, np.array([0.3, -0.7]), np.array([4.0, 0.0]))  # y never varied: its spread is 1


def made(schema: Schema, rows: int, *, longest: int = 4, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ragged = {}
    for feature in schema.ragged:
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        offsets[1:] = torch.randint(0, longest, (rows,), generator=draw).cumsum(0)
        size = schema.table_of(feature).rows
        ragged[feature.name] = Ragged(torch.randint(size, (int(offsets[-1]),), generator=draw), offsets)
    one_hot = [torch.randint(schema.table_of(f).rows, (rows,), generator=draw) for f in schema.one_hot]
    labels_BT = torch.zeros(rows, len(schema.tasks))
    return Batch(
        dense_BF=torch.randn(rows, len(schema.dense), generator=draw),
        onehot_BC=torch.stack(one_hot, 1) if one_hot else torch.zeros(rows, 0, dtype=torch.int64),
        ragged=ragged,
        labels_BT=labels_BT,
        mask_BT=labels_BT.bool(),
        time_ms_B=torch.arange(rows),
        row_B=torch.arange(rows),
    )


def served_model(build: Callable[[Schema], Ranker], schema: Schema, statistics: DenseStatistics = NOTHING) -> Served:
    torch.manual_seed(0)
    return Served(build(schema).eval().requires_grad_(False), schema=schema, statistics=statistics)


def assert_agrees(path: Path, served: Served, statistics: DenseStatistics, *, at_most: float) -> None:
    schema = served.signature.schema
    engine = open_program(path, schema=schema)
    for rows, longest in ((37, 4), (1, 4), (1, 1), (5, 1)):  # longest 1: all lists are empty
        batch = made(schema, rows, longest=longest, seed=rows)
        assert difference(engine, served, served.net, batch, statistics) <= at_most, (rows, longest)


# Other tests of the default suite export a small model (below) and cross layers (tests/command_line/test_export.py).
@pytest.mark.parametrize(
    "model", [pytest.param(x, marks=pytest.mark.slow if x in ("small", "large_dcn") else ()) for x in MODELS]
)
def test_a_torch_program_agrees_at_any_size(model: str, tmp_path: Path) -> None:
    served = served_model(MODELS[model], SCHEMA, STATISTICS)
    torch.export.save(to_program(served), tmp_path / "model.pt2")

    assert_agrees(tmp_path / "model.pt2", served, STATISTICS, at_most=1e-6)


@pytest.mark.slow  # the default suite has an ONNX program in tests/command_line/test_export.py
@pytest.mark.parametrize("model", MODELS)
def test_an_onnx_program_agrees_at_any_size(model: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    served = served_model(MODELS[model], SCHEMA, STATISTICS)
    to_onnx(to_program(served), served, tmp_path / "model.onnx")

    assert_agrees(tmp_path / "model.onnx", served, STATISTICS, at_most=1e-5)


@pytest.mark.parametrize("kept", [["x"], ["user"], ["tags"]])
def test_a_schema_of_one_kind_of_feature_exports(kept: list[str], tmp_path: Path) -> None:
    schema = SCHEMA.select(features=kept)
    served = served_model(MODELS["small"], schema)
    torch.export.save(to_program(served), tmp_path / "model.pt2")

    assert_agrees(tmp_path / "model.pt2", served, NOTHING, at_most=1e-6)


def test_names_need_not_be_those_of_a_program(tmp_path: Path) -> None:
    plain = SCHEMA.to_dict()
    plain["tasks"][0]["name"], plain["categorical"][1]["name"] = "add-to-cart: is it (ü)?", "tags of-1 'item'"
    schema = Schema.from_dict(plain, source="here")
    served = served_model(MODELS["small"], schema)
    torch.export.save(to_program(served), tmp_path / "model.pt2")

    assert_agrees(tmp_path / "model.pt2", served, NOTHING, at_most=1e-6)
    assert head_key("click_2") == "task_click_2"


def test_scores_are_probabilities_and_values_in_the_labels_own_unit() -> None:
    logits_BT = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]])

    scores_BT = served_model(MODELS["small"], SCHEMA).scores(logits_BT)

    # watch was trained on log1p(0.5 * seconds), signed.
    value = (np.e**2 - 1) / 0.5
    wanted = [[0.5, 0.0], [1 / (1 + np.exp(-1)), value], [1 / (1 + np.e), -value]]
    torch.testing.assert_close(scores_BT, torch.tensor(wanted, dtype=torch.float32))


def test_a_program_that_says_something_else_does_not_agree(tmp_path: Path) -> None:
    served = served_model(MODELS["small"], SCHEMA)
    torch.export.save(to_program(served), tmp_path / "model.pt2")
    engine = open_program(tmp_path / "model.pt2", schema=SCHEMA)
    served.net.heads.linear[head_key("watch")].bias += 0.01

    assert difference(engine, served, served.net, made(SCHEMA, 9), NOTHING) > 1e-3


def test_inputs_and_batch_are_two_forms_of_the_same() -> None:
    batch = made(SCHEMA, 6)
    signature = Signature(SCHEMA)

    again = signature.batch(signature.flatten(batch))

    assert signature.names == ["dense", "onehot", "tags.values", "tags.offsets", "seen.values", "seen.offsets"]
    assert torch.equal(again.dense_BF, batch.dense_BF)
    assert torch.equal(again.onehot_BC, batch.onehot_BC)
    assert torch.equal(again.ragged["seen"].values, batch.ragged["seen"].values)
    assert len(again) == len(batch) == 6


def test_the_description_tells_a_foreign_server_all_it_needs() -> None:
    told = Signature(SCHEMA).describe()

    inputs = {entry["name"]: entry for entry in told["inputs"]}
    assert inputs["tags.offsets"]["shape"] == ["rows + 1"]
    assert inputs["dense"]["columns"][1]["value"] == "sign(y) * log1p(|y|) with y = x * 2"
    assert inputs["onehot"]["columns"][1]["rows"] == 6  # five buckets and the row for null
    assert "last 7 ids" in inputs["seen.values"]["columns"][0]["value"]
    assert told["tasks"][1]["score"].endswith("sign(logit) * expm1(|logit|) / 0.5")


def test_torch_has_the_private_setting_that_allows_programs_for_one_row() -> None:
    from torch.fx.experimental import _config

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        pytest.skip("torch before 2.7 does not check sizes at run time")
    assert hasattr(_config, "backed_size_oblivious"), "torch renamed it: adapt _any_size in ranker/export/program.py"
