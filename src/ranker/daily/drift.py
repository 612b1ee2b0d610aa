"""The drift guard: compares a day with the days before it, before the model sees the day."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ranker.daily.day_statistics import DayStatistics, DenseDay
from ranker.daily.settings import DriftSettings
from ranker.data.schema import Schema

_UNITS = {1000.0: "a thousand, as from seconds to milliseconds", 60.0: "60, as from minutes to seconds"}
_UNITS |= {3600.0: "3600, as from hours to seconds", 1e6: "a million, as from seconds to microseconds"}
_UNITS |= {100.0: "a hundred, as from euros to cents or from shares to per cent"}
_BINS = 10
_LEAST_SHARE = 0.005  # of a bin, half of what 101 quantiles can tell
_ERRORS = 5.0  # standard errors of a rate that count as chance: many rates are looked at each day


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How a day compares with the past.

    Attributes:
        psi: by dense feature, population stability index against the past days.
        labels: by task, mean of the observed labels.
        new_ids: by one-hot feature, share of rows with an id that no past day had; empty without a past.
        alarms: what is far outside, one line each.
    """

    psi: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, float | None] = field(default_factory=dict)
    new_ids: Mapping[str, float] = field(default_factory=dict)
    alarms: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for days.jsonl."""
        return {
            "psi": dict(self.psi),
            "labels": dict(self.labels),
            "new_ids": dict(self.new_ids),
            "alarms": list(self.alarms),
        }


def compare(
    day: DayStatistics, past: Sequence[DayStatistics], past_new_ids: Sequence[Mapping[str, float]],
    schema: Schema, settings: DriftSettings,
) -> Drift:  # fmt: skip
    """Compares a day with the past days, oldest first.

    Args:
        day: the day.
        past: the days before it that were looked at.
        past_new_ids: the shares of new ids of those days, as far as they are known.
        schema: features and tasks.
        settings: how far is far.
    """
    labels = {name: mean for name, (_, mean) in day.labels.items()}
    if not past:
        return Drift(labels=labels)
    psi = {
        f.name: population_stability([x.dense[f.name] for x in past if f.name in x.dense], day.dense[f.name])
        for f in schema.dense
    }
    new_ids = _new_ids(day, past, schema)
    alarms: list[str] = []
    if len(past) >= settings.min_days:
        for feature in schema.dense:
            before = [x.dense[feature.name] for x in past if feature.name in x.dense]
            if before:
                alarms += _dense_alarms(feature.name, day.dense[feature.name], before, psi[feature.name], settings)
        for task in schema.tasks:
            alarms += _label_alarms(task.name, task.type == "binary", day, past, settings)
        alarms += _id_alarms(new_ids, past_new_ids, settings)
    return Drift(psi=psi, labels=labels, new_ids=new_ids, alarms=alarms)


def population_stability(past: Sequence[DenseDay], now: DenseDay) -> float:
    """Population stability index of a feature; nan without values.

        PSI = sum over bins of (p - q) ln(p / q)

    q are the shares of the past days and p those of the day. The bins are the deciles of the past days (the mean of
    theirs), joined where they are equal. Shares come from 101 quantiles, and count as at least 0.005.

    Source: Siddiqi, Credit Risk Scorecards (2006), where 0.25 is called a large change.
    """
    known = [np.asarray(x.quantiles) for x in past if len(x.quantiles)]
    if not known or not len(now.quantiles):
        return math.nan
    edges = np.unique(np.mean([x[10:100:10] for x in known], axis=0))
    p = _shares(np.asarray(now.quantiles), edges)
    q = np.mean([_shares(x, edges) for x in known], axis=0)
    return float(((p - q) * np.log(p / q)).sum())


def _shares(quantiles: Any, edges: Any) -> Any:
    below = np.searchsorted(quantiles, edges, side="right") / len(quantiles)
    shares = np.diff(np.concatenate([[0.0], below, [1.0]]))
    shares = np.maximum(shares, _LEAST_SHARE)
    return shares / shares.sum()


def _dense_alarms(name: str, now: DenseDay, past: Sequence[DenseDay], psi: float, settings: DriftSettings) -> list[str]:
    alarms = []
    scales = [scale for day in past for scale in day.scales]
    if scales and now.scales:
        low, high = min(scales), max(scales)
        up, down = max(now.scales) / high, low / min(now.scales)
        factor, grown = (up, True) if up >= down else (down, False)
        if factor > settings.scale:
            middle = float(np.median(scales))
            against = max(now.scales) / middle if grown else middle / min(now.scales)
            unit = next((words for x, words in _UNITS.items() if 0.7 < against / x < 1.4), "")
            here = "in a quarter of the day" if len(now.scales) > 1 and _differs(now.scales, settings) else "all day"
            size = max(now.scales) if grown else min(now.scales)
            guess = f"; the factor is near {unit}: did its unit change?" if unit else ""
            alarms.append(
                f"dense feature '{name}': its values are {factor:.3g} times {'larger' if grown else 'smaller'} than in "
                f"any quarter of the past {len(past)} days ({here}; median size {size:.4g}, before {low:.4g} to "
                f"{high:.4g}){guess}"
            )
    elif scales and not now.scales:
        alarms.append(f"dense feature '{name}': all values are 0 or null")
    before = [x.nulls for x in past if x.nulls is not None]
    if before and now.nulls is not None and now.nulls > max(before) + settings.nulls:
        alarms.append(f"dense feature '{name}': {now.nulls:.1%} are null, before at most {max(before):.1%}")
    if not alarms and psi > settings.psi:
        alarms.append(f"dense feature '{name}': its distribution changed (PSI {psi:.2f}, limit {settings.psi:g})")
    return alarms


def _differs(scales: Sequence[float], settings: DriftSettings) -> bool:
    return max(scales) > math.sqrt(settings.scale) * min(scales)


def _label_alarms(
    name: str, binary: bool, day: DayStatistics, past: Sequence[DayStatistics], settings: DriftSettings
) -> list[str]:
    count, mean = day.labels[name]
    before = [(n, m) for n, m in (x.labels[name] for x in past if name in x.labels) if m is not None]
    if not before:
        return []
    if mean is None:
        return [f"task '{name}': no label is observed"]
    means = [m for _, m in before]
    low, high = min(means), max(means)
    if binary:
        error = _ERRORS * math.sqrt(max(high * (1 - high), 1.0 / count) / count)
        outside = mean > high * settings.label + error or mean < low / settings.label - error
        if outside or (mean == 0 and low * count > _ERRORS**2):
            return [f"task '{name}': the rate of positives is {mean:.4g}, before {low:.4g} to {high:.4g}"]
    elif low > 0 and (mean > high * settings.label or mean < low / settings.label):
        return [f"task '{name}': the mean label is {mean:.4g}, before {low:.4g} to {high:.4g}"]
    return []


def _new_ids(day: DayStatistics, past: Sequence[DayStatistics], schema: Schema) -> dict[str, float]:
    found = {}
    for feature in schema.one_hot:
        table = schema.table_of(feature).name
        rows, counts = day.ids[feature.name]
        known = [x.seen[table] for x in past if table in x.seen and len(x.seen[table]) == len(day.seen[table])]
        if known and counts.sum():
            seen = np.logical_or.reduce(known)
            found[feature.name] = float(counts[~seen[rows]].sum() / counts.sum())
    return found


def _id_alarms(now: Mapping[str, float], past: Sequence[Mapping[str, float]], settings: DriftSettings) -> list[str]:
    alarms = []
    for name, share in now.items():
        before = [x[name] for x in past if name in x]
        if before and share > max(before) + settings.new_ids:
            alarms.append(
                f"feature '{name}': {share:.1%} of the rows have an id that the past days did not have, before at most "
                f"{max(before):.1%}"
            )
    return alarms
