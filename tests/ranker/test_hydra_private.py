"""Hydra's private API still behaves as ``ranker.hydra_private`` expects."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, _utils

from ranker import config
from ranker.hydra_private import composed_once, expand, parse, read_yaml_in_c
from support import ROOT

CHANGED = "Hydra's BasicSweeper.split_arguments changed; adapt ranker/hydra_private.py"


def test_comma_separated_values_become_jobs_and_the_last_value_of_a_key_wins() -> None:
    expected = [["optim=gc", "seed=0"], ["optim=gc", "seed=1"]]
    assert expand(parse(["optim=clippy", "optim=gc", "seed=0,1"])) == expected, CHANGED
    assert expand(parse([])) == [[]], CHANGED


def test_an_interval_cannot_be_expanded() -> None:
    with pytest.raises(HydraException, match="does not support sweep type"):
        expand(parse(["lr_mult=interval(1,2)"]))


FOUND = "Hydra looks hydra.mode up in another way; adapt ranker/hydra_private.py"


@pytest.mark.parametrize(
    ("words", "times"),
    [([], 1), (["seed=1"], 1), (["hydra.mode=RUN"], 2), (["--config-dir", str(ROOT / "conf")], 2)],
)
def test_a_command_composes_its_configuration_once_where_no_word_may_set_the_mode(
    words: list[str], times: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.register()
    composed, plain = [], Hydra.compose_config
    monkeypatch.setattr(sys, "argv", ["train.py", *words, f"hydra.run.dir={tmp_path}"])
    monkeypatch.setattr(Hydra, "compose_config", lambda *given, **named: composed.append(0) or plain(*given, **named))

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def main(cfg: DictConfig) -> None:
        assert cfg.model.name == "small"

    with composed_once(words, ROOT / "conf"):
        main()

    assert len(composed) == times, FOUND


def test_a_file_that_asks_for_a_sweep_is_obeyed(tmp_path: Path) -> None:
    plain = Hydra.get_mode
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    for text, replaced in (("# @package _global_\nseed: 1\n", True), ("hydra:\n  mode: MULTIRUN\n", False)):
        file.write_text(text)
        with composed_once(["experiment=mine"], tmp_path):
            assert (Hydra.get_mode is not plain) == replaced
        assert Hydra.get_mode is plain


def test_yaml_that_is_parsed_in_c_is_read_as_omegaconf_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read_yaml_in_c()
    loader = _utils.get_yaml_loader()
    assert issubclass(loader, yaml.CSafeLoader), "OmegaConf reads YAML in another way; adapt ranker/hydra_private.py"
    texts = {path: path.read_text() for path in (ROOT / "conf").rglob("*.yaml")}
    texts["scalars"] = "a: 1e-3\nb: 2024-01-01\nc: 1_000\nd: .inf\ne: 'x: y'\nf: ~\ng: off\nh: [1, {i: 0x1f}]\n"
    in_c = {name: OmegaConf.create(text) for name, text in texts.items()}
    with pytest.raises(yaml.YAMLError, match="found duplicate key a"):
        OmegaConf.create("a: 1\na: 2\n")
    monkeypatch.setattr(_utils, "yaml", yaml)
    assert not issubclass(_utils.get_yaml_loader(), yaml.CSafeLoader)
    assert in_c == {name: OmegaConf.create(text) for name, text in texts.items()}
