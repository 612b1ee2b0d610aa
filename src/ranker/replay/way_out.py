"""Replays what ``callbacks.rollback`` would have done about a divergence, and what follows on the capsule's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf

from ranker.data.batch import Batch
from ranker.replay.engine import Engine
from ranker.replay.trajectory import Trajectory
from ranker.replay.transfer_state import carry

ROLLBACK = "callbacks.rollback"


def is_asked(cfg: DictConfig, saved: DictConfig, overrides: Sequence[str]) -> bool:
    """Whether a way out is to be tried: an override names it, or sets it as those of ``mitigation`` do."""
    options = OmegaConf.select(cfg, ROLLBACK)
    if options != OmegaConf.select(saved, ROLLBACK) or any(ROLLBACK in override for override in overrides):
        return True
    named = any(override.startswith("mitigation=") for override in overrides)  # that of the run itself, once more
    return named and bool(options and options.get("tries"))


def replay_way_out(
    engine: Engine,
    cfg: DictConfig,
    steps: Sequence[int],
    batches: Sequence[Sequence[Batch]],
    *,
    make: Callable[[DictConfig], Engine],
    name: str,
    tick: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Trains until the detector suspects a divergence, does what ``callbacks.rollback`` says, and trains on.

    A run acts on the verdict, some tens of steps later. A capsule ends about there, so a replay acts at the first
    suspicion, to have batches left. With ``restore=all`` it leaves out the batches from ``back_steps`` before the first
    step of the event to the suspicion and trains on all others; ``skip_batches`` does not apply.

    Args:
        engine: at the snapshot.
        cfg: the configuration of the alternative.
        steps: step of each batch.
        batches: by batch, the shares of the ranks.
        make: builds an engine from a configuration.
        name: name of the trajectory.
        tick: called after each batch.

    Returns:
        The steps up to the suspicion and those after it; with ``restore=all`` only the steps of the second attempt.
        Without any divergence, the training as it went.
    """
    options = OmegaConf.select(cfg, ROLLBACK)
    what, optim = options.get("restore", "all"), options.get("optim")
    before = engine.state()
    first = engine.run(steps, batches, name=name, until_moved=True, tick=tick)
    if first.event is None:
        return first
    acted, event = len(first.steps), first.event.step
    start = event - int(options.get("back_steps", 0))
    again = [place for place in range(acted) if steps[place] < start] if what == "all" else []
    if what == "all":
        engine.restore(before)
    else:
        now = engine.state()
        if what == "accumulators":
            state = {"state": before.optimizer["state"], "param_groups": now.optimizer["param_groups"]}
            engine.restore(replace(now, optimizer=state))
        engine.restore_history(replace(before, step=now.step, rng=None))
    if optim is not None:
        other_cfg = cfg.copy()
        OmegaConf.set_struct(other_cfg, False)
        other_cfg.optim = optim
        other = make(other_cfg)
        carry(engine.state(), run=engine, other=other)
        engine = other
    ramp = _Ramp(engine, factor=float(options.get("lr_factor", 1.0)), steps=int(options.get("lr_steps", 0)))

    def after_batch() -> None:
        ramp.after(engine.step)
        tick()

    places = [*again, *range(acted, len(steps))]
    second = engine.run([steps[i] for i in places], [batches[i] for i in places], name=name, tick=after_batch)
    if what == "all":
        return second
    signals_SN = torch.cat([first.signals_SN, second.signals_SN])
    return Trajectory(name=name, steps=[*first.steps, *second.steps], signals_SN=signals_SN, event=second.event)


class _Ramp:
    """Multiplies the learning rates of an engine by a factor that rises back to 1 over some steps, or stays."""

    def __init__(self, engine: Engine, *, factor: float, steps: int) -> None:
        self._engine, self._factor, self._steps, self._start = engine, factor, steps, engine.step
        self._now = 1.0
        self._set(factor)

    def after(self, step: int) -> None:
        """Sets the rate of the step after this one."""
        if self._steps:
            share = min((step - self._start) / self._steps, 1.0)
            self._set(self._factor + (1.0 - self._factor) * share)

    def _set(self, factor: float) -> None:
        ratio, self._now = factor / self._now, factor
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["lr"] * ratio
        if self._engine.schedule is not None:
            self._engine.schedule.base_lrs = [rate * ratio for rate in self._engine.schedule.base_lrs]
