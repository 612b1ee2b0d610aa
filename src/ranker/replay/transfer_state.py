"""Transfers a snapshot to another model and optimizer, as far as they match."""

from __future__ import annotations

from dataclasses import dataclass, field

from ranker.capsules.training_state import TrainingState
from ranker.replay.engine import Engine
from ranker.training.optimizer_transfer import initial_state, made_optimizer, state_by_name, take_over


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What was transferred.

    Attributes:
        weights: number of weight tensors transferred.
        fresh: names of weights that the snapshot does not have in this shape; they keep their new random values.
        kept: per quantity of the optimizer (``sum`` is Adagrad's), number of tensors for which it was transferred.
        reset: per quantity, number of tensors for which it starts at its initial value.
        untouched: whether the run's optimizer had no state yet.
        lr_factor: the run's learning rate at the snapshot divided by that of its configuration; not 1 after a rollback.
    """

    weights: int
    fresh: list[str] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    reset: dict[str, int] = field(default_factory=dict)
    untouched: bool = False
    lr_factor: float = 1.0

    def __str__(self) -> str:
        """One sentence."""
        said = [f"carried over: {self.weights} weight tensors"]
        said += [f"{quantity} of {count} tensors" for quantity, count in self.kept.items()]
        text = ", ".join(said)
        if self.untouched:
            text += "; the optimizer had no state yet"
        elif self.reset:
            text += "; reset: " + ", ".join(f"{quantity} of {count} tensors" for quantity, count in self.reset.items())
        if self.fresh:
            few = ", ".join(self.fresh[:4]) + (", ..." if len(self.fresh) > 4 else "")
            text += f"; drawn anew: {len(self.fresh)} tensors that the snapshot has not in this shape ({few})"
        if self.lr_factor != 1.0:
            text += f"; learning rate times {self.lr_factor:g}, as in the run"
        return text


def carry(state: TrainingState, *, run: Engine, other: Engine) -> Carried:
    """Transfers the state of a run at its snapshot to another engine, as far as it matches.

    Weights are matched by name and shape. A tensor's optimizer state is transferred if the new optimizer keeps the same
    quantities in the same shapes (Adagrad, GC, AGC, LAMB and Clippy all keep ``sum``); otherwise it is reset. The
    learning rate is that of the new configuration at this step, warm-up included.

    Args:
        state: the snapshot.
        run: the engine of the run as it was. It is put into the snapshot's state.
        other: the engine that receives the state.
    """
    configured = _rates(run, state.step)
    run.restore(state)
    actual = [float(group["lr"]) for group in run.optimizer.param_groups]
    factor = actual[0] / configured[0] if configured[0] else 1.0
    net = other.module.net
    wanted = initial_state(net, made_optimizer(other.module.configure_optimizers))
    weights, fresh = _carry_weights(run, other)
    kept, reset = take_over(state_by_name(run.module.net, run.optimizer), net, other.optimizer, wanted)
    _rates(other, state.step, factor=factor)
    other.restore_history(state)
    return Carried(
        weights=weights,
        fresh=fresh,
        kept=kept,
        reset=reset,
        untouched=not state.optimizer["state"],
        lr_factor=round(factor, 9),
    )


def _carry_weights(run: Engine, other: Engine) -> tuple[int, list[str]]:
    old, new = run.module.net.state_dict(), other.module.net.state_dict()
    fits = {name: old[name] for name, value in new.items() if name in old and old[name].shape == value.shape}
    other.module.net.load_state_dict(fits, strict=False)
    return len(fits), [name for name in new if name not in fits]


def _rates(engine: Engine, step: int, *, factor: float = 1.0) -> list[float]:
    """Sets the learning rates of the configuration after a number of steps, times a factor; returns them unscaled."""
    schedule = engine.schedule
    groups = engine.optimizer.param_groups
    if schedule is None:
        rates = [float(group["lr"]) for group in groups]
    else:
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
        schedule.last_epoch = step
        rates = [
            float(x) * shape(step) / factor for x, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor
    return rates
