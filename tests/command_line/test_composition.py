"""Every option of every group composes and builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from ranker import config
from ranker.data.schema import Schema
from ranker.runs.config_identity import config_hash
from ranker.stability import DetectorSettings

ROOT = Path(__file__).resolve().parents[2]
GROUPS = (
    "model",
    "optim",
    "data",
    "scale",
    "trainer",
    "callbacks",
    "logger",
    "mitigation",
    "embeddings",
    "experiment",
    "hparams_search",
)
OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]

SCHEMA = Schema.from_dict(
    {
        "name": "two tasks",
        "time_column": "t",
        "dense": [{"name": "x"}],
        "categorical": [{"name": "user", "num_embeddings": 5, "embedding_dim": 4}],
        "tasks": [{"name": "click"}, {"name": "watch", "type": "regression"}],
    }
)


def composed(*overrides: str):
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


# Models, optimizers and mitigations are composed and checked below, where they are built, and in test_mitigation.py.
COMPOSED_HERE = [option for option in OPTIONS if option[0] not in ("model", "optim", "mitigation")]


@pytest.mark.parametrize(("group", "option"), COMPOSED_HERE, ids=["=".join(o) for o in COMPOSED_HERE])
def test_every_option_composes_and_its_values_are_legal(group: str, option: str) -> None:
    cfg = composed(f"{group}={option}")

    config.check(cfg)
    if group not in ("experiment", "hparams_search", "callbacks", "logger"):
        assert cfg[group]
    assert set(cfg.data.base_lr) == {"laptop", "paper"}, "the learning rate of every data set at every scale"


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
def test_every_model_builds_at_every_scale(model: str, scale: str) -> None:
    cfg = composed(f"model={model}", f"scale={scale}")
    config.check(cfg)

    with torch.device("meta"):  # the paper's widths without their memory
        net = instantiate(cfg.model.net, _convert_="all")(SCHEMA)

    assert net.task_names == ["click", "watch"]


@pytest.mark.parametrize("optim", [option for group, option in OPTIONS if group == "optim"])
def test_every_optimizer_builds_over_a_model(optim: str) -> None:
    cfg = composed(f"optim={optim}", "model=small")
    config.check(cfg)
    net = instantiate(cfg.model.net, _convert_="all")(SCHEMA)

    optimizer = instantiate(cfg.optim, _convert_="all")(model_or_params=net, lr=0.1)

    assert cfg.optim.name == optim
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in net.parameters()}


def test_every_trainer_and_callback_can_be_instantiated() -> None:
    for option in ("auto", "cpu", "ddp"):
        cfg = composed(f"trainer={option}", "trainer.accelerator=cpu", "trainer.devices=1")
        instantiate(cfg.trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for node in composed().callbacks.values():
        instantiate(node, _convert_="all")


def test_several_loggers_are_chosen_at_once() -> None:
    assert set(composed().logger) == {"csv", "wandb"}
    assert set(composed("logger=[csv,tensorboard]").logger) == {"csv", "tensorboard"}
    assert set(composed("logger=[wandb,tensorboard]").logger) == {"csv", "wandb", "tensorboard"}
    assert set(composed("logger=none").logger) == set()


def test_the_learning_rate_that_is_used_is_shown() -> None:
    assert composed("lr_mult=2", "data.base_lr.laptop=0.4").lr == 0.8
    assert composed("lr_mult=2", "scale=paper").lr == 0.4
    assert composed("data=parquet", "data.base_lr.laptop=0.3").lr == 0.3


def test_parquet_takes_its_folder_by_the_name_of_the_others_and_by_its_former_name() -> None:
    source, root = (composed("data=parquet", f"data.{name}=/log") for name in ("source", "root"))

    assert source.data.log.root == root.data.log.root == "/log"
    assert config_hash(source) == config_hash(root) != config_hash(composed("data=parquet", "data.source=/other"))


def test_cfg_job_prints_values_and_no_interpolations(
    command_line: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command_line("--cfg", "job", "model=large_dcn", "scale=paper", "lr_mult=3")

    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["lr"] == pytest.approx(0.6)
    assert shown["model"]["net"]["hidden"] == [4096] * 4


def test_the_configuration_shows_the_defaults_of_the_detector_and_takes_others() -> None:
    assert dict(composed().callbacks.divergence.settings) == dataclasses.asdict(DetectorSettings())
    changed = composed("callbacks.divergence.settings.patience=30").callbacks.divergence.settings
    assert dict(changed) == dataclasses.asdict(DetectorSettings(patience=30))
