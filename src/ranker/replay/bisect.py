"""Finds which batch, feature, rows, task and layer caused a divergence, by replaying training without each of them.

Each question is a counterfactual replay: does a divergence, as defined by the run's own detector, still begin when one
thing is left out? Attributions (deviation of a feature from its usual values, gradients per task, relative steps per
layer) only decide the order of the questions, and are reported beside the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ranker.capsules.training_state import TrainingState
from ranker.data.batch import Batch
from ranker.errors import UserError
from ranker.replay.counterfactuals import (
    DenseStatistics,
    find_sufficient_prefix,
    find_sufficient_subset,
    max_questions,
    share_key,
    without_features,
    without_rows,
)
from ranker.replay.engine import Change, Engine
from ranker.replay.findings import Features, Findings, Layers, Rows, Tasks
from ranker.replay.trajectory import Trajectory
from ranker.stability import Event

OUTLIER = 2.0  # a value this many times farther from the median than in the batches before is an outlier
MAX_SINGLE_ROWS = 16  # rows that are tried one by one
MAX_LAYERS = 16  # groups of parameters; if there are more, those of one parent module are joined


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the search.

    Attributes:
        lookback: number of suspected batches before the one whose loss moved first.
        horizon: number of batches after it in which a divergence must begin.
    """

    lookback: int = 8
    horizon: int = 20


class Bisection:
    """The search for the cause of a divergence.

    Args:
        engine: an engine with the configuration of the run.
        state: the capsule's snapshot.
        steps: step that each batch belongs to.
        batches: the shares of the ranks, per batch.
        limits: limits of the search.

    Attributes:
        replays: number of replays so far.
    """

    def __init__(
        self,
        engine: Engine,
        state: TrainingState,
        steps: Sequence[int],
        batches: Sequence[Sequence[Batch]],
        *,
        limits: Limits | None = None,
    ) -> None:
        self._engine, self._steps, self._batches = engine, steps, batches
        self._limits = limits or Limits()
        self._on_batch: Callable[[], None] = lambda: None
        self._on_question: Callable[[str], None] = lambda _: None
        self._schema = engine.module.schema
        self._start, self._state = 0, state  # replays start with this batch, from this state
        self._stop = len(batches)
        self.replays = 0

    def max_replays(self) -> int:
        """Upper bound on the number of replays. All but the first have at most lookback + horizon + 1 batches."""
        limits, schema = self._limits, self._schema
        rows = max(sum(len(part) for part in parts) for parts in self._batches)
        of_features = max_questions(len(schema.feature_names))
        of_rows = max_questions(max(1, rows // 2)) + MAX_SINGLE_ROWS + 1
        layers = len(self._layers())
        return 1 + (limits.lookback + 1) + 3 + 1 + of_features + of_rows + 2 * len(schema.tasks) + 2 * layers + 1

    def run(
        self, *, on_batch: Callable[[], None] | None = None, on_question: Callable[[str], None] | None = None
    ) -> Findings:
        """Searches for the cause.

        Args:
            on_batch: called after each replayed batch.
            on_question: called with a description of each question.

        Raises:
            UserError: no divergence begins in the replay, or a step has more than one batch.
        """
        self._on_batch, self._on_question = on_batch or self._on_batch, on_question or self._on_question
        if self._engine.settings.accumulate > 1:
            raise UserError("--bisect cannot take accumulated gradients apart; replay and --try can")
        self._on_question("the run as it was")
        whole = self._replay([])
        if whole.event is None:
            raise UserError(
                "nothing to bisect: the detector finds no divergence in the capsule's batches alone; the event depends "
                "on what came before or after them (training AUC, hold-out)"
            )
        event, onset = whole.event, self._index_of(whole.event)
        self._narrow(onset)
        guilty, last = self._which_batch(onset)
        at = frozenset([guilty]) if guilty is not None else frozenset(range(self._start, self._stop))
        batch = self._batches[onset if guilty is None else guilty]
        usual = self._usual_values(at, onset)
        if guilty is not None:
            self._start_at(guilty)
        features = self._which_features(at, usual, batch)
        rows = self._which_rows(guilty, features, usual) if guilty is not None else None
        harm = guilty is None or self._diverges([Change(at=at, unseen=True)], "the model after the batch")
        tasks = self._which_tasks(at, batch, guilty) if harm else None
        layers = self._which_layers(at, batch, guilty) if harm else None
        return Findings(
            event=event,
            replays=self.replays,
            step=None if guilty is None else self._steps[guilty],
            number=None if guilty is None else self._batches[guilty][0].number,
            last_batches=last,
            harm=harm,
            features=features,
            rows=rows,
            tasks=tasks,
            layers=layers,
        )

    # One question.

    def _replay(self, changes: Iterable[Change]) -> Trajectory:
        self._engine.restore(self._state)
        self.replays += 1
        part = slice(self._start, self._stop)
        return self._engine.run(
            self._steps[part],
            self._batches[part],
            first=self._start,
            changes=changes,
            until_moved=self.replays > 1,  # the first replay gives the full depth of the event
            tick=self._on_batch,
        )

    def _diverges(self, changes: Iterable[Change], question: str) -> bool:
        self._on_question(question)
        return self._replay(changes).event is not None

    def _index_of(self, event: Event) -> int:
        return next((i for i, step in enumerate(self._steps) if step >= event.step), len(self._steps) - 1)

    def _narrow(self, onset: int) -> None:
        """Limits the replays that follow to the batches around the onset."""
        self._stop = min(len(self._batches), onset + self._limits.horizon + 1)
        self._start_at(max(0, onset - self._limits.lookback))

    def _start_at(self, index: int) -> None:
        """Lets the replays that follow start right before a batch."""
        self._engine.restore(self._state)
        part = slice(self._start, index)
        self._engine.run(self._steps[part], self._batches[part], first=self._start)
        self._state, self._start = self._engine.state(), index

    # Which batch.

    def _which_batch(self, onset: int) -> tuple[int | None, int | None]:
        """The batch without which there is no divergence, or how many of the last ones must be left out together."""
        for index in range(onset, self._start - 1, -1):
            change = Change(at=frozenset([index]), leave_out=True)
            if not self._diverges([change], f"without step {self._steps[index]}"):
                return index, 1
        for count in (2, 4, 8):
            if count > onset - self._start + 1:
                break
            change = Change(at=frozenset(range(onset - count + 1, onset + 1)), leave_out=True)
            if not self._diverges([change], f"without the last {count} batches"):
                return None, count
        return None, None

    # Which features.

    def _usual_values(self, at: frozenset[int], onset: int) -> DenseStatistics:
        before = [part for i, parts in enumerate(self._batches[:onset]) for part in parts if i not in at and len(part)]
        others = [part for i, parts in enumerate(self._batches) for part in parts if i not in at and len(part)]
        return DenseStatistics.of(before or others or [part for parts in self._batches for part in parts])

    def _which_features(self, at: frozenset[int], usual: DenseStatistics, batch: Sequence[Batch]) -> Features:
        deviation_F = torch.cat([usual.relative_deviation_BF(part) for part in batch]).amax(0)
        deviation = {f.name: float(x) for f, x in zip(self._schema.dense, deviation_F, strict=True)}
        order = sorted(deviation, key=lambda name: -deviation[name]) + [f.name for f in self._schema.categorical]

        def prevents(names: Sequence[str]) -> bool:
            edit = without_features(self._schema, usual, names)
            what = names[0] if len(names) == 1 else f"{len(names)} features"
            return not self._diverges([Change(at=at, edit=edit)], f"with {what} at the usual value")

        # All features together are not tried: without any information in the input the predictions become constant.
        names = find_sufficient_subset(order, prevents)
        return Features(names=names, distance={name: deviation[name] for name in order[:8] if name in deviation})

    # Which rows.

    def _which_rows(self, guilty: int, features: Features, usual: DenseStatistics) -> Rows | None:
        parts = self._batches[guilty]
        dense = [i for i, f in enumerate(self._schema.dense) if features.names == [f.name]]
        if dense:
            scores = [usual.relative_deviation_BF(part)[:, dense[0]] for part in parts]
        else:
            self._engine.restore(self._state)
            scores = self._engine.row_losses(parts)
        ranked = sorted(
            ((float(s), share_key(part), i) for part, of in zip(parts, scores, strict=True) for i, s in enumerate(of)),
            reverse=True,
        )
        order = [(share, position) for _, share, position in ranked]

        def prevents(rows: Sequence[tuple[int, int]]) -> bool:
            by_share: dict[int, list[int]] = {}
            for share, position in rows:
                by_share.setdefault(share, []).append(position)
            change = Change(at=frozenset([guilty]), edit=without_rows(by_share))
            return not self._diverges([change], f"without {len(rows)} rows")

        count = find_sufficient_prefix(max(1, len(order) // 2), lambda k: prevents(order[:k]))
        if count is None:
            return None
        outliers = [row for row, (score, *_) in zip(order, ranked, strict=True) if dense and score >= OUTLIER]
        tried = order[: min(max(2 * count, len(outliers)), MAX_SINGLE_ROWS)]
        alone = [row for row in tried if not prevents([other for other in tried if other != row])]
        wanted = outliers if len(outliers) >= count else [row for row in order if row in alone] or order[:count]
        chosen = wanted if wanted == order[:count] or prevents(wanted) else order[:count]
        ids = {(share_key(part), i): int(row) for part in parts for i, row in enumerate(part.row_B)}
        return Rows(
            row_ids=sorted(ids[row] for row in chosen),
            alone=sorted(ids[row] for row in alone),
            of=len(order),
        )

    # Which tasks and layers.

    def _which_tasks(self, at: frozenset[int], batch: Sequence[Batch], guilty: int | None) -> Tasks:
        names = self._schema.task_names
        shared = [name for name, _ in self._engine.module.net.named_parameters() if not name.startswith("heads.")]
        self._engine.restore(self._state)
        norms = [
            float(torch.stack([g.norm() for g in of.values()]).norm()) if of else 0.0
            for of in self._engine.task_gradients(batch, shared)
        ]
        total = sum(norms) or 1.0
        hidden, places = guilty is not None, range(len(names))
        needed, alone = self._needed_or_sufficient(
            {n: Change(at=at, unseen=hidden, weights={t: 0.0}) for t, n in enumerate(names)},
            {n: Change(at=at, unseen=hidden, weights={o: 0.0 for o in places if o != t}) for t, n in enumerate(names)},
            "the gradient of",
        )
        return Tasks(needed=needed, alone=alone, share={n: x / total for n, x in zip(names, norms, strict=True)})

    def _which_layers(self, at: frozenset[int], batch: Sequence[Batch], guilty: int | None) -> Layers:
        layers, hidden = self._layers(), guilty is not None
        every = frozenset(name for names in layers.values() for name in names)
        needed, alone = self._needed_or_sufficient(
            {n: Change(at=at, unseen=hidden, frozen=frozenset(names)) for n, names in layers.items()},
            {n: Change(at=at, unseen=hidden, frozen=every - set(names)) for n, names in layers.items()},
            "the update of",
        )
        return Layers(needed=needed, alone=alone, step=self._relative_steps(layers, batch))

    def _needed_or_sufficient(
        self, without: Mapping[str, Change], only: Mapping[str, Change], what: str
    ) -> tuple[list[str], list[str]]:
        """The candidates without which there is no divergence; if there are none, those sufficient by themselves."""
        needed = [name for name, change in without.items() if not self._diverges([change], f"without {what} {name}")]
        if needed or len(only) < 2:
            return needed, []
        return [], [name for name, change in only.items() if self._diverges([change], f"only {what} {name}")]

    def _relative_steps(self, layers: Mapping[str, Sequence[str]], batch: Sequence[Batch]) -> dict[str, float]:
        """Largest change of a weight in the step on the batch, over the root mean square of the layer's weights."""
        self._engine.restore(self._state)
        params = dict(self._engine.module.net.named_parameters())
        before = {name: param.detach().clone() for name, param in params.items()}
        self._engine.run([self._engine.step + 1], [batch])

        def relative(names: Sequence[str]) -> float:
            change = max(float((params[n].detach() - before[n]).abs().max()) for n in names)
            size = torch.cat([before[n].flatten() for n in names]).square().mean().sqrt()
            return change / max(float(size), 1e-12)

        return {layer: relative(names) for layer, names in layers.items()}

    def _layers(self) -> dict[str, list[str]]:
        """Names of parameters by the module they belong to, or by a parent module if there are too many modules."""
        names = [name for name, _ in self._engine.module.net.named_parameters()]
        deepest = max(name.count(".") for name in names)
        for depth in range(deepest, 0, -1):
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(".".join(name.split(".")[:-1][:depth]) or name, []).append(name)
            if len(groups) <= MAX_LAYERS:
                break
        return groups
