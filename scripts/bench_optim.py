"""Time one optimizer step beside torch's own Adagrad, on the tensor sets of the paper's models.

    python scripts/bench_optim.py --json results/bench_optim.json

All candidates step the same weights and gradients in turn, round after round; the table shows medians, and the targets
are ratios of medians of one run. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optim

INPUT = 1628  # inputs of the Large models, so that their parameters come to the paper's 57.0 and 68.0 million
LAYER = [(4096, 4096), (4096,)]
SETS: dict[str, list[tuple[int, ...]]] = {
    "small": [(512, 14136), (512,), (512, 512), (512,), (6, 512), (6,)],
    "large": [(4096, INPUT), (4096,), *LAYER * 3, (6, 4096), (6,)],
}
SETS["large_dcn"] = [*[(INPUT, INPUT), (INPUT,)] * 4, (INPUT,), (INPUT,), *SETS["large"]]

ADAGRAD = "torch Adagrad fused"
# Ratios to torch's fused Adagrad on the CPU: 5 streams of memory for Adagrad, 8 for a method that looks first.
LIMITS = {"small": 1.3, "large": 1.6, "large_dcn": 1.6}
METHODS: dict[str, dict[str, Any]] = {
    "clippy": {"name": "clippy"},
    "gc": {"name": "gc"},
    "agc": {"name": "agc"},
    "lamb": {"name": "lamb"},
}
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measured number: `ok` is None where nothing is promised."""

    name: str
    value: float
    unit: str
    target: str
    ok: bool | None


def limited(name: str, value: float, unit: str, limit: float | None, *, at_least: bool = False) -> Row:
    """Return a row that is met when the value is at most (or at least) the limit."""
    if limit is None:
        return Row(name, value, unit, "", None)
    ok = value >= limit if at_least else value <= limit
    return Row(name, value, unit, f"{'>=' if at_least else '<='} {limit:g}", ok)


def interleaved(steps: dict[str, Step], rounds: int, sync: Step, between: Step = lambda: None) -> dict[str, float]:
    """Return the median milliseconds of each step; one of each a round, after two rounds to warm up.

    `between` runs before each round, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        between()
        for name, step in steps.items():
            sync()
            begin = time.perf_counter()
            step()
            sync()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(shapes: Iterable[tuple[int, ...]], device: str, scale: float) -> list[nn.Parameter]:
    """Return weights as a network starts with, and gradients of one scale."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device) / max(1, shape[-1]) ** 0.5
        params.append(nn.Parameter(weight if len(shape) > 1 else torch.zeros(shape, device=device)))
        params[-1].grad = torch.randn(shape, generator=generator, device=device) * scale
    return params


def theirs(params: list[nn.Parameter], device: str) -> dict[str, Step]:
    """Return the steps of other people's optimizers: torch's Adagrad in its forms, LAMB where installed."""
    given: dict[str, Any] = {"lr": 0.1, "initial_accumulator_value": 0.1}
    steps: dict[str, Step] = {}
    if device == "cpu":
        steps[ADAGRAD] = torch.optim.Adagrad(params, **given, fused=True).step
    steps["torch Adagrad foreach"] = torch.optim.Adagrad(params, **given, foreach=True).step
    steps["torch Adagrad for-loop"] = torch.optim.Adagrad(params, **given, foreach=False).step
    with contextlib.suppress(ImportError):
        steps["pytorch_optimizer Lamb"] = importlib.import_module("pytorch_optimizer").Lamb(params, lr=1e-3).step
    return steps


def ours(params: list[nn.Parameter], device: str) -> dict[str, Step]:
    """Return the steps of this package."""
    steps: dict[str, Step] = {"adagrad": optim.build_optimizer("adagrad", params, lr=0.1).step}
    for label, given in METHODS.items():
        steps[label] = optim.build_optimizer(model_or_params=params, lr=0.1, **given).step
    steps["clippy, no compiler"] = optim.build_optimizer("clippy", params, lr=0.1, backend="eager").step
    steps["clippy, on_nonfinite=skip"] = optim.build_optimizer("clippy", params, lr=0.1, on_nonfinite="skip").step
    steps["clippy, collect_stats"] = optim.build_optimizer("clippy", params, lr=0.1, collect_stats=True).step
    steps["clippy, lr <= lambda_abs"] = optim.build_optimizer("clippy", params, lr=0.01).step
    if device != "cpu":
        steps["clippy, torch.compile"] = torch.compile(optim.build_optimizer("clippy", params, lr=0.1).step)
    return steps


def bench_dense(name: str, device: str, rounds: int, scale: float) -> list[Row]:
    """Time every candidate on one tensor set."""
    params = tensors(SETS[name], device, scale)
    sync: Step = torch.cuda.synchronize if device == "cuda" else lambda: None

    def turn() -> None:
        # The same gradient in every round would drive the weights away, and no training does that.
        for param in params:
            assert param.grad is not None
            param.grad.neg_()

    medians = interleaved({**theirs(params, device), **ours(params, device)}, rounds, sync, turn)
    base = medians[ADAGRAD if device == "cpu" else "torch Adagrad foreach"]
    what = f"{name}, gradients ~ {scale:g}"
    rows = [limited(f"{what}: {label}", value, "ms", None) for label, value in medians.items()]
    for label in METHODS:
        limit = LIMITS[name] if device == "cpu" else 1.0
        rows.append(limited(f"{what}: {label} / Adagrad", medians[label] / base, "ratio", limit))
    if device == "cuda":
        rows.append(bandwidth_row(what, params, medians["clippy, torch.compile"], rounds, sync))
    return rows


def bandwidth_row(what: str, params: list[nn.Parameter], milliseconds: float, rounds: int, sync: Step) -> Row:
    """Return the share of the device's copy bandwidth that Clippy reaches, counted over 8 streams."""
    source = torch.empty(sum(param.numel() for param in params), device=params[0].device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, rounds, sync)["copy"]
    return limited(f"{what}: share of copy bandwidth", 8 / milliseconds * copy / 2, "ratio", 0.7, at_least=True)


def bench_sparse(rounds: int, touched: int = 10_000, width: int = 16) -> list[Row]:
    """Time 10,000 touched rows of a small and of a large table."""
    steps: dict[str, Step] = {}
    for rows in (10**4, 10**7):
        table = nn.Parameter(torch.zeros(rows, width))
        index = torch.randint(0, rows, (1, touched), generator=torch.Generator().manual_seed(0))
        optimizer = optim.build_optimizer("clippy", [table], lr=0.1)
        grad = torch.sparse_coo_tensor(index, torch.randn(touched, width), table.shape, check_invariants=True)

        def step(table: nn.Parameter = table, grad: Tensor = grad, optimizer: Any = optimizer) -> None:
            table.grad = grad.clone()  # not yet coalesced, as autograd leaves it
            optimizer.step()

        steps[f"sparse: 10,000 rows of {rows:,}"] = step
    medians = interleaved(steps, rounds, lambda: None)
    small, large = medians.values()
    return [limited(name, value, "ms", None) for name, value in medians.items()] + [
        limited("sparse: large table / small table", large / small, "ratio", 1.2)
    ]


def bench_stats(rounds: int, batch: int) -> list[Row]:
    """Time what collecting statistics adds to a training step of Large."""
    sizes = [INPUT, 4096, 4096, 4096, 4096]
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(4096, 6))
    inputs = torch.randn(batch, INPUT)
    optimizer = optim.build_optimizer("clippy", model, lr=0.1)

    def gradients() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()

    def step(collect: bool) -> None:
        optimizer.collect_stats = collect
        optimizer.step()

    steps: dict[str, Step] = {"backward": gradients, "off": lambda: step(False), "on": lambda: step(True)}
    medians = interleaved(steps, rounds, lambda: None)
    added = (medians["on"] - medians["off"]) / (medians["backward"] + medians["off"])
    return [
        limited(f"large: forward and backward, batch {batch}", medians["backward"], "ms", None),
        limited("large: statistics, share of a training step", added, "ratio", 0.03),
    ]


def show(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print("| what | value | unit | target | met |\n|---|---:|---|---|---|")
    for row in rows:
        met = "" if row.ok is None else "yes" if row.ok else "NO"
        print(f"| {row.name} | {row.value:.3g} | {row.unit} | {row.target} | {met} |")


def main() -> int:
    """Run the benchmark; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds, one step of every candidate each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1024, help="examples of the training step")
    parser.add_argument("--dense-only", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    for name in given.sets:
        for scale in (1e-3, 1.0):  # gradients under which Clippy hardly clips, and clips hard
            print(f"{name}, gradients ~ {scale:g} ...", file=sys.stderr)
            rows += bench_dense(name, given.device, given.rounds, scale)
    if given.device == "cpu" and not given.dense_only:
        print("sparse, statistics ...", file=sys.stderr)
        rows += bench_sparse(given.rounds * 3) + bench_stats(max(3, given.rounds // 3), given.batch)
    show(rows)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
