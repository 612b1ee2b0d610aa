"""The callback in a real trainer, beside numbers computed the long way."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

import optim
from lightning_support import ADAGRAD_ON_TABLES, LOG, Recorder, trained
from ranker.errors import UserError
from ranker.models import SharedBottom
from ranker.training.early_signs_callback import EarlySigns

TASKS = LOG.schema.task_names
RULES = {"gc": {"clip_norm": 0.1}, "mild": {"method": "clippy", "lambda_rel": 2.0}}


def signs_of(recorder: Recorder) -> dict[int, dict[str, float]]:
    kept = {s: {k: v for k, v in r.items() if k.startswith(("signs/", "sigma/"))} for s, r in recorder.rows.items()}
    return {step: row for step, row in kept.items() if row}


class LongWay(Callback):
    """Works out, from whole gradients, what the signs of every step should be."""

    def __init__(self) -> None:
        self.expected: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        net, weight = pl_module.net, pl_module.net.bottom.layers[1].weight
        logits_BT = net(batch)
        hidden = torch.relu(net.bottom.layers[0](net.cross(net.features(batch))))
        grads = []
        for t in range(len(TASKS)):
            only = torch.zeros_like(batch.mask_BT)
            only[:, t] = True
            loss = pl_module.loss.local(
                logits_BT, batch.labels_BT, batch.mask_BT & only, counts_T=batch.mask_BT.sum(0)
            ).total
            grads.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten())
        self.expected[trainer.global_step + 1] = {
            "signs/bottom_first/dead_relus": float((hidden.amax(0) == 0).float().mean()),
            "signs/bottom_first/activation_max": float(hidden.max()),
            "signs/head/like/activation_max": float(logits_BT[:, TASKS.index("like")].abs().max()),
            "signs/task_norm/click": float(grads[0].norm()),
            "signs/task_cosine/click/like": float(torch.cosine_similarity(grads[0], grads[1], dim=0)),
        }

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        weight = pl_module.net.bottom.layers[0].weight
        self.name, self.before = "bottom.layers.0.weight", weight.detach().clone()
        r = weight.grad / (optimizer.state[weight]["sum"] + weight.grad**2).sqrt() if optimizer.state else weight.grad
        self.r = r if optimizer.state else weight.grad / (0.1 + weight.grad**2).sqrt()
        what_if = optim.what_if(optimizer, RULES)
        self.expected[trainer.global_step + 1] |= {
            "signs/bottom_first/grad_norm": float(weight.grad.norm()),
            "signs/bottom_first/grad_over_weight": float(weight.grad.norm() / weight.norm()),
            "signs/bottom_first/update_max": float(self.r.abs().max()),
            "signs/bottom_first/sigma_gc": what_if["gc"][self.name],
            "signs/bottom_first/sigma_mild": what_if["mild"][self.name],
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        stats = trainer.optimizers[0].clip_stats()
        accumulator = trainer.optimizers[0].state[pl_module.net.bottom.layers[0].weight]["sum"]
        self.expected[trainer.global_step] |= {
            "signs/bottom_first/adapted": float((accumulator > 0.2).float().mean()),
            "signs/bottom_first/sigma": stats[self.name]["sigma"],
            "sigma/bottom.layers.0.bias": stats["bottom.layers.0.bias"]["sigma"],
        }


def test_every_sign_is_what_the_long_way_gives_and_stands_under_its_own_step() -> None:
    long_way = LongWay()
    what_if = partial(optim.what_if, rules=RULES, read=False)
    _, recorder = trained(long_way, EarlySigns(every=1, task_gradients=1, what_if=what_if))

    seen = signs_of(recorder)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    for step, row in long_way.expected.items():
        for name, value in row.items():
            assert seen[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    assert "sigma/embeddings.tables.dim_8.weight" not in seen[1], "tables are not clipped"


def test_looking_does_not_change_training_by_a_bit() -> None:
    plain, _ = trained()
    looked, _ = trained(EarlySigns(every=1, task_gradients=1, what_if=partial(optim.what_if, rules=RULES, read=False)))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, looked.state_dict()[name]), name


def test_looks_come_at_their_interval_and_tasks_at_theirs() -> None:
    _, recorder = trained(EarlySigns(every=2, task_gradients=2))
    seen = signs_of(recorder)
    assert sorted(seen) == [2, 4, 6]
    assert [step for step, row in seen.items() if "signs/task_norm/click" in row] == [4]
    assert signs_of(trained(EarlySigns(every=0))[1]) == {}


def test_only_the_layers_and_signs_that_were_asked_for_are_recorded() -> None:
    _, recorder = trained(EarlySigns(every=3, roles=["bottom_top"], activations=False, sigma=False, task_gradients=0))
    names = {name for row in signs_of(recorder).values() for name in row}
    assert names == {f"signs/bottom_top/{sign}" for sign in ("grad_norm", "grad_over_weight", "update_max", "adapted")}


def test_accumulated_gradients_are_looked_at_once_a_step() -> None:
    _, recorder = trained(EarlySigns(every=1, task_gradients=1), accumulate_grad_batches=2)
    seen = signs_of(recorder)
    assert sorted(seen) == [1, 2, 3]
    assert all("signs/task_norm/click" in row and "signs/dcn/sigma" in row for row in seen.values())


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_every_optimizer_of_the_registry_can_be_looked_at(name: str) -> None:
    build = partial(optim.build_optimizer, name, **ADAGRAD_ON_TABLES)
    _, recorder = trained(
        EarlySigns(every=6, what_if=partial(optim.what_if, rules=["gc"], read=False)), optimizer=build
    )
    row = signs_of(recorder)[6]
    assert math.isfinite(row["signs/bottom_top/sigma"])
    assert math.isfinite(row["signs/bottom_top/update_max"])
    assert 0 < row["signs/bottom_top/sigma_gc"] <= 1


def test_optimizers_from_elsewhere_and_sparse_tables_give_what_they_have() -> None:
    def sgd(model_or_params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model_or_params.parameters(), lr=lr)

    net = SharedBottom(LOG.schema, hidden=[8, 4], sparse_embeddings=True)
    what_if = partial(optim.what_if, rules=RULES, read=False)
    row = signs_of(trained(EarlySigns(every=6, what_if=what_if), optimizer=sgd, net=net)[1])[6]
    assert math.isfinite(row["signs/bottom_top/grad_norm"])
    assert math.isnan(row["signs/bottom_top/update_max"])
    assert not any("sigma" in name for name in row)

    build = partial(optim.build_optimizer, "clippy", **ADAGRAD_ON_TABLES)
    net = SharedBottom(LOG.schema, hidden=[8, 4], sparse_embeddings=True)
    row = signs_of(trained(EarlySigns(every=6, what_if=what_if), optimizer=build, net=net)[1])[6]
    assert row["signs/bottom_top/sigma_mild"] <= 1


def test_what_cannot_be_looked_at_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match="no layer 'botom_top'; did you mean 'bottom_top'"):
        trained(EarlySigns(roles=["botom_top"]))
    with pytest.raises(UserError, match=r"what_if: .*clip_norn"):
        trained(EarlySigns(what_if=partial(optim.what_if, rules={"gc": {"clip_norn": 1.0}})))
    with pytest.raises(UserError, match="every must be 0"):
        EarlySigns(every=-1)


def test_a_partial_that_does_work_of_its_own_at_each_call_is_called_without_it():
    class Watched(partial):  # as Hydra's is
        def __call__(self, *args, **kwargs):
            raise AssertionError("the wrapper was called")

    _, recorder = trained(EarlySigns(every=6, what_if=Watched(optim.what_if, rules=["gc"], read=False)))
    assert any(name.endswith("sigma_gc") for name in signs_of(recorder)[6])
