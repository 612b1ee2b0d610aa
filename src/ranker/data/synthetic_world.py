"""The generator of the synthetic log: users, items, labels and dense signals, and their drift over time.

Everything is a closed form of (seed, block, time). No state is carried from row to row, so any block of the log can
be generated on its own. Legend: B rows, K latent factors, F dense signals, T tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranker.errors import UserError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FACTORS = 8
CATEGORIES = 32
SEGMENTS = 16
SURFACES = 4
TAGS = 64
MAX_TAGS = 4
HISTORY = 10
AUTHOR_SHARE = 10  # items per author
POSITIVE_RATES = {"click": 0.4, "like": 0.12, "share": 0.04, "follow": 0.012}
TASKS = (*POSITIVE_RATES, "rating", "watch_time")
CALIBRATION_BLOCK = 2**31  # no log is that long
_ONE_THREAD = 2**17  # multiplications; OpenBLAS begins to share at 2**18


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard the stream is. A setting of 0 switches its cause off.

    Attributes:
        signal: standard deviation of the log-odds of a click. With 1.5 a perfect model reaches an AUC near 0.8.
        drift: how far latent factors and task weights move, in units of their standard deviation.
        drift_days: shortest period of that movement, in days. The longest is four times as long.
        tail: heaviness of the dense signals, ``exp(tail * z)`` of a normal z (log-normal). 0 leaves them normal.
        jump: factor by which the scale of a dense signal sometimes jumps, up or down.
        jump_share: share of quarter days in which a signal has another scale.
        quiet_days: days at the start in which no scale jumps, so that a model can learn before it is hit.
        arrivals: share of all items replaced by new ones each day.

    Raises:
        UserError: a setting is out of range.
    """

    signal: float = 1.5
    drift: float = 0.5
    drift_days: float = 4.0
    tail: float = 1.0
    jump: float = 30.0
    jump_share: float = 0.01
    quiet_days: float = 0.0
    arrivals: float = 0.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            high = 1.0 if name == "jump_share" else math.inf
            least = 1e-6 if name in ("signal", "drift_days") else 0.0
            if not least <= value <= high:
                raise UserError(f"synthetic log: {name} must be between {least:g} and {high:g}, got {value}")


@dataclass(frozen=True)
class Block:
    """Raw columns of consecutive rows. Ids start at 0."""

    one_hot: dict[str, Ints]
    ragged: dict[str, tuple[Ints, Ints]]
    dense: dict[str, Floats]
    labels: dict[str, Floats]
    rating_observed: NDArray[np.bool_]

    def rows(self, which: slice) -> Block:
        """Some of the rows."""
        ragged = {}
        for name, (values, offsets) in self.ragged.items():
            kept = offsets[which.start : which.stop + 1]
            ragged[name] = values[kept[0] : kept[-1]], kept - kept[0]
        return Block(
            {name: values[which] for name, values in self.one_hot.items()},
            ragged,
            {name: values[which] for name, values in self.dense.items()},
            {name: values[which] for name, values in self.labels.items()},
            self.rating_observed[which],
        )


def product(x_BK: Floats, y_KF: Floats) -> Floats:
    """``x @ y`` in pieces too small for BLAS to use several threads, whose number would change the last bits."""
    rows = max(1, _ONE_THREAD // y_KF.size)
    result = np.empty((len(x_BK), y_KF.shape[1]), dtype=np.result_type(x_BK, y_KF))
    for start in range(0, len(x_BK), rows):
        np.matmul(x_BK[start : start + rows], y_KF, out=result[start : start + rows])
    return result


def zipf_rank(uniform: NDArray[np.float64], size: int, exponent: float) -> Ints:
    """Ranks 0 .. size-1 with a frequency of about ``(1 + rank)^-exponent``, by the inverse of the continuous law."""
    if exponent == 1.0:
        position = (size + 1.0) ** uniform
    else:
        power = 1.0 - exponent
        position = (((size + 1.0) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)
    return np.minimum(position.astype(np.int64) - 1, size - 1)


class World:
    """Users, items and tasks, drawn once from the seed. ``block`` generates rows at given times.

    Args:
        seed: any non-negative integer.
        num_users: number of users. All exist from the start.
        num_items: number of items alive at any time. New items with ever larger ids replace the oldest.
        signals: F, number of dense signals besides the named ones.
        difficulty: how hard the stream is.
    """

    def __init__(self, *, seed: int, num_users: int, num_items: int, signals: int, difficulty: Difficulty) -> None:
        self.seed, self.num_users, self.num_items, self.signals = seed, num_users, num_items, signals
        self.difficulty = difficulty
        rng = np.random.default_rng([seed, 0])
        # One more than the items, so that the item that replaces another has another profile.
        self.profiles = num_items + 1
        self._draw_entities(rng)
        self._draw_tasks(rng)
        self._draw_signals(rng)
        self._calibrate()

    def _draw_entities(self, rng: np.random.Generator) -> None:
        def normal(*shape: int) -> Floats:
            return rng.standard_normal(shape, dtype=np.float32)

        self.user_order = rng.permutation(self.num_users)
        self.item_order = rng.permutation(self.num_items)
        self.user_UK = normal(self.num_users, FACTORS)
        self.item_MK = normal(self.profiles, FACTORS)
        self.item_phase_MK = rng.random((self.profiles, FACTORS), dtype=np.float32)
        self.item_frequency_K = self._frequencies(rng, FACTORS)
        self.user_activity = np.exp(1.5 * normal(self.num_users) + 3)
        self.user_tenure = rng.random(self.num_users, dtype=np.float32) * 2000
        self.segment = np.argmax(product(self.user_UK, normal(FACTORS, SEGMENTS)), axis=1)
        self.category = np.argmax(product(self.item_MK, normal(FACTORS, CATEGORIES)), axis=1)
        tag_affinity = product(self.item_MK, normal(FACTORS, TAGS))
        self.tags = np.argpartition(-tag_affinity, MAX_TAGS, axis=1)[:, :MAX_TAGS].astype(np.int64)
        self.tag_count = rng.integers(0, MAX_TAGS + 1, self.profiles)
        # The items that a user watched before the log starts: the favourites among a few random items.
        offered = rng.integers(0, self.num_items, (self.num_users, 4 * HISTORY))
        liked = np.einsum("uk,uhk->uh", self.user_UK, self.item_MK[offered])
        best = np.argpartition(-liked, HISTORY, axis=1)[:, :HISTORY]
        self.history = np.take_along_axis(offered, best, axis=1)
        self.history_length = np.minimum(rng.geometric(0.15, self.num_users) - 1, HISTORY)

    def _draw_tasks(self, rng: np.random.Generator) -> None:
        shape = (3 * FACTORS, len(TASKS))
        common, own = rng.standard_normal((shape[0], 1)), rng.standard_normal(shape)
        self.weight_KT = (common + own).astype(np.float32)
        self.weight_phase_KT = rng.random(shape, dtype=np.float32)
        self.weight_frequency_KT = self._frequencies(rng, *shape)

    def _draw_signals(self, rng: np.random.Generator) -> None:
        mix = rng.standard_normal((3 * FACTORS, self.signals))
        # Columns have unit norm. The tail is exponential in the standard deviation, so one wide signal would dominate.
        self.signal_KF = (mix / np.linalg.norm(mix, axis=0)).astype(np.float32)
        self.signal_phase_F = rng.random(self.signals, dtype=np.float32)
        self.signal_frequency_F = self._frequencies(rng, self.signals)

    def _frequencies(self, rng: np.random.Generator, *shape: int) -> Floats:
        """Cycles per day. Periods are between drift_days and four times that."""
        return (1.0 / (self.difficulty.drift_days * (1 + 3 * rng.random(shape)))).astype(np.float32)

    def _calibrate(self) -> None:
        """Computes the scale of each task's score, and the intercept that gives a binary task its rate of positives."""
        self.intercept_T = np.zeros(len(TASKS), dtype=np.float32)
        self.score_scale_T = np.ones(len(TASKS), dtype=np.float32)
        rng = self._generator(CALIBRATION_BLOCK)
        days = np.linspace(0, 8 * self.difficulty.drift_days, 16_384)
        score_BT = self._scores(*self._latents(*self._who(rng, days), days), days)
        self.score_scale_T = (self.difficulty.signal / score_BT.std(axis=0)).astype(np.float32)
        score_BT = score_BT * self.score_scale_T
        for t, rate in enumerate(POSITIVE_RATES.values()):
            low, high = -20.0, 20.0
            for _ in range(40):
                middle = (low + high) / 2
                too_many = np.mean(1 / (1 + np.exp(-(score_BT[:, t] + middle)))) > rate
                low, high = (low, middle) if too_many else (middle, high)
            self.intercept_T[t] = middle

    def _generator(self, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.seed, 1, block]))

    def block(self, number: int, days_B: NDArray[np.float64]) -> Block:
        """Rows of one block.

        Args:
            number: the block's number. With the seed it determines every random draw.
            days_B: time of each row in days since the stream began, ascending.
        """
        rng = self._generator(number)
        user, item = self._who(rng, days_B)
        user_BK, item_BK = self._latents(user, item, days_B)
        labels, observed = self._labels(rng, self._scores(user_BK, item_BK, days_B))
        profile = item % self.profiles
        one_hot = {
            "user_id": user,
            "item_id": item,
            "author_id": profile // AUTHOR_SHARE,
            "category": self.category[profile],
            "segment": self.segment[user],
            "surface": rng.integers(0, SURFACES, len(days_B)),
            "hour": (days_B * 24).astype(np.int64) % 24,
        }
        ragged = {"tags": self._tags(profile), "history": self._history(user, days_B)}
        dense = self._dense(rng, user, item, user_BK, item_BK, days_B)
        return Block(one_hot, ragged, dense, labels, observed)

    def _who(self, rng: np.random.Generator, days_B: NDArray[np.float64]) -> tuple[Ints, Ints]:
        """Users and items of the rows, both by Zipf's law. Of the items in a slot, the one alive at that time."""
        user = self.user_order[zipf_rank(rng.random(len(days_B)), self.num_users, 0.6)]
        slot = self.item_order[zipf_rank(rng.random(len(days_B)), self.num_items, 1.0)]
        return user, slot + self.num_items * ((self._newest(days_B) - slot) // self.num_items)

    def _newest(self, days_B: NDArray[np.float64]) -> Ints:
        """The largest item id at a time. Ids are consecutive and arrive at a steady rate."""
        return self.num_items - 1 + (days_B * self.difficulty.arrivals * self.num_items).astype(np.int64)

    def _latents(self, user: Ints, item: Ints, days_B: NDArray[np.float64]) -> tuple[Floats, Floats]:
        profile = item % self.profiles
        turn_BK = self.item_phase_MK[profile] + self._turns(days_B, self.item_frequency_K)
        item_BK = self.item_MK[profile] + self.difficulty.drift * np.sin(2 * np.pi * turn_BK)
        return self.user_UK[user], item_BK

    @staticmethod
    def _turns(days_B: NDArray[np.float64], frequency: Floats) -> Floats:
        # Whole turns are removed in float64. Otherwise a stream of many days would lose its phase in float32.
        return np.mod(days_B[:, None] * frequency, 1.0).astype(np.float32)

    def _scores(self, user_BK: Floats, item_BK: Floats, days_B: NDArray[np.float64]) -> Floats:
        """Log-odds per task: a linear function of user, item and their product, with weights that drift."""
        turn_KT = np.mod(self.weight_phase_KT + days_B.mean() * self.weight_frequency_KT, 1.0)
        weight_KT = self.weight_KT + self.difficulty.drift * np.sin(2 * np.pi * turn_KT).astype(np.float32)
        x_BK = np.concatenate([user_BK, item_BK, user_BK * item_BK], axis=1)
        return product(x_BK, weight_KT) * self.score_scale_T + self.intercept_T

    def _labels(self, rng: np.random.Generator, score_BT: Floats) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
        rows = len(score_BT)
        binary = len(POSITIVE_RATES)
        drawn = rng.random((rows, binary), dtype=np.float32) < 1 / (1 + np.exp(-score_BT[:, :binary]))
        labels = {name: drawn[:, t].astype(np.float32) for t, name in enumerate(POSITIVE_RATES)}
        noise = rng.standard_normal((2, rows), dtype=np.float32)
        labels["rating"] = np.clip(3 + 0.5 * score_BT[:, binary] + 0.7 * noise[0], 1, 5)
        # Seconds. A tenth of the rows is skipped at once. Median near 5 s, 99th percentile near 400 s.
        seconds = np.exp(np.minimum(1.7 + 0.8 * score_BT[:, binary + 1] + 1.4 * noise[1], 9))
        labels["watch_time"] = np.where(rng.random(rows) < 0.1, 0, seconds).astype(np.float32)
        return labels, rng.random(rows) < 0.5

    def _tags(self, profile: Ints) -> tuple[Ints, Ints]:
        return _ragged(self.tags[profile], self.tag_count[profile])

    def _history(self, user: Ints, days_B: NDArray[np.float64]) -> tuple[Ints, Ints]:
        """Items watched before. The selection rotates from day to day."""
        start = (user + days_B.astype(np.int64))[:, None]
        order = (start + np.arange(HISTORY)) % HISTORY
        return _ragged(self.history[user[:, None], order], self.history_length[user])

    def _dense(
        self,
        rng: np.random.Generator,
        user: Ints,
        item: Ints,
        user_BK: Floats,
        item_BK: Floats,
        days_B: NDArray[np.float64],
    ) -> dict[str, Floats]:
        """Dense features as in a production log: raw, heavy-tailed, drifting, and sometimes at another scale."""
        knobs = self.difficulty
        x_BK = np.concatenate([user_BK, item_BK, user_BK * item_BK], axis=1)
        z_BF = product(x_BK, self.signal_KF) + 0.5 * rng.standard_normal((len(user), self.signals), dtype=np.float32)
        z_BF += knobs.drift * np.sin(2 * np.pi * (self.signal_phase_F + self._turns(days_B, self.signal_frequency_F)))
        if knobs.tail > 0:
            z_BF = np.exp(np.clip(knobs.tail * z_BF, -12, 12))
        z_BF *= self._scales(days_B)
        age = days_B + (self.num_items - 1 - item) / max(knobs.arrivals * self.num_items, 1e-9)
        dense = {
            "user_activity": self.user_activity[user] * (1 + rng.random(len(user), dtype=np.float32)),
            "user_tenure_days": self.user_tenure[user] + days_B.astype(np.float32),
            "item_age_days": np.clip(age, 0, 1000).astype(np.float32),
        }
        return dense | {f"signal_{f:02d}": z_BF[:, f] for f in range(self.signals)}

    def _scales(self, days_B: NDArray[np.float64]) -> Floats:
        """Scale of each signal: ``jump`` or 1 / jump in randomly drawn quarter days, otherwise 1."""
        knobs = self.difficulty
        quarter = (days_B * 4).astype(np.int64)
        numbers, place_B = np.unique(quarter, return_inverse=True)
        scales = np.ones((len(numbers), self.signals), dtype=np.float32)
        if knobs.jump > 0:
            for i, number in enumerate(numbers):
                rng = np.random.Generator(np.random.SFC64([self.seed, 2, int(number)]))
                jumps = (rng.random(self.signals) < knobs.jump_share) & (number >= 4 * knobs.quiet_days)
                scales[i, jumps] = knobs.jump ** rng.choice([-1.0, 1.0], int(jumps.sum()))
        return scales[place_B]


def _ragged(values_BL: Ints, length_B: Ints) -> tuple[Ints, Ints]:
    """The first length_B entries of each row, concatenated, and the offsets."""
    offsets = np.zeros(len(length_B) + 1, dtype=np.int64)
    np.cumsum(length_B, out=offsets[1:])
    return values_BL[np.arange(values_BL.shape[1]) < length_B[:, None]], offsets
