"""The interface of a metric that is computed from rows, and the table of numbers that one may leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ranker.data.schema import Schema, Task
from ranker.errors import UserError, suggest
from ranker.metrics.rows import Ranked, TaskRows
from ranker.metrics.statistic import Statistic


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers by segment or bucket, for summary.json and the report page.

    Attributes:
        task: name of the task.
        name: what is in it, such as ``ne.tab``.
        columns: names of the columns.
        rows: a row of values for each segment or bucket.
    """

    task: str
    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"task": self.task, "name": self.name, "columns": list(self.columns), "rows": [*map(list, self.rows)]}


class RowMetric(ABC):
    """A metric of each task. One of your own is a subclass, named in ``metrics.extra.NAME._target_``.

    A subclass says which tasks it is for, which groups and features it needs, and computes ``statistics`` from the rows
    of one task. It need not know of ranks, batches, weights of the log or bootstraps: it gets all rows with their
    weights.

    Attributes:
        types: the types of tasks that it is for.
    """

    types: ClassVar[tuple[str, ...]] = ("binary",)

    def groups(self, schema: Schema) -> list[str]:  # noqa: ARG002
        """Names of the groups that it needs.

        Raises:
            UserError: the schema does not have one.
        """
        return []

    def features(self, schema: Schema) -> list[str]:  # noqa: ARG002
        """Names of the one-hot features that it needs.

        Raises:
            UserError: the schema does not have one.
        """
        return []

    @abstractmethod
    def names(self, schema: Schema, task: Task) -> list[str]:
        """Names of its values for a task. They hold no '/'."""

    @abstractmethod
    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """Its values for a task, by name.

        Args:
            rows: the observed rows of the task, at least one.
        """

    def tables(self, rows: TaskRows, schema: Schema) -> list[Table]:  # noqa: ARG002
        """Tables for the end of training."""
        return []


class GroupedMetric(RowMetric):
    """A metric inside groups, for each of some groups. Its names end in ``.<group>``.

    Args:
        group: name of a group, or several; None for all of the schema.
    """

    def __init__(self, *, group: str | Sequence[str] | None = None) -> None:
        self._group = [group] if isinstance(group, str) else group

    def groups(self, schema: Schema) -> list[str]:
        """The groups by which it is computed.

        Raises:
            UserError: the schema does not have one.
        """
        for name in self._group or ():
            if name not in schema.group_names:
                raise UserError(
                    f"metrics: schema '{schema.name}' has no group '{name}'; {suggest(name, schema.group_names)}"
                )
        return schema.group_names if self._group is None else list(self._group)

    def names(self, schema: Schema, task: Task) -> list[str]:  # noqa: ARG002
        """Each value's name with each group's."""
        return [f"{value}.{group}" for value in self.values() for group in self.groups(schema)]

    @abstractmethod
    def values(self) -> list[str]:
        """Names of its values without the group."""

    @abstractmethod
    def in_groups(self, ranked: Ranked) -> Mapping[str, Statistic]:
        """Its values for one group, by names without the group."""

    def statistics(self, rows: TaskRows) -> Mapping[str, Statistic]:
        """Its values for each group."""
        names = list(rows.keys) if self._group is None else self._group
        found = {name: self.in_groups(rows.ranked(name)) for name in names}
        return {f"{value}.{name}": statistic for name, by in found.items() for value, statistic in by.items()}
