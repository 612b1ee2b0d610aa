"""Time TensorFlow Recommenders' ClippyAdagrad, for bench_optim.py; runs in a separate environment.

    python scripts/bench/bench_optim_tfrs.py '{"shapes": [[512, 512]], "scale": 1e-3, "seconds": 10, "threads": 2}'

Prints one line of JSON. The step is a tf.function, as Keras runs it in training.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # the optimizer is written for Keras 2


def bench(shapes: list[list[int]], scale: float, seconds: float, threads: int) -> dict[str, Any]:
    """Return the median milliseconds of a step, the rounds it took and the versions."""
    tf: Any = importlib.import_module("tensorflow")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tfrs: Any = importlib.import_module("tensorflow_recommenders")
    weights = [tf.Variable(tf.random.normal(shape, stddev=max(1, shape[-1]) ** -0.5)) for shape in shapes]
    there = [tf.random.normal(shape, stddev=scale) for shape in shapes]
    back = [-grad for grad in there]
    optimizer = tfrs.experimental.optimizers.ClippyAdagrad(
        learning_rate=0.1,
        variable_relative_threshold=0.5,
        absolute_threshold=1e-2,
        use_standard_accumulator_update=True,
    )
    optimizer.build(weights)

    @tf.function
    def step(grads: Any) -> None:
        optimizer.apply_gradients(zip(grads, weights, strict=True))

    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 7 or (time.monotonic() < end and len(times) < 200):
        grads = back if len(times) % 2 else there
        begin = time.perf_counter()
        step(grads)
        times.append((time.perf_counter() - begin) * 1e3)
    versions = {"TensorFlow": tf.__version__, "tensorflow-recommenders": tfrs.__version__}
    return {"milliseconds": statistics.median(times[2:]), "rounds": len(times) - 2, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(bench(**json.loads(sys.argv[1]))))
