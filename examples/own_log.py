"""A small log of a shop, to follow the tutorial with.

Writes a folder as your own log would be: one Parquet file per day in time order, and a `schema.yaml` beside them. Users
see items at a price, with signals that an upstream service computes for them. They click or not, and stay for some
seconds. On the fourth day the service is updated, and for three rows in a hundred one signal comes in thousandths of
its unit. That is the kind of fault that ends a model which had trained well for days. `python examples/own_log.py shop`
takes two seconds.
"""

# %%
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

DAYS, ROWS_PER_DAY, USERS, ITEMS, SIGNALS = 5, 40_000, 3_000, 800, 16
START_MS = 1_767_225_600_000  # 2026-01-01 in UTC
DAY_MS = 86_400_000

SCHEMA = """\
name: shop
time_column: ts
time_unit: ms
dense:
- {name: price, transform: log1p}
- {name: discount}
SIGNALS
categorical:
- {name: user, hash_buckets: 5000, embedding_dim: 8}
- {name: item, num_embeddings: 800, embedding_dim: 8}
- {name: country, vocabulary: [de, fr, jp], embedding_dim: 4}
tasks:
- {name: click}
- {name: stay, type: regression, column: stay_ms, scale: 0.001, transform: log1p}
""".replace("SIGNALS", "\n".join(f"- {{name: signal_{number:02}}}" for number in range(SIGNALS)))

# %% [markdown]
# Whether a user clicks depends on the user, the item, the price and the signals.


# %%
def one_day(day: int, random: np.random.Generator, taste: dict[str, np.ndarray]) -> pl.DataFrame:
    """Return the rows of one day in time order."""
    n = ROWS_PER_DAY
    ts = np.sort(random.integers(DAY_MS, size=n)) + START_MS + day * DAY_MS
    user, item = random.integers(USERS, size=n), np.minimum(random.zipf(1.3, size=n) - 1, ITEMS - 1)
    price, discount = random.lognormal(2.0, 0.5, size=n), random.choice([0.0, 0.1, 0.3], size=n, p=[0.7, 0.2, 0.1])
    signals = random.normal(size=(n, SIGNALS))
    liking = taste["user"][user] + taste["item"][item] + signals @ taste["signals"] + 2 * discount - np.log(price)
    click = random.random(n) < 1 / (1 + np.exp(-1.0 - liking))
    stay = np.where(click, random.lognormal(2.0 + 0.2 * np.tanh(liking), 0.7), random.lognormal(0.0, 0.5, size=n))
    if day == 3:
        signals[random.random(n) < 0.03, 4] *= 1000  # the fault
    columns = {
        "ts": ts,
        "user": [f"u{number}" for number in user],
        "item": item,
        "country": np.array(["de", "fr", "jp", "nl"])[random.integers(4, size=n)],
        "price": price,
        "discount": discount,
        "click": click.astype(np.int8),
        "stay_ms": (1000 * stay).astype(np.int64),
    }
    return pl.DataFrame(columns | {f"signal_{number:02}": signals[:, number] for number in range(SIGNALS)})


def write(folder: Path) -> None:
    """Write the log."""
    random = np.random.default_rng(0)
    sizes = {"user": (USERS, 0.5), "item": (ITEMS, 0.8), "signals": (SIGNALS, 0.3)}
    taste = {name: random.normal(0, spread, size=size) for name, (size, spread) in sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(DAYS):
        one_day(day, random, taste).write_parquet(folder / f"2026-01-{day + 1:02}.parquet")
    (folder / "schema.yaml").write_text(SCHEMA, encoding="utf-8")
    print(f"{folder}: {DAYS} days, {DAYS * ROWS_PER_DAY:,} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "shop"))
