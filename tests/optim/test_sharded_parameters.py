"""Two processes, sharded or replicated, give the same steps and reports as one."""

from __future__ import annotations

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import optim

CASES: list[tuple[str, dict[str, Any]]] = [
    ("adagrad", {}),
    ("gc", {}),
    ("agc", {}),
    ("agc", {"by": "unit"}),
    ("lamb", {}),
    ("clippy", {}),
    ("clippy", {"backend": "eager"}),
    ("lamb_adam", {"weight_decay": 0.1}),
]
CASES += [(name, {}) for name in optim.list_optimizers() if (name, {}) not in CASES]


def ranker() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows and 1 row do not split evenly


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, case: tuple[str, dict[str, Any]], part: slice, steps: int = 3) -> Any:
    name, given = case
    optimizer = optim.build_optimizer(name, model, lr=0.3, collect_stats=True, on_nonfinite="skip", **given)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)[part]).square().mean().backward()
        optimizer.step()
    return optimizer


def assert_same(model: nn.Module, optimizer: Any, case: tuple[str, dict[str, Any]]) -> None:
    alone = ranker()
    reference = train(alone, case, slice(None)).clip_stats()
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        whole = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        torch.testing.assert_close(whole, theirs, rtol=1e-4, atol=1e-6, msg=f"{case}: {key}")
    for key, row in optimizer.clip_stats().items():
        expected = reference[key.removeprefix("module.")]
        for field in ("sigma", "sigma_min", "update_max", "update_norm"):
            assert row[field] == pytest.approx(expected[field], rel=1e-3), (case, key, field)
        assert (row["coordinate"], row["term"]) == (expected["coordinate"], expected["term"]), (case, key)


def check_ddp(rank: int) -> None:
    for case in CASES:
        model = nn.parallel.DistributedDataParallel(ranker())
        assert_same(model, train(model, case, slice(4 * rank, 4 * rank + 4)), case)


def check_fsdp2(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        model = ranker()
        fully_shard(model, mesh=mesh)
        optimizer = train(model, case, slice(4 * rank, 4 * rank + 4))
        assert_same(model, optimizer, case)


def check_zero(rank: int) -> None:
    """ZeroRedundancyOptimizer splits the parameters over ranks, and gathers and scatters the state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(model: nn.Module, case: tuple[str, dict[str, Any]]) -> ZeroRedundancyOptimizer:
        given = {"method": case[0], "lr": 0.3, "collect_stats": True, "on_nonfinite": "skip", **case[1]}
        return ZeroRedundancyOptimizer(model.parameters(), optim.SigmaOptimizer, **given)

    def steps(model: nn.Module, optimizer: ZeroRedundancyOptimizer, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()

    for case in CASES:
        model, resumed, alone = ranker(), ranker(), ranker()
        optimizer = zero(model, case)
        steps(model, optimizer, range(2))
        optimizer.consolidate_state_dict(to=0)
        saved = [optimizer.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(saved)
        again = zero(resumed, case)
        resumed.load_state_dict(model.state_dict())
        again.load_state_dict(saved[0])
        steps(resumed, again, range(2, 3))
        train(alone, case, slice(None))
        for mine, theirs in zip(resumed.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, msg=f"{case}")
        assert len(again.optim.clip_stats()) == sum(len(group["params"]) for group in again.optim.param_groups)


def check_column_shards(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight, grad = torch.randn(4, 6), torch.randn(4, 6)
    for case in CASES:
        results = []
        for shard in (False, True):
            param = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]) if shard else weight.clone())
            param.grad = distribute_tensor(grad, mesh, [Shard(1)]) if shard else grad.clone()
            optimizer = optim.build_optimizer(case[0], [("w", param)], lr=0.3, collect_stats=True, **case[1])
            what = optim.what_if(optimizer, ["gc", "agc", "lamb", "clippy"])
            optimizer.step()
            full = param.full_tensor() if shard else param
            results.append((full.detach(), optimizer.clip_stats()["w"], what))
        (alone, row, report), (sharded, row_sharded, report_sharded) = results
        torch.testing.assert_close(sharded, alone, msg=str(case))
        for field, value in row.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert row_sharded[field] == same, (case, field)
        for label, sigmas in report.items():
            assert report_sharded[label] == pytest.approx(sigmas, rel=1e-4)


def check_nonfinite_on_one_rank(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for name, given in CASES:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        grad = torch.ones(4, 3)
        grad[3, 0] = torch.nan  # on rank 1 alone
        param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer = optim.build_optimizer(name, [param], lr=0.3, on_nonfinite="skip", **given)
        optimizer.step()
        assert param.to_local().equal(torch.ones(2, 3)), name
        assert optimizer.skipped_steps == 1
        with pytest.raises(FloatingPointError, match="not finite"):
            optim.build_optimizer(name, [param], lr=0.3, on_nonfinite="raise", **given).step()


PARTS = (check_ddp, check_fsdp2, check_zero, check_column_shards, check_nonfinite_on_one_rank)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for check in PARTS:
        try:
            torch.manual_seed(0)
            check(rank)
            outcome = "ok"
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(outcome)
        if outcome != "ok":
            os._exit(1)  # the other rank may wait in a collective
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outcomes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(worker, args=(port, str(folder)), nprocs=2, join=False)
    try:
        while not context.join(timeout=120):
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException):
        pass  # the files say what happened
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in PARTS])
def test_two_processes_step_as_one(check: str, outcomes: Path) -> None:
    for rank in (0, 1):
        report = outcomes / f"{check}.{rank}"
        assert report.exists(), f"rank {rank} never got to {check}"
        assert report.read_text() == "ok"
