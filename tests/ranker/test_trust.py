"""A saved configuration runs nothing but known classes, wherever the name stands, and is not interpolated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.installation import conf_folder
from ranker.trust import TARGETS, check_targets, load_config, read_config, targets

MKDIR = {"_target_": "os.mkdir"}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else OmegaConf.to_yaml(OmegaConf.create(content)))
        return path

    return write


@pytest.mark.parametrize(
    "place",
    [
        lambda bad: {"callbacks": {"x": bad}},
        lambda bad: {"trainer": {"_target_": "pytorch_lightning.Trainer", "plugins": [[bad]]}},
        lambda bad: {"optim": {"_target_": "optim.build_optimizer", "_partial_": True, "_args_": [bad]}},
        lambda bad: {"model": {"net": {"_target_": "ranker.models.SharedBottom", "schema": {"deep": bad}}}},
    ],
)
def test_a_name_that_is_not_on_the_list_is_refused_wherever_it_stands(
    saved: Callable[[Any], Path], tmp_path: Path, place: Callable[[Any], Any]
) -> None:
    bad = {**MKDIR, "path": str(tmp_path / "owned")}

    with pytest.raises(UserError, match=r"config.yaml: \S+ names 'os.mkdir', .*trust=\[os.mkdir\]"):
        load_config(saved(place(bad)))

    assert not (tmp_path / "owned").exists()
    instantiate(OmegaConf.create(bad))
    assert (tmp_path / "owned").exists(), "Hydra runs it, so that the check is needed"


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.export.load",
        "joblib.load",
        "lightning_fabric.utilities.cloud_io._load",
        "hydra.utils.get_method",
        "hydra.utils.instantiate",
        "ranker.build.os.system",  # through a module that another one imports
        "ranker.models.SharedBottom.__init__",
        "pytorch_lightning.callbacks.timer.os.system",
        " optim.build_optimizer",
        "",
        ["os.mkdir"],
        {"_target_": "os.mkdir"},
        None,
    ],
)
def test_what_loads_or_reaches_code_is_refused(saved: Callable[[Any], Path], name: Any) -> None:
    with pytest.raises(UserError, match="is not on the list"):
        load_config(saved({"callbacks": {"x": {"_target_": name}}}))


def test_a_parent_module_reaches_the_operating_system() -> None:
    """Why the list holds exact names and no prefixes."""
    assert get_object("ranker.build.os.system").__name__ == "system"


def test_every_name_on_the_list_exists() -> None:
    for name in TARGETS:
        assert callable(get_object(name)), name


def test_every_name_of_our_own_configuration_is_on_the_list() -> None:
    """Except Hydra's own plugins, which no saved configuration holds."""
    found = {
        name
        for path in conf_folder().rglob("*.yaml")
        if path.parts[-2] not in ("sweeper", "hparams_search")
        for place, name in targets(OmegaConf.create(OmegaConf.load(path)))
        if not place.startswith("hydra")
    }

    assert len(found) > 15
    assert found <= TARGETS


def test_the_user_allows_a_name_of_his_own(saved: Callable[[Any], Path]) -> None:
    content = {"callbacks": {"mine": {"_target_": "my_parts.Mine"}, "other": {"_target_": "my_parts.Other"}}}
    path = saved(content)

    load_config(path, trusted=["my_parts.Mine", "my_parts.Other"])
    with pytest.raises(UserError, match=r"callbacks\.other names"):
        load_config(path, trusted=["my_parts.Mine"])


def test_what_the_user_names_at_the_same_place_is_allowed(saved: Callable[[Any], Path]) -> None:
    path = saved({"model": {"net": {"_target_": "my_parts.Net"}}})
    elsewhere = OmegaConf.create({"callbacks": {"x": {"_target_": "my_parts.Net"}}})

    check_targets(read_config(path), path, own=OmegaConf.create({"model": {"net": {"_target_": "my_parts.Net"}}}))
    with pytest.raises(UserError, match=r"model\.net names"):
        check_targets(read_config(path), path, own=elsewhere)


@pytest.mark.parametrize(
    "content",
    [
        "tags: [a, '${oc.env:SECRET}']",
        "a: {b: {'${oc.env:SECRET}': 1}}",
        "a: 'text ${b} text'\nb: 1",
        "a: '\\${b}'\nb: 1",
    ],
)
def test_nothing_is_interpolated(saved: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")

    with pytest.raises(UserError, match=r"holds '\$\{'") as caught:
        read_config(saved(content))

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "- 1", "a: !!python/object/apply:os.mkdir [owned]", "\0", "a: ${"])
def test_a_file_that_is_no_configuration_is_one_line(
    saved: Callable[[Any], Path], content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        read_config(saved(content))

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
