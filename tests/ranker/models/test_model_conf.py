"""The YAML files of conf/model and conf/scale compose and build what Table 1 of the paper describes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate

from ranker import config
from ranker.models import SharedBottom

config.register()
CONF = Path(__file__).parents[3] / "conf"
MODELS = ["small", "large", "large_dcn", "moe", "ple"]


def composed(model, scale="laptop"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+scale={scale}", f"+model={model}"])


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_and_builds_at_every_scale(model, scale, schema):
    config = composed(model, scale)
    assert config.model.name == model
    assert config.scale.name == scale
    with torch.device("meta"):  # paper widths without their memory
        net = instantiate(config.model.net, _convert_="all")(schema)
    assert net.task_names == schema.task_names


@pytest.mark.parametrize("model", MODELS)
def test_every_table_of_widths_has_both_scales(model):
    for widths in composed(model).model.widths.values():
        assert set(widths) == {"laptop", "paper"}


@pytest.mark.parametrize("model", MODELS)
def test_every_argument_of_a_model_is_listed_in_its_file(model):
    net = composed(model).model.net
    arguments = set(inspect.signature(get_class(net._target_)).parameters) - {"schema"}
    assert set(net) - {"_target_", "_partial_"} == arguments


def test_paper_widths_are_those_of_table_1_and_laptop_an_eighth():
    for model, widths in (("small", [512, 512]), ("large", [4096] * 4), ("large_dcn", [4096] * 4)):
        assert list(composed(model, "paper").model.net.hidden) == widths
        assert list(composed(model, "laptop").model.net.hidden) == [width // 8 for width in widths]


def test_batch_and_warm_up_are_those_of_the_data_set_at_the_scale():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        laptop = compose("config", ["data=kuairand", "data.source=x"])
        paper = compose("config", ["data=kuairand", "data.source=x", "scale=paper"])
    assert (laptop.scale.batch_size, laptop.train.warmup_steps) == (256, 175)
    assert paper.scale.batch_size == 65536, "of the paper"


def test_large_dcn_has_cross_layers_with_layer_norm_and_large_has_none(schema):
    with torch.device("meta"):
        large, crossed = (instantiate(composed(m).model.net, _convert_="all")(schema) for m in ("large", "large_dcn"))
    assert isinstance(crossed, SharedBottom)
    assert large.cross is None
    assert crossed.cross is not None
    assert crossed.cross.norm is not None
