"""What scripts/replay.py does with a capsule: reproduce it, replay it with other settings, search for the cause."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker.atomic import write_text
from ranker.capsules.capsule import Capsule, differences
from ranker.config_overrides import altered
from ranker.replay.bisect import Bisection, Limits
from ranker.replay.engine import Engine
from ranker.replay.rebuild import build_engine
from ranker.replay.trajectory import (
    Trajectory,
    first_difference,
    largest_difference,
    plot_replays,
    table_of_replays,
)
from ranker.replay.transfer_state import carry
from ranker.replay.way_out import is_asked, replay_way_out
from ranker.runs.provenance import arithmetic
from ranker.runs.run_folder import plain, versions
from ranker.trust import load_config

ROUNDING = 1e-3  # largest relative difference that rounding explains, with several ranks, sharded tables, or in a group
PICTURE, TABLE, BISECTION = "replay.png", "replay.json", "bisect.json"


class Session:
    """A capsule that is open for replay.

    Sets the number of threads to that of the run, because it determines the order of sums.

    Args:
        path: folder of the capsule.
        trusted: names of ``_target_`` that its configuration may hold beside the allow list.

    Raises:
        UserError: there is no capsule, or it cannot be read.
    """

    def __init__(self, path: str | Path, *, trusted: Collection[str] = ()) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.capsule = Capsule.load(path)
        self.cfg = load_config(self.capsule.config, trusted=trusted)
        manifest = self.capsule.manifest
        torch.set_num_threads(int(manifest.machine["threads"]))
        cuda = manifest.machine["device"] != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.recorded = Trajectory(
            name="the run", steps=manifest.steps, signals_SN=manifest.signals_SN(), event=manifest.event
        )
        self._describe()

    def reproduce(self) -> bool:
        """Trains on the same batches again, compares every loss, and returns whether all are the same."""
        engine = self._engine()
        engine.restore(self.capsule.state)
        with self._progress("replay", len(self.recorded.steps)) as (advance, _):
            replayed = engine.run(self.recorded.steps, self.capsule.batches, name="replay", tick=advance)
        return self._compare(replayed)

    def alternatives(self, tries: Sequence[Sequence[str]], *, conf: Path, out: Path) -> None:
        """Trains on the same batches with other settings, and compares the results with the run.

        Args:
            tries: overrides of the configuration, per alternative.
            conf: folder of the configuration.
            out: folder for replay.png and replay.json.

        Raises:
            UserError: a replay cannot use an override, or the configuration cannot be built.
        """
        state, manifest = self.capsule.state, self.capsule.manifest
        configs = [altered(self.cfg, list(overrides), folder=conf) for overrides in tries]
        trajectories, transferred = [self.recorded], []
        with self._progress("replay", len(tries) * len(manifest.steps)) as (advance, describe):
            for overrides, cfg in zip(tries, configs, strict=True):
                name = " ".join(overrides)
                describe(name)
                other = self._build(cfg)
                transferred.append(f"{name}: {carry(state, run=self._engine(), other=other)}")
                trajectories.append(self._trained(other, cfg, overrides, name=name, tick=advance))
        for line in transferred:
            self.console.print(line)
        self._show(trajectories, out)

    def bisect(self, *, out: Path, limits: Limits | None = None) -> None:
        """Searches for the step, batch, feature, rows, task and layer that caused the divergence.

        Args:
            out: folder for bisect.json.
            limits: limits of the search.

        Raises:
            UserError: no divergence begins in the replay, or the run accumulated gradients.
        """
        limits = limits or Limits()
        manifest = self.capsule.manifest
        search = Bisection(self._engine(), self.capsule.state, manifest.steps, self.capsule.batches, limits=limits)
        most, each = search.max_replays(), limits.lookback + limits.horizon + 1
        self.console.print(f"at most {most} replays of at most {each} batches")
        with self._progress("bisect", None) as (advance, describe):
            findings = search.run(on_batch=advance, on_question=describe)
        write_text(out / BISECTION, json.dumps(plain(findings.to_dict()), indent=1, allow_nan=False) + "\n")
        for sentence in findings.sentences():
            self.console.print(sentence)
        self.console.print(f"{findings.replays} replays; {out / BISECTION}")

    def _engine(self) -> Engine:
        return self._build(self.cfg)

    def _build(self, cfg: DictConfig) -> Engine:
        return build_engine(cfg, self.capsule.schema, device=self.device, places=self.capsule.places)

    def _trained(
        self, engine: Engine, cfg: DictConfig, overrides: Sequence[str], *, name: str, tick: Callable[[], None]
    ) -> Trajectory:
        steps, batches = self.capsule.manifest.steps, self.capsule.batches
        if is_asked(cfg, self.cfg, overrides):
            return replay_way_out(engine, cfg, steps, batches, make=self._build, name=name, tick=tick)
        return engine.run(steps, batches, name=name, tick=tick)

    def _describe(self) -> None:
        manifest, event = self.capsule.manifest, self.capsule.manifest.event
        ranks = f", {manifest.world_size} ranks replayed one after the other" if manifest.world_size > 1 else ""
        self.console.print(f"{event.kind} divergence at step {event.step}: {event}")
        first, last = manifest.snapshot_step, manifest.steps[-1]
        self.console.print(f"snapshot at step {first}, {len(manifest.steps)} batches up to step {last}{ranks}")
        if manifest.note:
            self.console.print(manifest.note, style="yellow")
        for difference in differences(manifest, versions(), arithmetic(self.device)):
            self.console.print(
                f"differs: {difference}; the last bits of the losses may differ because of it", style="yellow"
            )

    def _compare(self, replayed: Trajectory) -> bool:
        recorded_ST, replayed_ST = self.recorded.losses_ST, replayed.losses_ST
        count, index = len(self.recorded.steps), first_difference(recorded_ST, replayed_ST)
        if index is None:
            self.console.print(f"bit-equal over {count} steps", style="green")
            return True
        largest = largest_difference(recorded_ST, replayed_ST)
        manifest = self.capsule.manifest
        if manifest.world_size > 2 or manifest.sharded or manifest.grouped:
            first = manifest.event.step
            before = sum(step < first for step in self.recorded.steps)
            earlier = largest_difference(recorded_ST[:before], replayed_ST[:before])
            equal = ""
            if largest <= ROUNDING:
                equal = f"over {count} steps: largest relative difference {largest:.2g}"
            elif before and earlier <= ROUNDING:  # what diverges makes any difference grow
                equal = f"up to step {first - 1}: largest relative difference {earlier:.2g}; {largest:.2g} in the event"
            if equal:
                self.console.print(f"equal to rounding {equal}", style="green")
                return True
        task = int((recorded_ST[index] != replayed_ST[index]).nonzero()[0])
        was, now = float(recorded_ST[index, task]), float(replayed_ST[index, task])
        self.console.print(
            f"first differs at step {self.recorded.steps[index]} (batch {index + 1} of {count}): "
            f"{self.capsule.manifest.tasks[task]} {was!r} in the run, {now!r} here; "
            f"largest relative difference over all steps {largest:.2g}",
            style="red",
        )
        return False

    def _show(self, trajectories: Sequence[Trajectory], out: Path) -> None:
        event, schema = self.capsule.manifest.event, self.capsule.schema
        out.mkdir(parents=True, exist_ok=True)
        self.console.print(table_of_replays(trajectories, schema, event))
        for trajectory in trajectories:
            self.console.print(f"{trajectory.name}: {trajectory}")
        healthy = [trajectory.name for trajectory in trajectories[1:] if trajectory.event is None]
        self.console.print(f"would have saved this run: {'; '.join(healthy) if healthy else 'none of these'}")
        title = f"step {event.step} of {schema.name}, and alternatives"
        plot_replays(trajectories, schema, event, out / PICTURE, title=title)
        table = [
            {
                "name": t.name,
                "outcome": str(t),
                "event": t.event.to_dict() if t.event else None,
                "steps": list(t.steps),
                "losses": plain(t.losses_ST.tolist()),
            }
            for t in trajectories
        ]
        write_text(
            out / TABLE,
            json.dumps(plain({"tasks": list(schema.task_names), "trajectories": table}), allow_nan=False) + "\n",
        )
        self.console.print(f"{out / PICTURE}, {out / TABLE}")

    @contextmanager
    def _progress(self, title: str, total: int | None) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
        """A progress bar. Gives a function that advances it, and one that changes its description."""
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(title, total=total)

            def describe(text: str) -> None:
                progress.update(bar, description=f"{title}: {text}"[:60])

            yield lambda: progress.advance(bar), describe
