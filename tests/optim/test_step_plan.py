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
from torch.multiprocessing.reductions import StorageWeakRef

import optim
from optim.native import plan
from optim.native.backend import NATIVE
from optim.stats import FIELDS

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


def _other_strides_of_state(scene: Scene) -> None:
    """The same memory and shape, too."""
    state = scene.optimizer.state[scene.params[0]]["sum"]
    state.data = state.as_strided((6, 5), (1, 6))


def _all_state_moves(scene: Scene) -> None:
    """As Hogwild has it, and loops that bring an optimizer to another device: rows of `clip_stats`, too."""
    for state in scene.optimizer.state.values():
        for tensor in state.values():
            tensor.data = tensor.data.clone() if tensor.is_shared() else tensor.share_memory_()


def _subclass(scene: Scene) -> None:
    """In the same memory."""
    param = scene.params[0]
    grad, param.grad = param.grad, None
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().as_subclass(_Subclass)))
    param.grad = grad


class _Subclass(torch.Tensor):
    pass


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


def _moved_to_another_group(scene: Scene) -> None:
    _group_added(scene)
    first, second = scene.optimizer.param_groups
    second["lr"] = 0.01
    second["params"].insert(0, first["params"].pop())


CHANGES = [
    _nothing,
    _new_memory,
    _other_strides,
    _other_strides_of_state,
    _all_state_moves,
    _subclass,
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
    _moved_to_another_group,
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


def test_a_parameter_that_comes_twice_is_stepped_twice() -> None:
    scene, other = Scene(), Scene(plans=False)
    for each in (scene, other):
        each.optimizer.param_groups[0]["params"].append(each.params[0])
        for _ in range(4):
            each.gradients()
            each.step()
    for one, two in zip(scene.outcome(), other.outcome(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not any(scene.renewed), "a plan knows one place of a parameter"


def test_messages_have_the_names_of_the_moment() -> None:
    scene = Scene(on_nonfinite="raise")
    for name in ("p1", "bias"):
        scene.optimizer.param_groups[0]["param_names"][1] = name
        scene.gradients()
        scene.step()
    scene.params[1].grad.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="gradient of bias is"):
        scene.optimizer.step()


def test_a_step_in_the_middle_of_another_has_its_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step in another thread does, which C runs beside it."""
    outcomes = []
    for plans in (True, False):
        scene = Scene(plans=plans)
        for _ in range(2):
            scene.gradients()
            scene.step()
        scene.gradients()
        check = scene.optimizer._check_finite

        def inner(groups: Any, scene: Scene = scene, check: Callable[..., Any] = check) -> Any:
            monkeypatch.setattr(scene.optimizer, "_check_finite", check)
            scene.gradients()
            scene.step()
            return check(groups)

        monkeypatch.setattr(scene.optimizer, "_check_finite", inner)
        scene.step()
        outcomes.append(scene.outcome())
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_from_one_step_to_the_next(fails: bool) -> None:
    """Gradients, and weights and state that are replaced, such as the touched rows of stacked tables."""
    scene = Scene()
    for _ in range(3):
        scene.gradients()
        scene.step()
    scene.gradients()
    if fails:
        scene.optimizer.state[scene.params[2]]["sum"].resize_(39, 4)
        with pytest.raises(ValueError, match="p2: state 'sum'"):
            scene.optimizer.step()
    held = [weakref.ref(param.grad) for param in scene.params]
    held += [weakref.ref(value) for param in scene.params for value in scene.optimizer.state.pop(param).values()]
    storages = [StorageWeakRef(param.untyped_storage()) for param in scene.params]
    for param in scene.params:
        param.grad, param.data = None, torch.zeros_like(param)
    gc.collect()
    small = torch.Size([len(FIELDS)])
    assert [ref for ref in held if (value := ref()) is not None and value.shape != small] == []
    assert all(storage.expired() for storage in storages)


def test_copies_of_touched_rows_are_not_kept_after_the_step() -> None:
    scene = Scene()
    scene.sparse = True
    for _ in range(3):
        scene.gradients()
        scene.step()
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    assert [tensor for tensor in tensors if tensor.shape[1:] == SHAPES[2][1:] and len(tensor) < SHAPES[2][0]] == []


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
    monkeypatch.setattr(plan._Entry, "renew", lambda self, grad, kept: bool(kept))
    scene, other = Scene(), Scene(plans=False)
    for each in (scene, other):
        for _ in range(3):
            each.gradients()
            try:
                each.step()
            except (RuntimeError, ValueError):
                return
    assert not torch.equal(scene.params[0], other.params[0])
