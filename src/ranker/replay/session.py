"""What scripts/replay.py does: reproduce a capsule, try it another way, take it apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ranker.capsules.capsule import Capsule, differences
from ranker.config_overrides import altered
from ranker.replay.bisect import Bisection, Limits
from ranker.replay.engine import Engine
from ranker.replay.rebuild import build_engine
from ranker.replay.replay_picture import plot_replays, table_of_replays
from ranker.replay.trajectory import Trajectory, first_difference, largest_difference
from ranker.replay.transfer_state import carry
from ranker.runs.provenance import arithmetic
from ranker.runs.run_folder import versions

ROUNDING = 1e-3  # relative; replays of several ranks, or on other versions, may differ by so much
PICTURE, TABLE, BISECTION = "replay.png", "replay.json", "bisect.json"


class Session:
    """One capsule, opened for replay.

    Threads are set to as many as the run had, since they decide the order of sums.

    Args:
        path: the capsule's folder.
        console: where to talk.

    Raises:
        UserError: there is no capsule, or it cannot be read.
    """

    def __init__(self, path: str | Path, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.capsule = Capsule.load(path)
        config = OmegaConf.load(self.capsule.config)
        assert isinstance(config, DictConfig)
        self.cfg = config
        manifest = self.capsule.manifest
        torch.set_num_threads(int(manifest.machine["threads"]))
        cuda = manifest.machine["device"] != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.recorded = Trajectory(
            name="the run", steps=manifest.steps, signals_SN=manifest.signals_SN(), event=manifest.event
        )
        self._describe()

    def reproduce(self) -> bool:
        """Trains the same batches again and compares every loss; whether they are the same."""
        engine, state = self._engine(), self.capsule.state
        engine.restore(state)
        with self._progress("replay", len(self.recorded.steps)) as (tick, _):
            replayed = engine.run(self.recorded.steps, self.capsule.batches, name="replay", tick=tick)
        return self._compare(replayed)

    def alternatives(self, tries: Sequence[Sequence[str]], *, conf: Path, out: Path) -> list[Trajectory]:
        """Trains the same minutes another way, each try with its own overrides; draws them beside the run.

        Raises:
            UserError: an override that a replay cannot take, or that cannot be built.
        """
        state, manifest = self.capsule.state, self.capsule.manifest
        configs = [altered(self.cfg, list(overrides), folder=conf) for overrides in tries]
        found, carried = [self.recorded], []
        with self._progress("replay", len(tries) * len(manifest.steps)) as (tick, told):
            for overrides, cfg in zip(tries, configs, strict=True):
                name = " ".join(overrides)
                told(name)
                other = build_engine(cfg, self.capsule.schema, device=self.device)
                carried.append(f"{name}: {carry(state, run=self._engine(), other=other)}")
                found.append(other.run(manifest.steps, self.capsule.batches, name=name, tick=tick))
        for line in carried:
            self.console.print(line)
        self._show(found, out)
        return found[1:]

    def bisect(self, *, out: Path, limits: Limits | None = None) -> dict[str, Any]:
        """Looks for the step, batch, feature, rows, task and layer that moved first; writes bisect.json."""
        limits = limits or Limits()
        manifest = self.capsule.manifest
        search = Bisection(self._engine(), self.capsule.state, manifest.steps, self.capsule.batches, limits=limits)
        most, each = search.most_replays(), limits.lookback + limits.horizon + 1
        self.console.print(f"at most {most} replays of at most {each} batches")
        with self._progress("bisect", None) as (tick, told):
            findings = search.run(tick=tick, told=told)
        report = findings.to_dict()
        out.mkdir(parents=True, exist_ok=True)
        _write(out / BISECTION, json.dumps(report, indent=1) + "\n")
        for sentence in report["verdict"]:
            self.console.print(sentence)
        self.console.print(f"{findings.replays} replays; {out / BISECTION}")
        return report

    def _engine(self) -> Engine:
        return build_engine(self.cfg, self.capsule.schema, device=self.device)

    def _describe(self) -> None:
        manifest, event = self.capsule.manifest, self.capsule.manifest.event
        ranks = f", {manifest.world_size} ranks replayed one after the other" if manifest.world_size > 1 else ""
        self.console.print(f"{event.kind} divergence at step {event.step}: {event}")
        first, last = manifest.snapshot_step, manifest.steps[-1]
        self.console.print(f"snapshot at step {first}, {len(manifest.steps)} batches up to step {last}{ranks}")
        if manifest.note:
            self.console.print(manifest.note, style="yellow")
        for difference in differences(manifest, versions(), arithmetic(self.device)):
            self.console.print(f"differs: {difference}; the last bits of the losses may too", style="yellow")

    def _compare(self, replayed: Trajectory) -> bool:
        recorded_ST, replayed_ST = self.recorded.losses_ST, replayed.losses_ST
        count, place = len(self.recorded.steps), first_difference(recorded_ST, replayed_ST)
        if place is None:
            self.console.print(f"bit-equal over {count} steps", style="green")
            return True
        step, apart = self.recorded.steps[place], largest_difference(recorded_ST, replayed_ST)
        ranks = self.capsule.manifest.world_size
        if ranks > 2 and apart <= ROUNDING:
            self.console.print(
                f"equal to rounding over {count} steps: largest relative difference {apart:.2g}", style="green"
            )
            return True
        task = int((recorded_ST[place] != replayed_ST[place]).nonzero()[0])
        was, now = float(recorded_ST[place, task]), float(replayed_ST[place, task])
        self.console.print(
            f"first differs at step {step} (batch {place + 1} of {count}): {self.capsule.manifest.tasks[task]} "
            f"{was!r} in the run, {now!r} here; largest relative difference over all steps {apart:.2g}",
            style="red",
        )
        return False

    def _show(self, found: Sequence[Trajectory], out: Path) -> None:
        event, schema = self.capsule.manifest.event, self.capsule.schema
        out.mkdir(parents=True, exist_ok=True)
        self.console.print(table_of_replays(found, schema, event))
        for trajectory in found:
            self.console.print(f"{trajectory.name}: {trajectory}")
        saved = [trajectory.name for trajectory in found[1:] if trajectory.event is None]
        self.console.print(f"would have saved this run: {'; '.join(saved) if saved else 'none of these'}")
        title = f"step {event.step} of {schema.name}, and other ways it could have gone"
        plot_replays(found, schema, event, out / PICTURE, title=title)
        table = [
            {
                "name": t.name,
                "outcome": str(t),
                "event": t.event.to_dict() if t.event else None,
                "steps": list(t.steps),
                "losses": [
                    [x if x == x and abs(x) != float("inf") else None for x in row] for row in t.losses_ST.tolist()
                ],
            }
            for t in found
        ]
        _write(out / TABLE, json.dumps({"tasks": list(schema.task_names), "trajectories": table}) + "\n")
        self.console.print(f"{out / PICTURE}, {out / TABLE}")

    @contextmanager
    def _progress(self, title: str, total: int | None) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
        """A bar on a terminal; gives what moves it on, and what says what is going on."""
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(title, total=total)

            def told(text: str) -> None:
                progress.update(bar, description=f"{title}: {text}"[:60])

            yield lambda: progress.advance(bar), told


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
