"""`build_optimizer`: names, hyperparameters, groups, and the errors for wrong arguments."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import optim
from optim import registry

CONF = Path(__file__).parents[2] / "conf" / "optim"


def inherited(name: str) -> dict[str, Any]:
    """The values of a file of conf/optim, with those of the files that its defaults list names."""
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    parents, values = content.pop("defaults", ["_self_"]), {}
    for parent in parents:
        values |= content if parent == "_self_" else inherited(parent)
    return values


YAMLS = {path.stem: inherited(path.stem) for path in CONF.glob("[!_]*.yaml")}  # _base.yaml and its like are no options


def methods_by_parameter(optimizer: optim.SigmaOptimizer) -> dict[str, str]:
    return {name: group["method"] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_command_lines_five_names_are_registered() -> None:
    assert {"adagrad", "gc", "agc", "lamb", "clippy"} <= set(optim.list_optimizers())


def test_yaml_names_equal_registry_names() -> None:
    assert sorted(YAMLS) == optim.list_optimizers()
    assert all(content["name"] == stem for stem, content in YAMLS.items())


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_every_yaml_lists_every_hyperparameter_at_its_default(name: str, model: nn.Module) -> None:
    given = {key: value for key, value in YAMLS[name].items() if not key.startswith("_") and key != "name"}
    shared = {"on_nonfinite", "collect_stats", "backend", "embedding", "groups"}
    assert set(given) == {*optim.get_info(name).all_hyperparameters, *shared} - {"lr"}
    from_yaml = optim.build_optimizer(name, model, lr=0.1, **given).param_groups[-1]
    by_default = optim.build_optimizer(name, model, lr=0.1, embedding={}).param_groups[-1]
    if (
        "initial_accumulator_value" in given
    ):  # 0.1 is the paper's; with losses averaged over a batch nothing would adapt
        assert from_yaml.pop("initial_accumulator_value") == 1e-6
        assert by_default.pop("initial_accumulator_value") == 0.1
    assert from_yaml == by_default


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_every_method_steps_every_parameter(name: str, model: nn.Module, backward: Any) -> None:
    optimizer = optim.build_optimizer(name, model, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backward(model)
    optimizer.step()
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        assert not value.equal(before[key]), key


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_every_method_says_where_it_comes_from_and_what_its_hyperparameters_are(name: str) -> None:
    info = optim.get_info(name)
    assert info.reference
    assert info.summary.endswith(".")
    # test_torch_checks.py tests every capability. torch's keyword `foreach` is reported as unsupported, and refused.
    assert [capability for capability, supported in info.supports.items() if not supported] == ["foreach"]
    with pytest.raises(TypeError, match="foreach"):
        optim.build_optimizer(name, [torch.nn.Parameter(torch.ones(2))], lr=0.1, foreach=True)
    for hyperparameter in info.all_hyperparameters.values():
        assert hyperparameter.doc
        assert hyperparameter.range


def test_embeddings_are_found_by_type_and_keep_adagrad(model: nn.Module) -> None:
    optimizer = optim.build_optimizer(
        "clippy", model, lr=0.1, embedding={"method": "adagrad", "initial_accumulator_value": 0.5}
    )
    methods = methods_by_parameter(optimizer)
    assert methods.pop("table.weight") == "adagrad"
    assert set(methods.values()) == {"clippy"}
    assert optimizer.param_groups[0]["initial_accumulator_value"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_embedding_settings_are_not_used_where_there_is_no_embedding() -> None:
    optimizer = optim.build_optimizer("gc", nn.Linear(2, 2), lr=0.1, embedding={"method": "adagrad"})
    assert set(methods_by_parameter(optimizer).values()) == {"gc"}


def test_the_first_pattern_wins_and_every_parameter_is_covered_once(model: nn.Module) -> None:
    groups = [{"pattern": r"^head\.", "method": "adagrad", "lr": 0.3}, {"pattern": "bias", "method": "gc"}]
    optimizer = optim.build_optimizer("agc", model, lr=0.1, groups=groups, embedding={}, clip_factor=0.5)
    assert methods_by_parameter(optimizer) == {
        "head.weight": "adagrad",
        "head.bias": "adagrad",
        "shared.0.bias": "gc",
        "table.weight": "adagrad",
        "shared.0.weight": "agc",
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.1, 0.1]
    assert optimizer.param_groups[-1]["clip_factor"] == 0.5
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())


def test_a_group_of_the_default_method_inherits_its_hyperparameters(model: nn.Module) -> None:
    optimizer = optim.build_optimizer(
        "clippy", model, lr=0.1, lambda_rel=0.2, groups=[{"pattern": "head", "lambda_abs": 0.3}]
    )
    assert [(group["lambda_rel"], group["lambda_abs"]) for group in optimizer.param_groups] == [(0.2, 0.3), (0.2, 0.01)]


def test_tensors_pairs_and_group_dicts_are_taken_as_torch_takes_them() -> None:
    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.ones(2))

    assert optim.build_optimizer("gc", [fresh(), fresh()], lr=1.0).param_groups[0]["param_names"] == [
        "parameter_0",
        "parameter_1",
    ]
    assert optim.build_optimizer("gc", [("a", fresh())], lr=1.0).param_groups[0]["param_names"] == ["a"]
    two = optim.build_optimizer("gc", [{"params": [fresh()]}, {"params": fresh(), "method": "agc"}], lr=1.0)
    assert [group["method"] for group in two.param_groups] == ["gc", "agc"]


def test_an_explicit_argument_overrides_the_preset() -> None:
    parameter = nn.Parameter(torch.ones(2))
    (group,) = optim.build_optimizer("clippy", [parameter], lr=1.0, preset="tfrs", lambda_rel=0.7).param_groups
    assert (group["lambda_rel"], group["lambda_abs"], group["accumulator"]) == (0.7, 1e-7, "delayed")
    (group,) = optim.build_optimizer("clippy", [parameter], lr=1.0).param_groups
    assert (group["lambda_rel"], group["lambda_abs"], group["accumulator"]) == (0.5, 1e-2, "current")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"name": "clipy"}, ValueError, "unknown optimizer 'clipy'; did you mean clippy"),
        ({"lambda_rell": 1.0}, TypeError, "unknown hyperparameter 'lambda_rell'; did you mean lambda_rel"),
        ({"clip_norm": 1.0}, TypeError, "clippy: unknown hyperparameter 'clip_norm'"),
        ({"lambda_rel": -1.0}, ValueError, r"lambda_rel must be in \[0, inf\), got -1.0"),
        ({"lambda_rel": float("nan")}, ValueError, "lambda_rel must be in"),
        ({"lr": -0.1}, ValueError, "lr must be in"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"clip_accumulator": 1}, TypeError, "clip_accumulator must be true or false"),
        ({"accumulator": "late"}, ValueError, "accumulator must be one of current, delayed"),
        ({"preset": "papr"}, ValueError, "preset must be one of paper, tfrs"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of propagate, skip, raise"),
        ({"groups": [{"pattern": "tail"}]}, ValueError, "pattern 'tail' matches none of the 5 parameters"),
        ({"groups": [{"pattern": "head"}, {"pattern": "head"}]}, ValueError, r"groups\[1\]: pattern 'head' matches"),
        ({"groups": [{"pattern": "("}]}, ValueError, "is no regular expression"),
        ({"groups": [{"method": "gc"}]}, ValueError, "needs a pattern"),
        ({"groups": [{"pattern": "head", "method": "agc", "clip": 1}]}, TypeError, "did you mean clip_factor"),
        ({"groups": [{"pattern": "head", "backend": "eager"}]}, TypeError, "belongs to the optimizer as a whole"),
        ({"embedding": {"methd": "gc"}}, TypeError, "unknown hyperparameter 'methd'"),
        ({"embedding": "adagrad"}, TypeError, "embedding: must be a mapping"),
        ({"eps": 0.0, "initial_accumulator_value": 0.0}, ValueError, "a gradient of 0 would give 0 / 0"),
        ({"name": "clippy_adam", "eps": 0.0}, ValueError, "a gradient of 0 would give 0 / 0"),
        ({"lr": np.array([0.1])}, TypeError, "lr must be a number"),
        ({"lr": np.bool_(True)}, TypeError, "lr must be a number"),
        ({"model_or_params": nn.Parameter(torch.ones(2))}, TypeError, "iterable of tensors.*, got a single tensor"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    given: dict[str, Any], kind: type[Exception], message: str, model: nn.Module
) -> None:
    with pytest.raises(kind, match=message) as caught:
        optim.build_optimizer(**{"name": "clippy", "model_or_params": model, "lr": 0.1, **given})
    assert "\n" not in str(caught.value)


def test_patterns_and_embeddings_need_a_module_or_names() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="patterns need names"):
        optim.build_optimizer("gc", [parameter], lr=1.0, groups=[{"pattern": "a"}])
    with pytest.raises(ValueError, match="pass the module itself"):
        optim.build_optimizer("gc", [parameter], lr=1.0, embedding={})


def test_a_parameter_in_two_groups_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.build_optimizer("gc", [{"params": [parameter]}, {"params": [parameter]}], lr=1.0)


def test_complex_and_integer_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="real floating-point"):
        optim.build_optimizer("gc", [nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=1.0)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(1)], ids=repr)
def test_numpy_scalars_are_numbers(number: Any) -> None:
    (group,) = optim.build_optimizer("clippy", [nn.Parameter(torch.ones(2))], lr=number, lambda_rel=number).param_groups
    assert (type(group["lr"]), group["lr"]) == (float, float(number))
    assert group["lambda_rel"] == float(number)


def test_a_group_that_is_no_dict_is_refused_as_torch_refuses_it() -> None:
    optimizer = optim.build_optimizer("clippy", [nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        optimizer.add_param_group([nn.Parameter(torch.ones(2))])  # type: ignore[arg-type]


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("_own_registry")
def test_third_parties_register_a_rule_by_decorator(step_once: Any) -> None:
    @optim.register_rule(
        "half", summary="Half.", reference="-", update=optim.get_info("gc").update, reductions=(optim.GRAD_NORM,)
    )
    def half(reduced: Any, _settings: Any) -> torch.Tensor:
        return torch.full_like(reduced["grad_norm"], 0.5)

    _, optimizer = step_once("half", torch.ones(3), torch.ones(3), lr=0.1)
    assert optimizer.clip_stats()["w"]["sigma"] == 0.5
    with pytest.raises(ValueError, match="'half' is already registered"):
        optim.register_rule("half", summary="", reference="", update=optim.get_info("gc").update)(half)


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_rule_of_a_third_party_says_in_its_fields_all_that_the_engine_must_know(step_once: Any, backend: str) -> None:
    optim.register(
        optim.Method(
            name="trim",
            summary="The largest r is held below 0.5.",
            reference="-",
            update=optim.get_info("gc").update,
            sigma=lambda reduced, _settings: (0.5 / reduced["update_max"]).clamp(max=1.0),
            reductions=(optim.UPDATE_MAX,),
            limiting=optim.UPDATE_MAX,
            terms=lambda at, _settings: {"relative": at.weight * 0, "absolute": torch.ones_like(at.weight)},
            feeds_clipped=lambda _settings: True,
        )
    )
    grad = torch.tensor([0.1, 3.0, 1.0])
    _, optimizer = step_once("trim", torch.ones(3), grad, lr=0.1, backend=backend)
    row = optimizer.clip_stats()["w"]
    sigma = 0.5 / (3.0 / (0.1 + 9.0) ** 0.5)
    assert row["sigma"] == pytest.approx(sigma)
    assert (row["coordinate"], row["term"]) == (1, "absolute")
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["sum"], 0.1 + (sigma * grad) ** 2)


@pytest.mark.usefixtures("_own_registry")
def test_third_parties_register_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point(EntryPoint):
        def load(self) -> Any:
            optim.register(
                optim.Method(name="elsewhere", summary=".", reference="-", update=optim.get_info("gc").update)
            )

    def points(group: str, name: str | None = None) -> list[EntryPoint]:
        point = Point(name="elsewhere", value="somewhere:thing", group=group)
        return [point] if name in (None, "elsewhere") else []

    monkeypatch.setattr(registry, "entry_points", points)
    assert "elsewhere" in optim.list_optimizers()
    assert optim.get_info("elsewhere").name == "elsewhere"


def test_importing_optim_imports_torch_and_the_standard_library_alone() -> None:
    sources = Path(optim.__file__).parent.rglob("*.py")
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    found = {name for path in sources for name in pattern.findall(path.read_text())}
    assert found <= {*sys.stdlib_module_names, "torch", "optim"}
