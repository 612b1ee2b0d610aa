"""The callback in a real trainer, beside exact eigenvalues, and beside a run without it."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import optim
from lightning_support import LOG, trained
from ranker.errors import UserError
from ranker.models import SharedBottom
from ranker.training.sharpness_probe import SharpnessProbe

PRECISE = {"every": 2, "rows": 32, "max_products": 200, "tolerance": 1e-5}


def narrow() -> SharedBottom:
    torch.manual_seed(3)
    return SharedBottom(LOG.schema, hidden=[3])


class Exact(Callback):
    """Eigenvalues of the whole matrices, and the random state that the probe must leave alone."""

    def __init__(self) -> None:
        self.expected: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows = batch.slice(0, 32)
        every = dict(module.net.named_parameters())
        dense = {name: p for name, p in every.items() if not name.startswith("embeddings.")}
        shapes = [(name, p.shape, p.numel()) for name, p in dense.items()]

        def loss_at(flat: torch.Tensor) -> torch.Tensor:
            pieces = flat.split([n for *_, n in shapes])
            given = {name: piece.view(shape) for (name, shape, _), piece in zip(shapes, pieces, strict=True)}
            logits_BT = functional_call(module.net, given, (rows,))
            return module.loss.local(logits_BT, rows.labels_BT, rows.mask_BT, counts_T=rows.mask_BT.sum(0)).total

        hessian = torch.autograd.functional.hessian(loss_at, parameters_to_vector(dense.values()).detach()).double()
        optimizer = trainer.optimizers[0]
        stats = optimizer.clip_stats()
        scale = [stats[n]["sigma"] / (optimizer.state[p]["sum"].sqrt() + 1e-10).flatten() for n, p in dense.items()]
        plain = torch.linalg.eigvalsh(hessian)[-1]
        stepped = torch.linalg.eigvals(torch.cat(scale).double()[:, None] * hessian).real.max()
        self.expected[trainer.global_step] = (float(plain), float(stepped))


def test_the_eigenvalues_are_those_of_the_exact_matrices_and_stand_under_their_step() -> None:
    exact = Exact()
    _, recorder = trained(exact, SharpnessProbe(**PRECISE), net=narrow())

    seen = {step: row for step, row in recorder.rows.items() if "sharpness/ratio" in row}
    assert sorted(seen) == [2, 4, 6]
    for step, row in seen.items():
        plain, stepped = exact.expected[step]
        assert row["sharpness/hessian"] == pytest.approx(plain, rel=1e-3)
        assert row["sharpness/preconditioned"] == pytest.approx(stepped, rel=1e-3)
        assert row["sharpness/ratio"] == pytest.approx(stepped * 0.1 / 2, rel=1e-3)
        assert row["sharpness/seconds"] > 0


class State(Callback):
    """Everything that a step could depend on, after every step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        grads = [p.grad.clone() for p in module.parameters()]
        buffers = [b.clone() for b in module.net.buffers()]
        sums = [s["sum"].clone() for s in trainer.optimizers[0].state.values()]
        weights = [p.detach().clone() for p in module.parameters()]
        self.seen += [*weights, *grads, *sums, *buffers, torch.get_rng_state(), torch.tensor(module.net.training)]


class Noisy(SharedBottom):
    """A net with dropout, and statistics in buffers."""

    def __init__(self) -> None:
        super().__init__(LOG.schema, hidden=[4])
        self.drop, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)

    def forward(self, batch: Any) -> torch.Tensor:
        torch.rand(1)  # even what draws where it should not
        return self.heads(self.drop(self.norm(self.bottom(self.features(batch)))))


def test_probing_does_not_change_training_by_a_bit() -> None:
    states = []
    for callbacks in ([], [SharpnessProbe(every=1, rows=16, max_products=4)]):
        torch.manual_seed(1)
        state = State()
        trained(*callbacks, state, net=Noisy())
        states.append(state.seen)
    assert len(states[0]) == len(states[1])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_look_says_what_it_costs_once_and_in_the_summary(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ranker")
    probe = SharpnessProbe(every=2, rows=16, max_products=4)
    assert probe.summary() is None
    trained(probe, net=narrow(), accumulate_grad_batches=1)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("sharpness:")]
    assert len(said) == 1
    assert "more time. The step is taken as adagrad" in said[0]
    summary = probe.summary()
    assert summary is not None
    assert summary["looks"] == 3
    assert summary["step_taken_as"] == "adagrad"
    assert summary["last_ratio"] > 0


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (partial(optim.build_optimizer, "clippy_adam", collect_stats=True), "adam"),
        (partial(optim.build_optimizer, "clippy_sgd"), "gradient descent"),
        (lambda model_or_params, lr: torch.optim.SGD(model_or_params.parameters(), lr=lr), "gradient descent"),
    ],
    ids=["clippy_adam", "clippy_sgd", "torch SGD"],
)
def test_other_optimizers_are_taken_for_what_they_are(optimizer: Any, kind: str) -> None:
    probe = SharpnessProbe(every=6, rows=16, max_products=4, hessian=False)
    _, recorder = trained(probe, net=narrow(), optimizer=optimizer)
    row = recorder.rows[6]
    assert math.isfinite(row["sharpness/ratio"])
    assert "sharpness/hessian" not in row
    assert probe.summary()["step_taken_as"] == kind  # type: ignore[index]


def test_a_lost_model_gives_nan_and_goes_on() -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                module.net.bottom.layers[0].bias[0] = math.nan

    _, recorder = trained(Poison(), SharpnessProbe(every=3, rows=16), net=narrow())
    assert math.isnan(recorder.rows[6]["sharpness/ratio"])


def test_accumulated_gradients_are_probed_once_a_step_and_nonsense_is_refused() -> None:
    _, recorder = trained(SharpnessProbe(every=1, rows=16, max_products=2), net=narrow(), accumulate_grad_batches=3)
    assert [step for step, row in recorder.rows.items() if "sharpness/ratio" in row] == [1, 2]
    for given in ({"every": -1}, {"rows": 0}, {"max_products": 1}, {"tolerance": 0.0}):
        with pytest.raises(UserError, match=r"callbacks\.sharpness"):
            SharpnessProbe(**given)
