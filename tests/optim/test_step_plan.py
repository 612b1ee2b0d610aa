"""The plan that a step keeps for the next one: it must never be seen, but for the time it saves."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optim
from optim.native import plan
from optim.native.backend import NATIVE

pytestmark = pytest.mark.skipif(not optim.native.backend.is_available(), reason="no C compiler")

SHAPES = ((6, 5), (6,), (40, 4), (1,))


class Scene:
    """An optimizer over a few tensors, whose gradients are the same for every scene."""

    def __init__(self, name: str = "clippy", *, plans: bool = True, **given: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator) / 10) for shape in SHAPES]
        self.more = {"collect_stats": True, "lr": 0.3, "initial_accumulator_value": 1e-4, **given}
        self.optimizer = self.made(name)
        self.plans = plans
        self.generator = torch.Generator().manual_seed(1)
        self.sparse = False
        self.renewed: list[bool] = []

    def made(self, name: str) -> optim.SigmaOptimizer:
        if not isinstance(optim.get_info(name).update, optim.updates.Adagrad):
            self.more.pop("initial_accumulator_value", None)
        return optim.build_optimizer(name, [(f"p{k}", p) for k, p in enumerate(self.params)], **self.more)

    def gradients(self) -> None:
        for place, param in enumerate(self.params):
            grad = torch.randn(SHAPES[place], generator=self.generator).to(param.dtype)
            if place == 2 and self.sparse:
                rows = torch.randint(0, 40, (7,), generator=self.generator)
                grad = torch.sparse_coo_tensor(rows[None], grad[:7], SHAPES[place], check_invariants=True)
            param.grad = None
            param.grad = grad

    def step(self) -> None:
        before = self.optimizer._plan
        if not self.plans:
            self.optimizer._plan = None
        self.optimizer.step()
        self.renewed.append(before is not None and self.optimizer._plan is before)

    def outcome(self) -> list[torch.Tensor]:
        kept = [self.optimizer.state[p] for p in self.params]
        return [p.detach() for p in self.params] + [value for state in kept for value in state.values()]


def _nothing(_scene: Scene) -> None:
    pass


def _new_memory(scene: Scene) -> None:
    scene.params[1].data = scene.params[1].data.clone()


def _other_strides(scene: Scene) -> None:
    """The same memory and shape."""
    weight = scene.params[0]
    weight.data = weight.data.view(5, 6).t() if weight.is_contiguous() else weight.data.t().view(6, 5)


def _double(scene: Scene) -> None:
    scene.params[1].data = scene.params[1].data.double()
    scene.params[1].grad = scene.params[1].grad.double()  # type: ignore[union-attr]
    del scene.optimizer.state[scene.params[1]]


def _no_gradient(scene: Scene) -> None:
    scene.params[1].grad = None


def _loaded(scene: Scene) -> None:
    saved = copy.deepcopy(scene.optimizer.state_dict())
    for state in saved["state"].values():
        state["sum"] += 0.5
    scene.optimizer.load_state_dict(saved)


def _forgotten(scene: Scene) -> None:
    del scene.optimizer.state[scene.params[2]]


def _given_state(scene: Scene) -> None:
    scene.optimizer.state[scene.params[2]]["sum"] = torch.full((40, 4), 0.25)


def _in_place(scene: Scene) -> None:
    scene.optimizer.state[scene.params[2]]["sum"].fill_(0.25)
    scene.params[0].data.mul_(2)


def _another_method(scene: Scene) -> None:
    group = scene.optimizer.param_groups[0]
    group.update(optim.get_info("gc").resolve({"lr": 0.1}, "here"), method="gc")


def _another_form(scene: Scene) -> None:
    scene.optimizer.param_groups[0]["accumulator"] = "delayed"


def _learning_rate(scene: Scene) -> None:
    scene.optimizer.param_groups[0]["lr"] = 0.001


def _no_rate(scene: Scene) -> None:
    scene.optimizer.param_groups[0]["lr"] = 0.0


def _strided_gradient(scene: Scene) -> None:
    scene.params[0].grad = torch.ones(5, 6).t()


def _row_forgotten(scene: Scene) -> None:
    del scene.optimizer.state[scene.params[0]]["clip_stats"]


def _row_of_float32(scene: Scene) -> None:
    state = scene.optimizer.state[scene.params[0]]
    state["clip_stats"] = state["clip_stats"].float()


def _without_stats(scene: Scene) -> None:
    scene.optimizer.collect_stats = not scene.optimizer.collect_stats


def _eager(scene: Scene) -> None:
    scene.optimizer.defaults["backend"] = "eager"


def _sparse(scene: Scene) -> None:
    scene.sparse = True


def _not_finite(scene: Scene) -> None:
    scene.params[0].grad[0, 0] = torch.nan  # type: ignore[index]


def _group_added(scene: Scene) -> None:
    if len(scene.optimizer.param_groups) == 1:
        late = nn.Parameter(torch.ones(3))
        scene.optimizer.add_param_group({"params": [late], "method": "adagrad"})
        late.grad = torch.ones(3)


CHANGES = [
    _nothing,
    _new_memory,
    _other_strides,
    _double,
    _no_gradient,
    _loaded,
    _forgotten,
    _given_state,
    _in_place,
    _another_method,
    _another_form,
    _learning_rate,
    _no_rate,
    _strided_gradient,
    _row_forgotten,
    _row_of_float32,
    _without_stats,
    _eager,
    _sparse,
    _not_finite,
    _group_added,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_steps_are_those_without_a_plan_whatever_changes_between_them(
    change: Callable[[Scene], None], policy: str
) -> None:
    """Each change comes twice, with undisturbed steps before, between and after."""
    scenes = [Scene(plans=plans, on_nonfinite=policy) for plans in (True, False)]
    for scene in scenes:
        for number in range(8):
            scene.gradients()
            if number in (2, 5):
                change(scene)
            scene.step()
    for one, other in zip(*(scene.outcome() for scene in scenes), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert not any(scenes[1].renewed)
    if change is not _eager:
        assert scenes[0].renewed[1], "the second step takes over the plan of the first"


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_a_plan_is_kept_by_every_method_that_c_steps(name: str) -> None:
    scene, other = Scene(name), Scene(name, plans=False)
    for each in (scene, other):
        for _ in range(4):
            each.gradients()
            each.step()
    scene.gradients()
    native = all(NATIVE.takes(local) for local in scene.optimizer.gather())
    assert scene.renewed == [False, native, native, native]
    for one, two in zip(scene.outcome(), other.outcome(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_tables_with_sparse_gradients_stay_in_the_plan() -> None:
    scene = Scene()
    scene.sparse = True
    for _ in range(4):
        scene.gradients()
        scene.step()
    assert scene.renewed == [False, True, True, True]


def test_a_size_that_no_longer_fits_is_refused_as_without_a_plan() -> None:
    scene = Scene()
    for _ in range(2):
        scene.gradients()
        scene.step()
    scene.optimizer.state[scene.params[2]]["sum"].resize_(39, 4)
    scene.gradients()
    with pytest.raises(ValueError, match=r"p2: state 'sum' has shape \(39, 4\)"):
        scene.optimizer.step()


def test_gradients_are_not_kept_after_the_step() -> None:
    scene = Scene()
    for _ in range(3):
        scene.gradients()
        scene.step()
    held = [weakref.ref(param.grad) for param in scene.params]
    for param in scene.params:
        param.grad = None
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_a_copy_does_not_share_the_plan() -> None:
    scene = Scene()
    for _ in range(2):
        scene.gradients()
        scene.step()
    params, optimizer = copy.deepcopy((scene.params, scene.optimizer))
    before = [param.detach().clone() for param in scene.params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(scene.params, before, strict=True))


RECORDED = [
    ("clippy", {}),
    ("clippy", {"preset": "tfrs"}),
    ("clippy", {"lambda_acc": 1e-3}),
    ("clippy", {"lambda_rel": 0.0, "lambda_abs": 0.0}),
    ("clippy", {"lr": torch.tensor(0.3)}),
    ("clippy", {"lr": 0.0}),
    ("clippy_adam", {}),
    ("gc", {}),
    ("adagrad", {}),
    ("lamb_adam", {}),
]


@pytest.mark.parametrize(("name", "given"), RECORDED, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_c_writes_the_statistics_that_python_writes(
    name: str, given: dict[str, Any], sparse: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for in_c in (True, False):
        with monkeypatch.context() as patched:
            if not in_c:
                patched.setattr(type(NATIVE), "apply_and_record", lambda *_: False)
            scene = Scene(name, on_nonfinite=policy, **given)
            scene.sparse = sparse
            scene.params[1].data.zero_()  # a weight of 0 may hold its tensor still
            for number in range(6):
                scene.gradients()
                if number == 3:
                    scene.params[3].grad.fill_(torch.inf)  # type: ignore[union-attr]
                scene.step()
            outcomes.append(scene.outcome())
    for one, other in zip(*outcomes, strict=True):
        # One unit of the last place: torch's square root of a norm is not always the nearest number.
        torch.testing.assert_close(one, other, rtol=3e-16, atol=0, equal_nan=True)


def test_the_plan_is_what_makes_steps_equal_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would not see a plan that takes over an old gradient, unless it fails where one does."""
    monkeypatch.setattr(plan._Entry, "renew", lambda self, kept: kept is self.kept)
    scene, other = Scene(), Scene(plans=False)
    for each in (scene, other):
        for _ in range(3):
            each.gradients()
            try:
                each.step()
            except (RuntimeError, ValueError):
                return
    assert not torch.equal(scene.params[0], other.params[0])
