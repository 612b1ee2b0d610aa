"""The schema of a log: features, time and tasks. It is read from a YAML file, so that a new log needs no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ranker.atomic import write_text
from ranker.data.columns import (
    CategoricalFeature,
    DenseFeature,
    GroupColumn,
    Task,
    Transform,
    from_plain,
    to_plain,
)
from ranker.data.filesystem import SCHEMA_FILE
from ranker.errors import UserError, one_of, suggest

__all__ = [
    "SCHEMA_FILE",
    "TIME_UNITS",
    "CategoricalFeature",
    "DenseFeature",
    "GroupColumn",
    "Schema",
    "Task",
    "Transform",
]

TIME_UNITS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which the plain loader keeps the last one without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":  # << may repeat keys, that is what it is for
            continue
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
        if name in seen:
            line = key.start_mark.line + 1
            raise yaml.constructor.ConstructorError(None, None, f"key '{name}' occurs twice, in line {line} again")
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Everything that a model and a loader need to know about a log.

    Attributes:
        name: name of the data set.
        time_column: the column that orders the log.
        time_unit: its unit, one of s, ms, us, ns (since the Unix epoch, UTC).
        dense: dense features, in the order of ``Batch.dense_BF``.
        categorical: categorical features. The one-hot ones, in this order, are ``Batch.onehot_BC``.
        tasks: tasks, in the order of ``Batch.labels_BT`` and of the model's logits.
        row_id: optional integer column that identifies a row, for audits. Default: the position in the log.
        weight: optional column with a number of at least 0, the weight of a row in losses and metrics. A row with
            weight w counts like w equal rows, and one with 0 for nothing. Without it, every row has weight 1.
        groups: keys that rows share, in the order of ``Batch.groups_BG``.

    Raises:
        UserError: a name is empty, occurs twice or contains '.' or '/', there is no task or no feature, a shared
            table does not exist or has another width, or a task names a group that does not exist.
    """

    name: str
    time_column: str
    time_unit: str = "ms"
    dense: tuple[DenseFeature, ...] = ()
    categorical: tuple[CategoricalFeature, ...] = ()
    tasks: tuple[Task, ...] = ()
    row_id: str = ""
    weight: str = ""
    groups: tuple[GroupColumn, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.time_unit, tuple(TIME_UNITS), f"schema '{self.name}': time_unit")
        for what, names in (
            ("feature", [f.name for f in self.dense] + [f.name for f in self.categorical]),
            ("task", [t.name for t in self.tasks]),
            ("group", [g.name for g in self.groups]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"schema '{self.name}': two {what}s are called '{name}'")
                if not name.strip():
                    raise UserError(f"schema '{self.name}': a {what} has no name")
                if "." in name or "/" in name:
                    raise UserError(f"schema '{self.name}': {what} name '{name}' must not hold '.' or '/'")
        if not self.tasks:
            raise UserError(f"schema '{self.name}': no task; give at least one under tasks:")
        if not self.dense and not self.categorical:
            raise UserError(f"schema '{self.name}': no feature; give some under dense: or categorical:")
        for feature in self.categorical:
            self._check_shared_table(feature)
        for task in self.tasks:
            if task.group and task.group not in self.group_names:
                raise UserError(
                    f"schema '{self.name}': group '{task.group}' of task '{task.name}' is not under groups:; "
                    f"{suggest(task.group, self.group_names)}"
                )
        if not self.time_column.strip():
            raise UserError(f"schema '{self.name}': time_column is empty; name the column that orders the log")

    def label_features(self) -> Iterator[str]:
        """One line for each label or mask that is a feature too: the model would read what it is to predict."""
        features = {f.column: f.name for f in self.dense} | {f.column: f.name for f in self.categorical}
        for task in self.tasks:
            for what, column in (("label", task.column), ("mask", task.mask)):
                if column and column in features:
                    yield (
                        f"column '{column}' is the {what} of task '{task.name}' and feature '{features[column]}', so "
                        f"the model reads the answer: leave it out with data.drop_features=[{features[column]}]"
                    )

    def _check_shared_table(self, feature: CategoricalFeature) -> None:
        if not feature.table:
            return
        where = f"schema '{self.name}': categorical feature '{feature.name}'"
        owners = {f.name: f for f in self.categorical if not f.table}
        if feature.table not in owners:
            raise UserError(f"{where}: table '{feature.table}' is no feature; {suggest(feature.table, owners)}")
        if owners[feature.table].embedding_dim != feature.embedding_dim:
            raise UserError(f"{where}: embedding_dim differs from that of '{feature.table}', whose table it shares")

    @cached_property
    def one_hot(self) -> tuple[CategoricalFeature, ...]:
        """Features with one id per row."""
        return tuple(f for f in self.categorical if f.kind == "one_hot")

    @cached_property
    def ragged(self) -> tuple[CategoricalFeature, ...]:
        """Features with a list of ids per row."""
        return tuple(f for f in self.categorical if f.kind != "one_hot")

    @property
    def feature_names(self) -> list[str]:
        """Names of all features, dense first."""
        return [f.name for f in self.dense] + [f.name for f in self.categorical]

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of the logits."""
        return [t.name for t in self.tasks]

    @property
    def group_names(self) -> list[str]:
        """Names of the groups, in the order of ``Batch.groups_BG``."""
        return [g.name for g in self.groups]

    def group_of(self, task: Task) -> str:
        """Name of the group inside which a ranking loss compares rows of a task. Empty if the schema has none."""
        return task.group or (self.groups[0].name if self.groups else "")

    def table_of(self, feature: CategoricalFeature) -> CategoricalFeature:
        """The feature that owns the table (and the id mapping) that this one uses."""
        return next(f for f in self.categorical if f.name == (feature.table or feature.name))

    def columns(self) -> list[str]:
        """All Parquet columns that must be read, each once."""
        names = [self.time_column, *([self.row_id] if self.row_id else []), *self.feature_columns()]
        for task in self.tasks:
            names += [task.column, *([task.mask] if task.mask else [])]
        names += [*([self.weight] if self.weight else []), *(g.column for g in self.groups)]
        return list(dict.fromkeys(names))

    def feature_columns(self) -> list[str]:
        """The Parquet columns that a model reads, each once. Rows to be scored need no others."""
        return list(dict.fromkeys([f.column for f in self.dense] + [f.column for f in self.categorical]))

    def select(
        self,
        *,
        tasks: Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        drop_features: Sequence[str] = (),
    ) -> Schema:
        """The schema with fewer tasks or features.

        Args:
            tasks: names to keep. The schema's order stays. None keeps all.
            features: names to keep. None keeps all.
            drop_features: names to leave out.

        Raises:
            UserError: a name is not in the schema.
        """
        for what, asked, known in (
            ("task", tasks or (), self.task_names),
            ("feature", [*(features or ()), *drop_features], self.feature_names),
        ):
            for name in asked:
                if name not in known:
                    raise UserError(f"schema '{self.name}' has no {what} '{name}'; {suggest(name, known)}")
        kept = set(self.feature_names if features is None else features) - set(drop_features)
        categorical = [f for f in self.categorical if f.name in kept]
        names = {f.name for f in categorical}
        for i, feature in enumerate(categorical):
            if feature.table and feature.table not in names:
                # The owner of a shared table is removed: the first remaining feature that shares it becomes the owner.
                owner = self.table_of(feature)
                categorical[i] = dataclasses.replace(
                    owner,
                    name=feature.name,
                    column=feature.column,
                    kind=feature.kind,
                    max_length=feature.max_length,
                )
                for j in range(i + 1, len(categorical)):
                    if categorical[j].table == feature.table:
                        categorical[j] = dataclasses.replace(categorical[j], table=feature.name)
        return dataclasses.replace(
            self,
            tasks=tuple(t for t in self.tasks if tasks is None or t.name in tasks),
            dense=tuple(f for f in self.dense if f.name in kept),
            categorical=tuple(categorical),
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "schema") -> Schema:
        """Makes a schema from plain data.

        Args:
            raw: the mapping, as read from YAML.
            source: name used in errors, usually the file's path.

        Raises:
            UserError: an unknown key, a missing one, or a value of the wrong kind.
        """
        if not isinstance(raw, Mapping):
            raise UserError(f"{source}: a schema is a mapping with name, time_column, tasks and features")
        parts: dict[str, Any] = dict(raw)
        kinds = {"dense": DenseFeature, "categorical": CategoricalFeature, "tasks": Task, "groups": GroupColumn}
        for key, kind in kinds.items():
            entries = parts.get(key) or ()
            if not isinstance(entries, Sequence) or isinstance(entries, str):
                raise UserError(f"{source}: '{key}' must be a list")
            parts[key] = tuple(from_plain(kind, entry, f"{source}: {key}[{i}]") for i, entry in enumerate(entries))
        return from_plain(cls, parts, source)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Schema:
        """Reads a schema file.

        Raises:
            UserError: the file does not exist or does not describe a schema.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no schema at {path}: a data set needs a {SCHEMA_FILE} beside its Parquet files")
        return cls.from_text(path.read_bytes(), source=str(path))

    @classmethod
    def from_text(cls, text: str | bytes, *, source: str = "schema") -> Schema:
        """Makes a schema from the content of its file.

        Args:
            text: YAML.
            source: name used in errors, usually the file's path.

        Raises:
            UserError: it is not YAML, or it does not describe a schema.
        """
        try:
            raw = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-30
            words = " ".join(str(error).split())
            printable = "".join(c if c.isprintable() else "?" for c in words)
            raise UserError(f"{source} is not YAML: {printable}") from error
        return cls.from_dict(raw, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without default values."""
        plain: dict[str, Any] = {
            "name": self.name,
            "time_column": self.time_column,
            "time_unit": self.time_unit,
        }
        if self.row_id:
            plain["row_id"] = self.row_id
        if self.weight:
            plain["weight"] = self.weight
        for key in ("dense", "categorical", "tasks", "groups"):
            if key != "groups" or self.groups:
                plain[key] = [to_plain(entry) for entry in getattr(self, key)]
        return plain

    def to_yaml(self, path: str | Path) -> None:
        """Writes the schema file."""
        write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120))
