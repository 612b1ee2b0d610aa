"""A program file of somebody else is refused before anything in it runs; torch.export.load runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranker.data.dense_statistics import NOTHING
from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task
from ranker.errors import UserError
from ranker.export.checked_archive import load_program, load_weights
from ranker.export.program import Served, to_program
from ranker.models import SharedBottom

SCHEMA = Schema(
    name="toy",
    time_column="t",
    dense=(DenseFeature(name="x"),),
    categorical=(CategoricalFeature(name="user", num_embeddings=4, embedding_dim=2),),
    tasks=(Task(name="click"),),
)
MODEL = "models/model.json"
PICKLED = {"is_param": False, "use_pickle": True, "tensor_meta": None}
CONSTANTS = "data/constants/model_constants_config.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model.pt2"
    served = Served(SharedBottom(SCHEMA, hidden=[3]), schema=SCHEMA, statistics=NOTHING)
    torch.export.save(to_program(served), path)
    return path


class Odd(torch.nn.Module):
    """Weights that are tied, strided, a part of a larger tensor, empty, of other types, and without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(3000, 2)
        self.first = self.second = torch.nn.Linear(2, 2)
        self.register_buffer("turned", torch.rand(2, 3).double().t())
        self.register_buffer("part", torch.arange(5)[2:4])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("one", torch.tensor(True))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        extra = self.turned.sum() + self.part.sum() + self.empty.sum() + self.one
        return self.second(self.first(self.table(ids))) + extra


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "model.pt2"
    torch.export.save(torch.export.export(Odd(), (torch.tensor([1, 2]),)), path)
    return path


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def pickled(folder: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"x": Payload(folder)}, content)
    return content.getvalue()


def rewritten(sound: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(sound) as archive:
        root = archive.namelist()[0].split("/")[0]
        members = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
    return target


def in_model(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    """A change of the graph's JSON."""

    def act(members: dict[str, bytes]) -> None:
        program = json.loads(members[MODEL])
        change(program)
        members[MODEL] = json.dumps(program).encode()

    return act


def first_size(node: Any) -> dict[str, Any]:
    """The first symbolic size of a program."""
    if isinstance(node, dict) and "expr_str" in node:
        return node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        with contextlib.suppress(LookupError):
            return first_size(part)
    raise LookupError


def attacks(folder: Path) -> dict[str, Callable[[dict[str, bytes]], None]]:
    """By name: changes of an archive that make torch create a folder when it loads the file."""
    mkdir = f"__import__('os').mkdir({str(folder)!r})"

    def example(members: dict[str, bytes]) -> None:
        members["data/sample_inputs/model.pt"] = pickled(folder)

    def weight(members: dict[str, bytes]) -> None:
        members["data/weights/model.pt"] = pickled(folder)

    def opaque(members: dict[str, bytes]) -> None:
        config = json.loads(members[CONSTANTS])
        config["config"]["x"] = {"path_name": "opaque_obj_0"} | PICKLED
        members[CONSTANTS] = json.dumps(config).encode()
        members["data/constants/opaque_obj_0"] = pickle.dumps(Payload(folder))

    def constant(members: dict[str, bytes]) -> None:
        config = json.loads(members[CONSTANTS])
        config["config"]["x"] = {"path_name": "tensor_9"} | PICKLED
        members[CONSTANTS] = json.dumps(config).encode()
        members["data/constants/tensor_9"] = pickled(folder)

    def size(program: dict[str, Any]) -> None:
        first_size(program)["expr_str"] = mkdir

    return {
        "pickled example": example,
        "pickled weights": weight,
        "pickled object": opaque,
        "pickled constant": constant,
        "evaluated size": in_model(size),
    }


def test_a_program_of_our_own_loads(sound: Path) -> None:
    found = load_program(sound)({"dense": torch.zeros(2, 1), "onehot": torch.zeros(2, 1, dtype=torch.int64)})

    assert found["scores"].shape == (2, 1)


def pickle_weights(members: dict[str, bytes]) -> None:
    """The weights as torch 2.8 writes them."""
    content, served = io.BytesIO(), members.pop("data/weights/model_weights_config.json")
    state = {}
    for name, payload in json.loads(served)["config"].items():
        raw = members[f"data/weights/{payload['path_name']}"]
        sizes = [number["as_int"] for number in payload["tensor_meta"]["sizes"]]
        state[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(sizes)
    torch.save(state, content)
    members["data/weights/model.pt"] = content.getvalue()


def as_it_was(members: dict[str, bytes]) -> None:
    """No change, but in the new archive weights lie at odd places."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "change"), [("odd", None), ("odd", as_it_was), ("sound", None), ("sound", pickle_weights)]
)
def test_weights_are_those_of_the_program(
    request: pytest.FixtureRequest, tmp_path: Path, made: str, change: Callable[[dict[str, bytes]], None] | None
) -> None:
    path: Path = request.getfixturevalue(made)
    expected = load_program(path).state_dict()

    found = load_weights(path if change is None else rewritten(path, tmp_path / "x.pt2", change))

    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads /proc")
@pytest.mark.filterwarnings("ignore")
def test_weights_stay_in_the_file(odd: Path) -> None:
    found = load_weights(odd)

    at = found["table.weight"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= at < high:
            assert line.endswith(str(odd))
            return
    raise AssertionError("the weights are nowhere")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_an_attack_that_torch_falls_for_is_refused(sound: Path, tmp_path: Path, name: str) -> None:
    hostile = rewritten(sound, tmp_path / "hostile.pt2", attacks(tmp_path / "owned")[name])

    for load in (load_program, load_weights):
        with pytest.raises(UserError, match=r"is refused: .*nothing of it was loaded"):
            load(hostile)

    assert not (tmp_path / "owned").exists()
    with contextlib.suppress(Exception):  # the payload has run before torch notices that something is wrong
        torch.export.load(hostile).module()
    assert (tmp_path / "owned").exists(), "the attack itself does not work, so that this test shows nothing"


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.update({"data/aotinductor/model/x.so": b""}),
        lambda members: members.update({"extra/x": b""}),
        in_model(put("target", "torch.load")),
        in_model(put("target", "torch.ops.load_library")),
        in_model(put("target", "torch.ops.aten.from_file.default")),
        in_model(put("target", "torch.ops.aten._resize_output_.default")),
        in_model(put("target", "_operator.methodcaller")),
        in_model(put("target", "math.sqrt")),
        in_model(put("metadata", {"from_node": "[]"})),
        in_model(put("name", "x y")),
        in_model(
            lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}]'
            )
        ),
        in_model(
            lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "builtins.dict", "context": "{\\"__enum__\\": true}", "children_spec": []}]'
            )
        ),
    ],
)
def test_what_no_program_of_ours_holds_is_refused(sound: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(UserError, match="is refused"):
        load_program(rewritten(sound, tmp_path / "odd.pt2", change))


def test_the_format_of_older_versions_is_not_tried(sound: Path, tmp_path: Path) -> None:
    """torch.export.load reads it where the present format fails, and unpickles."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", pickled(tmp_path / "owned"))

    with pytest.raises(Exception, match=r".+"):
        load_program(path)

    assert not (tmp_path / "owned").exists()
