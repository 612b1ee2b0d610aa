"""The docs tell the truth: their commands exist, every option is explained, and the site needs no network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import command_reference
import example_pages
import option_reference
from ranker import config
from ranker.commands import console
from ranker.config_overrides import warm_start_word
from support import ROOT, finished

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "results/README.md", "src/optim/README.md")
COMMANDS = {Path(command_reference.file_of(name)).name: name for name in console.COMMANDS}
OUTSIDE = "--config-dir"  # such a command needs files of the reader


def commands() -> Iterator[tuple[str, str]]:
    """Each command of a code block, with its page."""
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(
            r"^(?: {4}|\t)?(?:\$ )?((?:python (?:train|scripts/\w+)\.?\S*|evenkeel) .*)$", text, re.MULTILINE
        ):
            yield path.relative_to(ROOT).as_posix(), line


TRAIN = sorted({line for _, line in commands() if re.match(r"python train\.py|evenkeel train", line)})
OTHERS = sorted({line for _, line in commands()} - set(TRAIN))


def words(line: str) -> list[str]:
    """The arguments of a command, without its comment and redirection."""
    program, *rest = shlex.split(line, comments=True)
    rest = rest[1:] if program in ("python", "evenkeel") else rest
    return rest[: rest.index(">")] if ">" in rest else rest


def first_values(overrides: list[str]) -> list[str]:
    """Overrides of a sweep as those of its first job."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{each.input_line.split('=')[0]}={next(each.sweep_string_iterator())}" if each.is_sweep_override() else given
        for each, given in zip(parsed, overrides, strict=True)
    ]


def test_there_are_commands() -> None:
    assert len(TRAIN) > 20
    assert len(OTHERS) > 30


@pytest.fixture(scope="module")
def conf() -> Iterator[None]:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize("line", TRAIN)
@pytest.mark.usefixtures("conf")
def test_a_command_that_trains_composes(line: str) -> None:
    given = words(line)
    if OUTSIDE in given:
        pytest.skip("names files of the reader")
    # A path that exists is quoted; those of the docs do not.
    overrides = [warm_start_word(word.replace("/step=", "/step")) for word in given if not word.startswith("-")]
    if any(word.startswith("resume=") for word in given):  # data is that of the run
        overrides.append("data=parquet")
    if any(word.startswith(("hydra/launcher=ray", "hydra/sweeper=list")) for word in given):
        overrides = [word for word in overrides if not word.startswith("hydra")]

    cfg = compose("config", overrides=first_values(overrides), return_hydra_config=True)

    assert cfg.model.name


@pytest.mark.parametrize("line", OTHERS)
def test_another_command_exists_and_knows_its_options(line: str) -> None:
    program = shlex.split(line, comments=True)[1]
    if program.startswith("scripts/bench/"):
        assert (ROOT / program).is_file()
        return
    name = COMMANDS.get(Path(program).name, "") if program.endswith(".py") else program
    assert not program.endswith(".py") or (ROOT / program).is_file()
    if name.isupper():
        return  # a placeholder
    assert name in console.COMMANDS, f"{line}: no such command"
    help_text = command_reference.help_of(name)
    for word in words(line):
        if word.startswith("--") and name != "headroom":
            assert word.split("=")[0] in help_text, f"{line}: {name} has no option {word}"


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a YAML file that hold a value."""
    for key, value in node.items():
        full = f"{prefix}{key}"
        if key in ("_target_", "_partial_", "defaults"):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{full}.")
        else:
            yield full


def test_the_reference_has_every_key_of_every_file_with_an_explanation() -> None:
    found = {(each.group, each.name): each for each in option_reference.files(ROOT / "conf")}
    page = option_reference.markdown()
    paths = [path for path in sorted((ROOT / "conf").rglob("*.yaml")) if path.parent.name != "help"]
    assert len(paths) == len(found)
    for path in paths:
        group = path.parent.relative_to(ROOT / "conf").as_posix().removeprefix(".")
        text = path.read_text(encoding="utf-8")
        absolute = "@package _global_" in text or group in option_reference.ABSOLUTE
        keys = set(leaves(yaml.safe_load(text) or {}, "" if absolute or not group else f"{group.replace('/', '.')}."))
        keys = {key for key in keys if not key.endswith(".name") and key != "name"}
        if not group:  # what belongs to Hydra is in Hydra's docs, but for the folders
            keys = {key for key in keys if not key.startswith(("hydra.job", "hydra.sweep.subdir"))}
        told = {option.key: option.meaning for option in found[group, path.stem].options}
        for key in keys:
            cut = next((part for part in (key, *parents(key)) if part in told), "")  # a flow mapping is one row
            assert told.get(cut), f"{path}: nothing explains {key}; write a comment beside it"
            assert f"| `{cut}` |" in page


def parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def test_the_reference_reads_comments_docstrings_and_what_a_file_starts_from() -> None:
    page = option_reference.markdown()
    clippy = page[page.index("{ #optim-clippy }") : page.index("{ #optim-clippy_adam }")]
    assert "Starts from [`_base`](#optim-_base)." in clippy
    assert "| `optim.lambda_rel` | `null` | largest move of a coordinate as a fraction of its weight." in clippy
    assert "| `train.max_steps` | `int` | `-1` | stop after this many steps" in page  # from the docstring of the root
    assert "| `callbacks.divergence.settings.lost_step_cut` | `float` | `200.0` |" in page  # registered in Python
    moe = page[page.index("{ #model-moe }") : page.index("{ #model-ple }")]
    assert "| `model.net.experts` | `4` | E, number of experts" in moe  # from the docstring of MMoE


def test_a_new_key_is_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one.yaml").write_text(
        "# An option.\nnew_key: [1, 2]  # what | it means, a*b*c <x>\n"
        "outer:\n  # From above.\n  inner: ${extra.new_key}\n"
    )
    (each,) = option_reference.files(tmp_path)
    assert [(option.key, option.default, option.meaning) for option in each.options] == [
        ("extra.new_key", "[1, 2]", "what | it means, a*b*c <x>"),
        ("extra.outer.inner", "${extra.new_key}", "From above."),
    ]
    assert option_reference._table(each.options).splitlines()[2].endswith(r"| what \| it means, a\*b\*c &lt;x> |")


def test_links_hold_on_the_site() -> None:
    site_hooks = pytest.importorskip("site_hooks", reason="needs the extra docs")
    assert site_hooks.site_place("docs/stability.md") == "stability.md"
    assert site_hooks.site_place("src/optim/README.md") == "optim.md"
    assert site_hooks.site_place("conf/hydra/sweeper/headroom.yaml") == "options.md#hydra-sweeper-headroom"
    assert site_hooks.site_place("examples/plain_loop.py") == "examples/plain_loop.md"
    assert site_hooks.site_place("src/optim/stats.py") == ""


def test_an_example_becomes_a_page_of_text_and_code() -> None:
    page = example_pages.markdown(ROOT / "examples" / "plain_loop.py")
    assert page.startswith("# Clippy in a plain PyTorch loop\n")
    assert "\n## The optimizer\n" in page
    assert page.count("```python") == page.count("\n```\n") > 4
    assert "# %%" not in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link[^>]* rel=[\"']?(?:stylesheet|icon|preconnect)[^>]*>", text)
        assert not [each for each in loaded if "//" in each], page
    assert (tmp_path / "site" / "results" / "kuairand_laptop" / "midrun.png").is_file()


@pytest.mark.slow
def test_the_tutorial_ends_as_it_says(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=600).stdout

    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    lines = [words(line) for page, line in commands() if page == "docs/tutorial.md" and "data.source=shop" in line]
    run(str(ROOT / "examples" / "own_log.py"), "shop")
    assert len(lines) == 3
    for overrides in lines:
        run(str(ROOT / "train.py"), *overrides, "logger=csv", "trainer=cpu", "train.threads=1")
    naive, rescued, clippy = (finished(tmp_path / "runs" / name).summary for name in ("naive", "rescued", "clippy"))
    assert naive["status"] == "diverged"
    step = re.search(r"its past at step (\d+)", text)
    assert step
    assert naive["divergence"]["first_step"] == pytest.approx(int(step[1]), abs=5)
    assert rescued["status"] == clippy["status"] == "completed"
    assert rescued["rollbacks"]
    shown = [float(number) for number in re.findall(r"(\d\d\.\d\d) \(n=1\)", text)]
    ended = [100 * summary["metrics"]["test/click/auc"] for summary in (clippy, rescued)]
    assert ended == pytest.approx(shown, abs=0.5)

    told = run(str(ROOT / "scripts" / "replay.py"), str(next((tmp_path / "runs/naive/capsules").iterdir())), "--bisect")
    assert "Feature: signal_04" in told
