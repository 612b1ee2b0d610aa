"""The reference of every option as Markdown, made from conf/ and from the docstrings of what the options build.

    python scripts/site/option_reference.py > options.md

The explanation of a key is the comment beside it, else the comment above it, else what the docstring of the
``_target_`` around it says, else that of the same key in another file, else that of the part that it belongs to.
Nothing is imported: docstrings are read from the sources by griffe.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import griffe
import yaml

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"_target_", "_partial_", "defaults"}  # said in a sentence, not in a row
# Groups that train.py does not take as GROUP=OPTION, and how their keys are given.
ELSEWHERE = {
    "gate": "Options of `scripts/export.py`: `min_auc` is `--min-auc`, and `--gate NAME` chooses another file.",
    "hydra/sweeper": "Chosen with `hydra/sweeper=NAME`. `scripts/stability.py` takes the keys of `headroom` as "
    "`headroom.NAME=VALUE`.",
}
ORDER = ("model", "optim", "data", "scale", "trainer", "mitigation", "callbacks", "logger", "experiment")
# The group's keys are absolute: they are read without the group's name in front.
ABSOLUTE = ("", "gate")
INTRO = """# Every option

Made from the files in `conf/` and the docstrings of what they build, each time this site is built. Give a value as
`KEY=VALUE` and an option of a group as `GROUP=NAME`. A key with `+` in front is added, `~KEY` is removed.
`python train.py --cfg job` prints the composed configuration with the values that will be used.

"""


@dataclass(frozen=True)
class Option:
    """One key.

    Attributes:
        key: as it is given on the command line.
        default: the source text of its value; empty for a part that only holds other keys.
        meaning: one line; empty where nothing explains it.
        type: its annotation, of the fields of a dataclass.
    """

    key: str
    default: str
    meaning: str
    type: str = ""


@dataclass(frozen=True)
class ConfigFile:
    """One file of conf/.

    Attributes:
        group: its folder, such as ``model``; empty for conf/config.yaml.
        name: its name without ending.
        text: the comment at its top.
        starts_from: files of the same group that it inherits from.
        sets: choices of other groups that it makes, as ``GROUP=NAME``.
        builds: what its parts build, by their key.
        options: its keys, in the order of the file.
    """

    group: str
    name: str
    text: str
    starts_from: Sequence[str]
    sets: Sequence[str]
    builds: Mapping[str, str]
    options: Sequence[Option]


@lru_cache
def _package(name: str) -> Any:
    """A package of src/ as griffe reads it."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    return griffe.load(name, search_paths=[str(ROOT / "src")], docstring_parser="google")


def documented(target: str) -> dict[str, str]:
    """What the docstring of a class or function says of its arguments; empty for one outside this project.

    Args:
        target: its import path. A re-export is followed.
    """
    package, _, inner = target.partition(".")
    if package not in ("ranker", "optim"):
        return {}
    try:
        thing = _package(package)[inner]
        thing = thing.final_target if thing.is_alias else thing
    except KeyError:
        return {}
    if thing.docstring is None:
        return {}
    kinds = (griffe.DocstringSectionKind.attributes, griffe.DocstringSectionKind.parameters)
    parts = [section for section in thing.docstring.parsed if section.kind in kinds]
    return {entry.name.lstrip("*"): " ".join(entry.description.split()) for part in parts for entry in part.value}


def read(path: Path, conf: Path) -> ConfigFile:
    """One file of the configuration.

    Args:
        path: the file.
        conf: the folder that holds the groups.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in _leading(lines)]
    group = path.parent.relative_to(conf).as_posix()
    group = "" if group == "." else group
    absolute = any(line.startswith("@package _global_") for line in head) or group in ABSOLUTE
    node = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    plain = yaml.safe_load("\n".join(lines)) or {}
    builds: dict[str, str] = {}
    options = list(_options(pairs, lines, "" if absolute else group.replace("/", "."), {}, builds))
    inherited, chosen = _defaults(plain.get("defaults", []))
    text = "\n".join(line for line in head if not line.startswith("@package"))
    return ConfigFile(group, path.stem, text, inherited, chosen, builds, options)


def _leading(lines: Sequence[str]) -> list[str]:
    """The comment lines at the top of a file."""
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return list(lines[:end])


def _defaults(entries: Sequence[Any]) -> tuple[list[str], list[str]]:
    """From a defaults list: the files of the same group, and the choices of other groups."""
    inherited = [entry for entry in entries if isinstance(entry, str) and entry not in ("_self_", "root")]
    chosen = []
    for entry in entries:
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if name is not None:
                chosen.append(f"{group.removeprefix('override ').removeprefix('optional ').lstrip('/')}={name}")
    return inherited, chosen


def _options(
    pairs: Sequence[Any], lines: Sequence[str], prefix: str, docs: Mapping[str, str], builds: dict[str, str]
) -> Iterator[Option]:
    """The keys of a mapping and of the mappings in it."""
    target = next((value.value for key, value in pairs if key.value == "_target_"), None)
    if target:
        builds[prefix] = target
        docs = documented(target)
    for key, value in pairs:
        name = str(key.value)
        if name in LABELS:
            continue
        full = f"{prefix}.{name}" if prefix else name
        meaning = _comment(lines, key, value) or docs.get(name, "")
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            if meaning:
                yield Option(full, "", meaning)
            yield from _options(value.value, lines, full, {}, builds)
        else:
            source = lines[value.start_mark.line][value.start_mark.column :] if value.start_mark.line else ""
            if value.start_mark.line == value.end_mark.line:
                source = lines[value.start_mark.line][value.start_mark.column : value.end_mark.column]
            yield Option(full, source.strip(), meaning)


def _comment(lines: Sequence[str], key: Any, value: Any) -> str:
    """The comment beside a key, else the lines of comment directly above it at its indentation."""
    line, column = key.end_mark.line, key.end_mark.column
    if value.end_mark.line == line and not (isinstance(value, yaml.MappingNode) and not value.flow_style):
        column = value.end_mark.column
    beside = re.search(r"(?:^|\s)#\s?(.*)$", lines[line][column:])
    if beside:
        return beside[1].strip()
    above: list[str] = []
    indent = " " * key.start_mark.column
    for text in reversed(lines[: key.start_mark.line]):
        if not text.startswith(f"{indent}#"):
            break
        above.insert(0, text.strip().removeprefix("#").strip())
    return " ".join(above) if key.start_mark.line > len(_leading(lines)) else ""


def files(conf: Path) -> list[ConfigFile]:
    """All files of the configuration but Hydra's help, what each group has in common first."""
    paths = sorted(conf.rglob("*.yaml"), key=lambda path: (path.parent, not path.stem.startswith("_"), path.stem))
    found = [read(path, conf) for path in paths if path.parent.name != "help"]
    # A file that changes a key of another group need not explain it again. The key's own group knows best.
    owners = sorted(found, key=lambda each: each.group in ("mitigation", "experiment", "hparams_search"))
    told: dict[str, str] = {}
    for option in (option for each in owners for option in each.options if option.meaning):
        told.setdefault(option.key, option.meaning)
    told |= {option.key: option.meaning for option in detector_settings()}

    def explained(option: Option) -> Option:
        same = re.fullmatch(r"\$\{([\w.]+)\}", option.default)  # data.log.days: ${data.days}
        words = option.key.split(".")
        parts = [option.key, *(".".join(words[:end]) for end in range(len(words) - 1, 1, -1))]
        meanings = [option.meaning, told.get(same[1], "") if same else "", *(told.get(part, "") for part in parts)]
        return replace(option, meaning=next(filter(None, meanings), ""))

    return [replace(each, options=[explained(option) for option in each.options]) for each in found]


def typed(target: str, prefix: str) -> list[Option]:
    """The fields of a dataclass as options, with their types, defaults and the lines of its docstring.

    Args:
        target: the import path of the dataclass.
        prefix: the key in front of the fields' names.
    """
    package, _, inner = target.partition(".")
    told = documented(target)
    attributes = _package(package)[inner]
    attributes = attributes.final_target if attributes.is_alias else attributes
    fields = [(name, each) for name, each in attributes.attributes.items() if each.annotation is not None]
    return [
        Option(f"{prefix}{name}", f"{each.value}", told.get(name, ""), f"{each.annotation}") for name, each in fields
    ]


def detector_settings() -> list[Option]:
    """The settings of the detector, which are registered in Python."""
    return typed("ranker.stability.DetectorSettings", "callbacks.divergence.settings.")


def anchor(group: str, name: str) -> str:
    """The anchor of an option's section.

    Args:
        group: such as ``hydra/sweeper``.
        name: such as ``headroom``.
    """
    return re.sub(r"[^a-z0-9_-]", "-", f"{group}-{name}".lower())


def markdown(conf: Path = ROOT / "conf") -> str:
    """The whole page.

    Args:
        conf: the folder of the configuration.
    """
    found = files(conf)
    root = next(each for each in found if not each.group)
    chosen = dict(choice.split("=", 1) for choice in root.sets)
    groups = {each.group: [one for one in found if one.group == each.group] for each in found if each.group}
    parts = [INTRO, *_root(root)]
    for group in sorted(groups, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        parts.append(f"## {group}\n\n")
        parts.append(ELSEWHERE.get(group, f"Chosen with `{group}=NAME`. ") + _default_of(group, chosen))
        for each in groups[group]:
            parts.append(_section(each))
        if group == "callbacks":
            parts += ["### The detector's settings { #detector-settings }\n\n", _table(detector_settings())]
    return "".join(parts)


def _default_of(group: str, chosen: Mapping[str, str]) -> str:
    return f"Default: `{group}={chosen[group]}`.\n\n" if group in chosen else "\n\n"


def _root(root: ConfigFile) -> list[str]:
    """The sections of what belongs to no group."""
    fields = {option.key: option for option in typed("ranker.config.TrainSettings", "train.")}
    train = [replace(fields[each.key], default=each.default) for each in root.options if each.key in fields]
    names = ("train", "hydra")
    own = [option for option in root.options if option.key.split(".")[0] not in names]
    hydra = [
        option for option in root.options if option.key.startswith(("hydra.run", "hydra.sweep", "hydra.callbacks"))
    ]
    return [
        "## No group { #root }\n\n",
        _table(own),
        "## train { #train }\n\nHow long to train and how often to look. A step is an optimizer step.\n\n",
        _table(train),
        "## hydra: folders { #hydra }\n\nThe folders of runs and sweeps. All other keys are [Hydra's](https://hydra.cc/docs/configure_hydra/intro/).\n\n",
        _table(hydra),
    ]


def _section(each: ConfigFile) -> str:
    """The section of one file: its comment, what it starts from, its keys."""
    shared = each.name.startswith("_")
    title = f"In common: {each.name}" if shared else f"{each.group}={each.name}"
    lines = [f"### {title} {{ #{anchor(each.group, each.name)} }}\n\n", _prose(each.text), "\n\n"]
    links = [f"[`{name}`](#{anchor(each.group, name)})" for name in each.starts_from]
    if links:
        lines.append(f"Starts from {', '.join(links)}. ")
    if each.sets:
        lines.append(f"Sets {', '.join(f'`{choice}`' for choice in each.sets)}. ")
    for key, target in each.builds.items():
        lines.append(f"`{key or each.name}` builds `{target}`. ")
    lines.append("\n\n")
    options = [option for option in each.options if option.key.rpartition(".")[2] != "name" or option.meaning]
    return "".join(lines) + _table(options)


def _prose(text: str) -> str:
    """A comment as Markdown: a line that is a command stands for itself."""
    parts = re.split(r"^\s*((?:python|evenkeel) .*)$", text, flags=re.MULTILINE)
    parts[::2] = [escaped(part) for part in parts[::2]]
    parts[1::2] = [f"\n\n    {command}\n\n" for command in parts[1::2]]
    return "".join(parts)


def _table(options: Sequence[Option]) -> str:
    """Options as a table, with types where they are known; empty without any option."""
    if not options:
        return ""
    columns = [("key", [f"`{each.key}`" for each in options]), ("default", [_code(each.default) for each in options])]
    if any(each.type for each in options):
        columns.insert(1, ("type", [_code(each.type) for each in options]))
    columns.append(("meaning", [_cell(each.meaning) for each in options]))
    rows = [f"| {' | '.join(cells)} |" for cells in zip(*(cells for _, cells in columns), strict=True)]
    heads = [name for name, _ in columns]
    return "\n".join([f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |", *rows, "", ""])


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _cell(text: str) -> str:
    """Plain text inside a table: what Markdown would read as markup is escaped."""
    parts = text.replace("``", "`").split("`")
    parts[::2] = [escaped(part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def escaped(text: str) -> str:
    """Plain text, with what Markdown and HTML would read as markup escaped.

    Args:
        text: without code.
    """
    return re.sub(r"([*_\[\]])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(markdown())
