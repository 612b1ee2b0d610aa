"""Which batch, feature, rows, task and layer moved first: asked of the model by training it again without them.

Each question is a counterfactual replay: does a divergence, as the run's own detector defines it, still begin when
one thing is left out? Attributions (distance of a feature from its usual values, gradients by task, relative steps by
layer) only decide in which order questions are asked, and stand in the report beside the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ranker.capsules.training_state import TrainingState
from ranker.data.batch import Batch
from ranker.errors import UserError
from ranker.replay.counterfactuals import Usual, share_key, without_features, without_rows
from ranker.replay.engine import Change, Engine
from ranker.replay.findings import Features, Findings, Layers, Rows, Tasks
from ranker.replay.search import halve, halve_questions, prefix_questions, smallest_prefix
from ranker.replay.trajectory import Trajectory
from ranker.stability import Event

FAR = 2.0  # a value so many times farther from the median than any before is out of the ordinary


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far to search.

    Attributes:
        lookback: batches before the one whose loss moved first that are suspected too.
        horizon: batches after it in which a divergence must show.
        single_rows: rows that are tried one by one.
        layers: most groups of parameters; neighbours are joined where there are more.
    """

    lookback: int = 8
    horizon: int = 20
    single_rows: int = 16
    layers: int = 16


class Bisection:
    """Takes a divergence apart.

    Args:
        engine: of the run as it was.
        state: the capsule's snapshot.
        steps: of each batch, the step it belongs to.
        batches: by batch, the shares of the ranks.
        limits: how far to search.
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
        self._tick: Callable[[], None] = lambda: None
        self._told: Callable[[str], None] = lambda _: None
        self._schema = engine.module.schema
        self._from, self._state = 0, state
        self._until = len(batches)
        self.replays = 0

    def most_replays(self) -> int:
        """An upper bound on the number of replays, each of at most lookback + horizon + 1 batches but for the first."""
        limits, schema = self._limits, self._schema
        rows = max(sum(len(part) for part in parts) for parts in self._batches)
        features = halve_questions(len(schema.feature_names))
        of_rows = prefix_questions(max(1, rows // 2)) + limits.single_rows + 1
        layers = len(self._layers())
        return 1 + (limits.lookback + 1) + 3 + 1 + features + of_rows + 2 * len(schema.tasks) + 2 * layers + 1

    def run(self, *, tick: Callable[[], None] | None = None, told: Callable[[str], None] | None = None) -> Findings:
        """Searches.

        Args:
            tick: called after every replayed batch.
            told: called with what is being asked.

        Raises:
            UserError: the replayed minutes do not move, or a step has more than one batch.
        """
        self._tick, self._told = tick or self._tick, told or self._told
        if self._engine.settings.accumulate > 1:
            raise UserError("--bisect cannot take accumulated gradients apart; replay and --try can")
        self._told("the run as it was")
        whole = self._replay([])
        if whole.event is None:
            raise UserError(
                "nothing to bisect: in the capsule's minutes the detector sees no jump of its own; the event rests on "
                "what came before or after them (training AUC, hold-out)"
            )
        event, onset = whole.event, self._place(whole.event)
        self._narrow(onset)
        guilty, last = self._which_batch(onset)
        at = frozenset([guilty]) if guilty is not None else frozenset(range(self._from, self._until))
        batch = self._batches[onset if guilty is None else guilty]
        usual = self._usual(at, onset)
        if guilty is not None:
            self._advance(guilty)
        features = self._which_features(at, usual, batch)
        rows = self._which_rows(guilty, features, usual) if guilty is not None else None
        harm = guilty is None or self._moves([Change(at=at, unseen=True)], "what the batch leaves behind")
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
        stretch = slice(self._from, self._until)
        return self._engine.run(
            self._steps[stretch],
            self._batches[stretch],
            first=self._from,
            changes=changes,
            until_moved=self.replays > 1,  # of the run as it was, the whole depth is told
            tick=self._tick,
        )

    def _moves(self, changes: Iterable[Change], question: str) -> bool:
        self._told(question)
        return self._replay(changes).event is not None

    def _place(self, event: Event) -> int:
        places = [i for i, step in enumerate(self._steps) if step >= event.step]
        return places[0] if places else len(self._steps) - 1

    def _narrow(self, onset: int) -> None:
        """From now on replays start a little before the onset and end a little after it."""
        self._until = min(len(self._batches), onset + self._limits.horizon + 1)
        self._advance(max(0, onset - self._limits.lookback))

    def _advance(self, place: int) -> None:
        """From now on replays start right before a batch."""
        self._engine.restore(self._state)
        stretch = slice(self._from, place)
        self._engine.run(self._steps[stretch], self._batches[stretch], first=self._from)
        self._state, self._from = self._engine.state(), place

    # Which batch.

    def _which_batch(self, onset: int) -> tuple[int | None, int | None]:
        """The batch without which nothing moves; or how many of the last ones it takes together."""
        for place in range(onset, self._from - 1, -1):
            if not self._moves([Change(at=frozenset([place]), leave_out=True)], f"without step {self._steps[place]}"):
                return place, 1
        for count in (2, 4, 8):
            if count > onset - self._from + 1:
                break
            places = frozenset(range(onset - count + 1, onset + 1))
            if not self._moves([Change(at=places, leave_out=True)], f"without the last {count} batches"):
                return None, count
        return None, None

    # Which features.

    def _usual(self, at: frozenset[int], onset: int) -> Usual:
        calm = [part for i, parts in enumerate(self._batches[:onset]) for part in parts if i not in at and len(part)]
        others = [part for i, parts in enumerate(self._batches) for part in parts if i not in at and len(part)]
        return Usual.of(calm or others or [part for parts in self._batches for part in parts])

    def _which_features(self, at: frozenset[int], usual: Usual, batch: Sequence[Batch]) -> Features:
        distance_F = torch.cat([usual.distance_BF(part) for part in batch]).amax(0)
        far = {f.name: float(x) for f, x in zip(self._schema.dense, distance_F, strict=True)}
        order = sorted(far, key=lambda name: -far[name]) + [f.name for f in self._schema.categorical]

        def enough(names: Sequence[str]) -> bool:
            edit = without_features(self._schema, usual, names)
            return not self._moves([Change(at=at, edit=edit)], f"with {_few(names)} at the usual value")

        # All of them at once are not asked about: an input without any information kills the predictions by itself.
        return Features(names=halve(order, enough), distance={name: far[name] for name in order[:8] if name in far})

    # Which rows.

    def _which_rows(self, guilty: int, features: Features, usual: Usual) -> Rows | None:
        parts = self._batches[guilty]
        dense = [i for i, f in enumerate(self._schema.dense) if features.names == [f.name]]
        if dense:
            scores = [usual.distance_BF(part)[:, dense[0]] for part in parts]
        else:
            self._engine.restore(self._state)
            scores = self._engine.row_losses(parts)
        ranked = sorted(
            ((float(s), share_key(part), i) for part, of in zip(parts, scores, strict=True) for i, s in enumerate(of)),
            reverse=True,
        )
        order = [(share, place) for _, share, place in ranked]

        def prevents(rows: Sequence[tuple[int, int]]) -> bool:
            by_share: dict[int, list[int]] = {}
            for share, place in rows:
                by_share.setdefault(share, []).append(place)
            change = Change(at=frozenset([guilty]), edit=without_rows(by_share))
            return not self._moves([change], f"without {len(rows)} rows")

        count = smallest_prefix(max(1, len(order) // 2), lambda k: prevents(order[:k]))
        if count is None:
            return None
        far = [row for row, (distance, *_) in zip(order, ranked, strict=True) if dense and distance >= FAR]
        tried = order[: min(max(2 * count, len(far)), self._limits.single_rows)]
        alone = [row for row in tried if not prevents([other for other in tried if other != row])]
        wanted = far if len(far) >= count else [row for row in order if row in alone] or order[:count]
        chosen = wanted if wanted == order[:count] or prevents(wanted) else order[:count]
        ids = {(share_key(part), i): int(row) for part in parts for i, row in enumerate(part.row_B)}
        return Rows(
            row_ids=sorted(ids[row] for row in chosen),
            alone=sorted(ids[row] for row in alone),
            of=len(order),
        )

    # Which tasks and layers, through which the batch harms the model.

    def _which_tasks(self, at: frozenset[int], batch: Sequence[Batch], guilty: int | None) -> Tasks:
        names = self._schema.task_names
        hidden = guilty is not None
        shared = [name for name, _ in self._engine.module.net.named_parameters() if not name.startswith("heads.")]
        self._engine.restore(self._state)
        norms = [
            float(torch.stack([g.norm() for g in of.values()]).norm()) if of else 0.0
            for of in self._engine.task_gradients(batch, shared)
        ]
        total = sum(norms) or 1.0

        def moves(factors: Mapping[int, float], question: str) -> bool:
            return self._moves([Change(at=at, unseen=hidden, weights=factors)], question)

        needed = [n for t, n in enumerate(names) if not moves({t: 0.0}, f"without the gradient of {n}")]
        alone = []
        if not needed and len(names) > 1:
            others = {t: {o: 0.0 for o in range(len(names)) if o != t} for t in range(len(names))}
            alone = [n for t, n in enumerate(names) if moves(others[t], f"with the gradient of {n} alone")]
        return Tasks(needed=needed, alone=alone, share={n: x / total for n, x in zip(names, norms, strict=True)})

    def _which_layers(self, at: frozenset[int], batch: Sequence[Batch], guilty: int | None) -> Layers:
        layers, hidden = self._layers(), guilty is not None
        every = frozenset(name for names in layers.values() for name in names)

        def moves(frozen: frozenset[str], question: str) -> bool:
            return self._moves([Change(at=at, unseen=hidden, frozen=frozen)], question)

        needed = [layer for layer, names in layers.items() if not moves(frozenset(names), f"with {layer} held still")]
        alone = []
        if not needed and len(layers) > 1:
            alone = [n for n, names in layers.items() if moves(every - set(names), f"with {n} moving alone")]
        return Layers(needed=needed, alone=alone, step=self._relative_steps(layers, batch))

    def _relative_steps(self, layers: Mapping[str, Sequence[str]], batch: Sequence[Batch]) -> dict[str, float]:
        """Largest move of a weight in the batch's step, over the root mean square of the layer's weights."""
        self._engine.restore(self._state)
        params = dict(self._engine.module.net.named_parameters())
        before = {name: param.detach().clone() for name, param in params.items()}
        self._engine.run([self._engine.step + 1], [batch])

        def relative(names: Sequence[str]) -> float:
            moved = max(float((params[n].detach() - before[n]).abs().max()) for n in names)
            size = torch.cat([before[n].flatten() for n in names]).square().mean().sqrt()
            return moved / max(float(size), 1e-12)

        return {layer: relative(names) for layer, names in layers.items()}

    def _layers(self) -> dict[str, list[str]]:
        """Parameters by the module they belong to; by its parents, where that gives too many."""
        names = [name for name, _ in self._engine.module.net.named_parameters()]
        deepest = max(name.count(".") for name in names)
        for depth in range(deepest, 0, -1):
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(".".join(name.split(".")[:-1][:depth]) or name, []).append(name)
            if len(groups) <= self._limits.layers:
                break
        return groups


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} features"
