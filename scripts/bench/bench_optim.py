"""Time one optimizer step beside torch's own Adagrad, on the tensor sets of the paper's models.

    python scripts/bench/bench_optim.py --json results/bench_optim.json --markdown results/bench_optim.md

All candidates step the same weights and gradients, in a new random order every round, for as many rounds as the time
allows. The tables show medians. Ratios are of medians of one run. Exits with 1 where a target is missed.

Also timed: pytorch_optimizer's LAMB where installed (`pip install --no-deps pytorch_optimizer`), and TensorFlow
Recommenders' ClippyAdagrad in a separate process, by `--tfrs-python`, an interpreter that has tensorflow-cpu,
tf-keras and tensorflow-recommenders.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optim
from bench_report import Line, finish, limited, met
from bench_tensors import INPUT, SETS, Gradients, tensors, turn

START = time.monotonic()
ADAGRAD: dict[str, Any] = {"lr": 0.1, "initial_accumulator_value": 0.1}
BASE = {"cpu": "torch Adagrad fused", "cuda": "torch Adagrad foreach"}
TFRS = "TFRS ClippyAdagrad"
SCALES = (1e-3, 1.0)  # gradients under which Clippy hardly clips, and clips hard
PEERS: dict[str, str] = {}  # versions of other people's packages, as they are used
# Largest ratio to torch's fused Adagrad on the CPU, for these methods on these sets, where nothing clips.
LIMIT, LIMITED, LIMITED_SETS = 1.6, ("clippy", "gc"), ("small", "large")
METHODS = ("clippy", "gc", "agc", "lamb")
# The same for methods on Adam and torch's fused AdamW.
ADAM_BASE, ADAM_LIMIT, ADAM_METHODS = "torch AdamW fused", 2.0, ("clippy_adam", "clippy_adamw", "lamb_adam")
Step = Callable[[], object]
NOTHING: Step = int  # returns 0


def interleaved(
    steps: dict[str, Step], seconds: float, sync: Step = NOTHING, between: Step = NOTHING
) -> dict[str, float]:
    """Return the median milliseconds of each step, over as many rounds as fit the time, after two to warm up.

    Each round runs every step once, in a random order. `between` runs before each round and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw, end = list(steps), random.Random(0), time.monotonic() + seconds
    for number in range(202):
        if number >= 7 and time.monotonic() > end:
            break
        between()
        draw.shuffle(order)
        for name in order:
            sync()
            begin = time.perf_counter()
            steps[name]()
            sync()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    say(f"{len(times[order[0]])} rounds of {len(steps)}")
    return {name: statistics.median(values) for name, values in times.items()}


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{time.monotonic() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


def fast(params: list[nn.Parameter], device: str, *, everything: bool) -> dict[str, Step]:
    """Return the step that ratios refer to, the methods, and the other ways to step of this package."""
    form = {"fused": True} if device == "cpu" else {"foreach": True}
    steps: dict[str, Step] = {BASE[device]: torch.optim.Adagrad(params, **ADAGRAD, **form).step}
    steps |= {name: optim.build_optimizer(name, params, lr=0.1).step for name in METHODS}
    if not everything:
        return steps
    steps |= {
        "adagrad": optim.build_optimizer("adagrad", params, lr=0.1).step,
        "clippy, on_nonfinite=skip": optim.build_optimizer("clippy", params, lr=0.1, on_nonfinite="skip").step,
        "clippy, collect_stats": optim.build_optimizer("clippy", params, lr=0.1, collect_stats=True).step,
        "clippy, lr <= lambda_abs": optim.build_optimizer("clippy", params, lr=0.01).step,
    }
    if device != "cpu":
        steps["clippy, compiled"] = optim.build_optimizer("clippy", params, lr=0.1, backend="compiled").step
    return steps


def adam(params: list[nn.Parameter]) -> dict[str, Step]:
    """Return torch's fused AdamW, and the methods on Adam."""
    steps: dict[str, Step] = {ADAM_BASE: torch.optim.AdamW(params, lr=1e-3, fused=True).step}
    return steps | {name: optim.build_optimizer(name, params, lr=0.1).step for name in ADAM_METHODS}


def slow(params: list[nn.Parameter], device: str) -> dict[str, Step]:
    """Return the steps that make temporaries as large as the tensors, and pytorch_optimizer's LAMB where installed."""
    steps: dict[str, Step] = {"torch Adagrad for-loop": torch.optim.Adagrad(params, **ADAGRAD, foreach=False).step}
    if device == "cpu":
        steps["torch Adagrad foreach"] = torch.optim.Adagrad(params, **ADAGRAD, foreach=True).step
        steps["clippy, no compiler"] = optim.build_optimizer("clippy", params, lr=0.1, backend="eager").step
    with contextlib.suppress(ImportError):
        PEERS["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
        steps["pytorch_optimizer LAMB"] = importlib.import_module("pytorch_optimizer").Lamb(params, lr=1e-3).step
    return steps


def bench_dense(
    name: str, scale: float, device: str, seconds: float, tfrs: Path | None
) -> tuple[dict[str, float], list[Line]]:
    """Time every candidate on one tensor set; return medians in milliseconds, and rows."""
    params = tensors(SETS[name], device)
    gradients = Gradients(params, scale)
    sync: Step = torch.cuda.synchronize if device == "cuda" else NOTHING

    everything = scale == SCALES[0]  # the cost of the others does not depend on the gradient
    medians = interleaved(fast(params, device, everything=everything), seconds / 2, sync, gradients)
    if everything:  # separately, because page faults of fresh temporaries disturb the next step
        medians |= interleaved(slow(params, device), seconds / 4, sync, gradients)
    medians |= interleaved(adam(params), seconds / 4, sync, gradients)
    what, base = f"{name}, gradients ~ {scale:g}", BASE[device]
    rows = []
    for label in METHODS:
        title, ratio = f"{what}: {label} / {base}", medians[label] / medians[base]
        target = device == "cpu" and everything and label in LIMITED and name in LIMITED_SETS
        rows.append(limited(title, ratio, LIMIT) if target else Line(title, ratio, "ratio"))
    for label in ADAM_METHODS:
        title, ratio = f"{what}: {label} / {ADAM_BASE}", medians[label] / medians[ADAM_BASE]
        target = device == "cpu" and name in LIMITED_SETS
        rows.append(limited(title, ratio, ADAM_LIMIT) if target else Line(title, ratio, "ratio"))
    if device == "cuda" and everything:
        source = torch.empty(sum(param.numel() for param in params), device=device)
        copy = interleaved({"copy": source.clone}, seconds / 4, sync)[
            "copy"
        ]  # two streams of memory; Clippy takes eight
        rows.append(Line(f"{what}: clippy, share of copy bandwidth", 4 * copy / medians["clippy, compiled"], "ratio"))
    if tfrs and everything:
        medians[TFRS] = bench_tfrs(tfrs, SETS[name], scale, seconds / 4)
    return medians, [Line(f"{what}: {label}", value, "ms") for label, value in medians.items()] + rows


def bench_tfrs(python: Path, shapes: list[tuple[int, ...]], scale: float, seconds: float) -> float:
    """Return the milliseconds of a step of the authors' own Keras optimizer, timed in a separate process."""
    script = Path(__file__).with_name("bench_optim_tfrs.py")
    given = {"shapes": shapes, "scale": scale, "seconds": seconds, "threads": torch.get_num_threads()}
    command = [str(python), str(script), json.dumps(given)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    PEERS.update(found["versions"])
    say(f"{found['rounds']} rounds of {TFRS}")
    return float(found["milliseconds"])


def bench_sparse(seconds: float, touched: int = 10_000, width: int = 16) -> list[Line]:
    """Time 10,000 touched rows of a small and of a large table."""
    steps: dict[str, Step] = {}
    for rows in (10**4, 10**7):
        table = nn.Parameter(torch.zeros(rows, width))
        index = torch.randperm(rows)[None, :touched]  # as many distinct rows of either table
        optimizer = optim.build_optimizer("clippy", [table], lr=0.1)
        grad = torch.sparse_coo_tensor(index, torch.randn(touched, width), table.shape, check_invariants=True)

        def step(table: nn.Parameter = table, grad: Tensor = grad, optimizer: Any = optimizer) -> None:
            table.grad = grad.clone()  # not yet coalesced, as autograd leaves it
            optimizer.step()

        steps[f"sparse: 10,000 rows of {rows:,}"] = step
    medians = interleaved(steps, seconds)
    small, large = medians.values()
    return [Line(name, value, "ms") for name, value in medians.items()] + [
        Line("sparse: large table / small table", large / small, "ratio")
    ]


def bench_stats(seconds: float, batch: int) -> list[Line]:
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

    step(True)  # makes the rows of the statistics
    backward = interleaved({"backward": gradients}, seconds / 2)["backward"]
    steps: dict[str, Step] = {"off": lambda: step(False), "on": lambda: step(True)}
    off, on = interleaved(steps, seconds / 2, NOTHING, lambda: turn(model.parameters())).values()
    times = {f"forward and backward, batch {batch}": backward, "step without statistics": off, "step with them": on}
    share = (on - off) / (backward + off)
    return [Line(f"large: {what}", value, "ms") for what, value in times.items()] + [
        Line("large: statistics, share of a training step", share, "ratio")
    ]


def machine(device: str) -> str:
    """Return the processor, the threads and the versions that the figures belong to."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {"Python": platform.python_version(), "torch": torch.__version__, **PEERS}
    parts = [*([torch.cuda.get_device_name()] if device == "cuda" else []), name, f"{torch.get_num_threads()} threads"]
    return ", ".join(parts + [f"{what} {version}" for what, version in versions.items()])


def markdown(where: str, dense: dict[str, dict[str, float]], rows: list[Line]) -> str:
    """Return the tables: milliseconds of a step with the ratio to the first candidate, and the targets."""
    labels = list(dict.fromkeys(label for medians in dense.values() for label in medians))
    lines = [f"Medians on {where}.", "", f"| milliseconds (ratio) | {' | '.join(dense)} |"]
    lines.append("|---|" + "---:|" * len(dense))
    for label in labels:
        pairs = [(medians.get(label), next(iter(medians.values()))) for medians in dense.values()]
        cells = [f"{value:.3g} ({value / base:.2f})" if value else "" for value, base in pairs]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| what | value | unit | target | met |", "|---|---:|---|---|---|"]
    for row in rows:
        if row.target or row.unit == "ratio" or "gradients" not in row.name:
            lines.append(f"| {row.name} | {row.value:.3g} | {row.unit} | {row.target} | {met(row)} |")
    return "\n".join(lines) + "\n"


def report(where: str, dense: dict[str, dict[str, float]], rows: list[Line], given: argparse.Namespace) -> int:
    """Print the tables, write them and the rows as JSON; return 1 where a target is missed."""
    table = markdown(where, dense, rows)
    print(table, end="")
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(table)
    return finish([Line(f"threads on {where}", torch.get_num_threads(), "threads"), *rows], given.json)


def main() -> int:
    """Run the benchmark; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seconds", type=float, default=300, help="about how long to measure; setting up comes on top")
    parser.add_argument("--batch", type=int, default=512, help="examples of the training step")
    parser.add_argument("--tfrs-python", type=Path, help="interpreter that has tensorflow-recommenders")
    given = parser.parse_args()
    share = given.seconds / 8  # three sets twice, and two more
    dense, rows = {}, []
    for name, scale in itertools.product(given.sets, SCALES):
        column = f"{name}, gradients ~ {scale:g}"
        say(f"{column} ...")
        dense[column], found = bench_dense(name, scale, given.device, share, given.tfrs_python)
        rows += found
    if given.device == "cpu":
        say("sparse ...")
        rows += bench_sparse(share / 2)
        say("statistics ...")
        rows += bench_stats(share, given.batch)
    return report(machine(given.device), dense, rows, given)


if __name__ == "__main__":
    sys.exit(main())
