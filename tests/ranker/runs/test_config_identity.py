from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ranker import config
from ranker.runs.config_identity import config_hash
from ranker.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]


def composed(*overrides: str) -> DictConfig:
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_what_does_not_decide_the_numbers_does_not_change_the_hash() -> None:
    plain = config_hash(composed())

    for override in (
        "tags=[a,b]",
        "logger=none",
        "force=true",
        "objective=test/click/auc",
        "train.threads=2",
        "train.checkpoint_every=7",
        "data.num_workers=0",
        "train.log_every=1",
        "callbacks.progress.refresh_every=1",
        "callbacks.capsules.max_capsules=1",
        "~callbacks.capsules",
        "callbacks.snapshots.disk=2",
        "callbacks.early_signs.every=1",
        "callbacks.sharpness.every=10",
        "model.widths.small.paper=[8]",  # the width at another scale
        "metrics=full",
    ):
        assert config_hash(composed(override)) == plain, override


def test_a_configuration_from_before_there_were_groups_has_the_hash_of_one_that_uses_none() -> None:
    cfg = composed()
    older = OmegaConf.create({key: value for key, value in OmegaConf.to_container(cfg).items() if key != "loss"})
    del older["data"]["keep_groups"]
    del older["data"]["log"]["row_weights"], older["data"]["log"]["first_day"]
    del older["warm_start"]["at_windows"]
    assert config_hash(older) == config_hash(cfg)


def test_what_decides_the_numbers_changes_the_hash() -> None:
    hashes = {
        config_hash(composed(*override.split()))
        for override in (
            "seed=0",
            "seed=1",
            "lr_mult=2",
            "optim=gc",
            "optim.lambda_rel=0.25",
            "model=large",
            "model.widths.small.laptop=[8]",
            "train.max_steps=7",
            "data.window=1",
            "data.log.first_day=1",
            "warm_start.at_windows=true",
            "warm_start.at_windows=true warm_start.accumulators=reset",
            "callbacks.divergence.stop=false",
            "callbacks.divergence.settings.patience=30",
            "callbacks.snapshots.keep=2",
            "callbacks.rollback.tries=1",
            "~callbacks.divergence",
            "loss=jrc",
            "loss=bpr",
            "data.keep_groups=user",
        )
    }

    assert len(hashes) == 20


def test_a_saved_configuration_has_the_hash_of_the_one_it_was_saved_from(tmp_path: Path) -> None:
    cfg = composed("optim.lambda_abs=1e-5", "data.tasks=[click]", "train.warmup_steps=3")
    folder = RunFolder(tmp_path)
    folder.save_config(cfg)

    assert config_hash(folder.load_config()) == config_hash(cfg)


def test_hydras_node_may_refer_to_the_hash_and_a_broken_reference_has_one_too() -> None:
    cfg = OmegaConf.create({"seed": 2.0, "hydra": {"subdir": "${config_hash:}"}})
    assert cfg.hydra.subdir == config_hash(OmegaConf.create({"seed": 2}))

    broken = OmegaConf.create({"data": {"source": "${oc.env:EVENKEEL_NOT_SET}"}})
    assert config_hash(broken) == config_hash(broken.copy())
    with pytest.raises(Exception, match="EVENKEEL_NOT_SET"):
        _ = broken.data.source
