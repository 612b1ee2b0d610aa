"""Times the matrix products of a training step alone, for bench_training.py; prints one line of JSON.

    python scripts/bench/training_floor.py --root DIR model=moe scale.batch_size=1024

Takes one real step of the model that ``train.py`` would train with these overrides, writes down every matrix product in
it (shapes and strides, forward and backward), and times those products alone into memory that is there already. No
library that trains this model in float32 with this machine's matrix products is faster, whatever it does about the
rest: what is left out is embeddings, activations, loss, optimizer, data and metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranker import config
from ranker.losses import MultitaskLoss
from ranker.parts import make_net, open_log

ROOT = Path(__file__).resolve().parents[2]
ATEN = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    ATEN.mm.default: torch.mm,
    ATEN.addmm.default: torch.addmm,
    ATEN.bmm.default: torch.bmm,
    ATEN.baddbmm.default: torch.baddbmm,
}
Call = tuple[Callable[..., Tensor], list[Tensor], Tensor]


class Products(TorchDispatchMode):
    """Writes down every matrix product, with operands and results that look the same in memory.

    Attributes:
        calls: function, operands, result.
        flops: two a multiplication and addition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            tensors = [_alike(argument) for argument in args if isinstance(argument, Tensor)]
            self.calls.append((PRODUCTS[func], tensors, torch.empty_like(result)))
            self.flops += 2 * result.numel() * tensors[-1].shape[-2]
        return result


def _alike(tensor: Tensor) -> Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.randn(size).as_strided(tensor.shape, tensor.stride())


def record(root: Path, overrides: list[str]) -> tuple[Products, int]:
    """The products of one step, and its rows."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=["data=parquet", f"data.source={root.resolve()}", *overrides])
    log = open_log(cfg)
    net, criterion = make_net(cfg, log.schema), MultitaskLoss(log.schema)
    batch = log.read(0, min(cfg.scale.batch_size, log.train_rows))
    with Products() as products:
        criterion(net(batch), batch.labels_BT, batch.mask_BT).total.backward()
    return products, len(batch)


def main() -> None:
    """Records, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py")
    parser.add_argument("--root", type=Path, required=True, help="a prepared log")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_intermixed_args()
    torch.set_num_threads(given.threads)
    config.register()
    products, rows = record(given.root, given.overrides)
    seconds = []
    with torch.no_grad():
        for _ in range(given.steps):
            begin = time.perf_counter()
            for function, operands, out in products.calls:
                function(*operands, out=out)
            seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[given.steps // 10 :])
    print(json.dumps({"examples_per_second": rows / step, "products": len(products.calls), "flops": products.flops}))


if __name__ == "__main__":
    main()
