"""The private API of torch that this package uses is there and does what it is used for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import optim
from optim import torch_private

CHANGED = "torch has changed its private API; adapt optim/torch_private.py"


def test_private_names_of_torch_stand_in_one_file() -> None:
    pattern = re.compile(r"torch\._(?!_)|torch\.[a-z_.]+\._|torch\._C|\b_foreach_|\._version\b")
    for path in Path(optim.__file__).parent.rglob("*.py"):
        if path.name != "torch_private.py":
            assert not pattern.search(path.read_text()), path


def test_the_fused_kernel_steps_as_torchs_adagrad() -> None:
    assert torch_private.has_fused_adagrad(torch.ones(2)), CHANGED
    assert not torch_private.has_fused_adagrad(torch.ones(2, device="meta"))
    weight, grad, total = torch.randn(9), torch.randn(9), torch.full((9,), 0.1)
    expected = weight - 0.5 * grad / (total + grad**2).sqrt()
    options = {"lr": 0.5, "weight_decay": 0.0, "eps": 0.0, "maximize": False}
    torch_private.fused_adagrad([weight], [grad], [total], **options, ok=torch.tensor(False))
    assert total.equal(torch.full((9,), 0.1)), CHANGED
    torch_private.fused_adagrad([weight], [grad], [total], **options, ok=None)
    torch.testing.assert_close(weight, expected, msg=CHANGED)


def test_copies_go_into_every_target() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_private.copy_all(targets, [torch.ones(2), torch.ones(3)])
    assert all(target.equal(torch.ones_like(target)) for target in targets), CHANGED


def test_plain_tensors_are_told_from_wrappers_and_subclasses() -> None:
    seen = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.is_plain(tensor))
        return tensor

    torch.func.functionalize(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    look(torch.ones(2))
    assert seen == [False, False, True], CHANGED
    with FakeTensorMode():
        assert not torch_private.is_plain(torch.ones(2))
    assert torch_private.is_plain(torch.nn.Parameter(torch.ones(2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_place_of_a_shard_can_be_asked_for() -> None:
    from torch.distributed.tensor import _utils

    assert callable(getattr(_utils, "compute_local_shape_and_global_offset", None)), CHANGED
