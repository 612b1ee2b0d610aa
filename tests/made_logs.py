"""Two logs as a new user has them: a messy CSV of a shop, and Parquet with the columns of KuaiRand's raw log."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START = 1_650_844_800  # 2022-04-25 00:00 UTC
DAY = 86_400


def write_messy_csv(path: Path, *, rows: int = 4000, days: int = 5) -> Path:
    """A CSV by hand and by pandas: unsorted, semicolons, blanks, texts for numbers, broken lines, rows twice.

    ``clicked`` depends on price and category, ``dwell_seconds`` on the click; ``checkout_total`` is written after the
    purchase and gives it away.
    """
    r = np.random.default_rng(0)
    times = START + r.integers(0, days * DAY, rows)
    items, users = r.zipf(1.4, rows) % 700, r.integers(0, 900, rows)
    price = np.exp(r.normal(3, 1.2, rows))
    category = items % 7
    click = r.random(rows) < 1 / (1 + np.exp(0.25 * (price > 20) + 0.5 * (category - 3)))
    bought = click & (r.random(rows) < 0.3)
    names = ["", "Event Time", "user_id", "item_id", "category", "price", "is_member", "country", "session_uuid"]
    names += ["clicked", "dwell_seconds", "purchased", "checkout_total", "note", "shop"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(names)
        for i in range(rows):
            stamp = np.datetime_as_string(np.datetime64(int(times[i]), "s")).replace("T", " ")
            row = [i, stamp, f"u{users[i]}", items[i], ["toys", "no", "food ", "Büro"][category[i] % 4]]
            row += [f"{price[i]:,.2f}" if r.random() > 0.02 else "N/A", ["yes", "No", "", "TRUE"][r.integers(4)]]
            row += [["de", "fr", "jp", ""][r.integers(4)], f"{r.integers(2**60):x}", int(click[i])]
            row += [f"{np.exp(r.normal(2, 1)):.1f}" if click[i] else "0", "true" if bought[i] else "false"]
            row += [f"{price[i]:.2f}" if bought[i] else "0.00", 'a, "long" text; ' * int(r.integers(1, 6)), "main"]
            writer.writerow(row)
            if i % 500 == 7:
                writer.writerow(row)  # twice
        file.write("total;4000\n")  # a remark of the exporting program
        file.write(";not a time;u1;1;toys;1;yes;de;x;1;1;true;1;n;main\n")
    return path


def write_raw_kuairand(folder: Path, *, rows: int = 6000, days: int = 4) -> Path:
    """Parquet files with the columns of KuaiRand's standard log, sorted, and two columns that were joined to it."""
    folder.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(1)
    times = np.sort(START * 1000 + r.integers(0, days * DAY * 1000, rows))
    videos, users = r.zipf(1.3, rows) % 2000, r.integers(0, 300, rows)
    duration = (5000 + 1000 * (videos % 90)).astype(np.int64)
    click = (r.random(rows) < 0.2 + 0.5 * (videos % 3 == 0)).astype(np.int64)
    play = (click * r.random(rows) * duration).astype(np.int64)
    history = [list(map(int, videos[max(0, i - 5) : i])) for i in range(rows)]
    dates = [int(str(np.datetime64(int(t), "ms").astype("datetime64[D]")).replace("-", "")) for t in times]
    columns = {
        "user_id": users,
        "video_id": videos,
        "date": np.array(dates),
        "hourmin": (times // 3_600_000 % 24) * 100,
        "time_ms": times,
        "is_click": click,
        "is_like": ((click == 1) & (r.random(rows) < 0.05)).astype(np.int64),
        "is_follow": np.zeros(rows, dtype=np.int64),
        "long_view": (play > 18_000).astype(np.int64),
        "play_time_ms": play,
        "duration_ms": duration,
        "is_rand": np.zeros(rows, dtype=np.int64),
        "tab": r.integers(0, 8, rows),
        "follow_user_num": r.zipf(1.7, rows).clip(max=5000).astype(np.int64),
        "user_active_degree": pa.array([["full_active", "high_active", "middle"][u % 3] for u in users]),
        "video_history": pa.array(history, pa.list_(pa.int64())),
    }
    table = pa.table(columns)
    for number in range(3):
        part = table.slice(number * rows // 3, rows // 3)
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=1000)
    return folder
