"""The rows of `tools.bench_decode`: times by decode call, and how they are printed."""

import math
import statistics


def timing(calls: list[tuple[int, float]], batch_size: int) -> dict:
    """ms a step over decode calls (the first of each generation left out): median, and the middle half's spread."""
    per_step = sorted(1e3 * seconds / steps for steps, seconds in calls)
    last = len(per_step) - 1
    low, high = per_step[math.floor(0.25 * last)], per_step[math.ceil(0.75 * last)]
    median = statistics.median(per_step)
    return {"ms_per_step": median, "ms_low": low, "ms_high": high, "tokens_per_s": batch_size * 1e3 / median}


COLUMNS = (
    ("batch", "{}"),
    ("share", "{}"),
    ("prefetch", "{}"),
    ("ttft_s", "{:.3f}"),
    ("prompt_mb", "{:.0f}"),
    ("ms_per_step", "{:.2f}"),
    ("ms_low", "{:.2f}"),
    ("ms_high", "{:.2f}"),
    ("mean_ms_per_step", "{:.2f}"),
    ("first_ms_per_step", "{:.2f}"),
    ("tokens_per_s", "{:.1f}"),
    ("hit_rate", "{:.3f}"),
    ("mb_per_token", "{:.1f}"),
    ("early_mb", "{:.1f}"),
    ("late_mb", "{:.1f}"),
    ("wasted_mb", "{:.1f}"),
    ("useful", "{:.3f}"),
    ("link_gbps", "{:.1f}"),
    ("percent_of_roofline", "{:.1f}"),
    ("hbm_gbps", "{:.0f}"),
    ("percent_of_hbm", "{:.1f}"),
    ("peak_bytes", "{:.4g}"),
    ("planned_bytes", "{:.4g}"),
    ("first_run_s", "{:.1f}"),
)


def print_row(row: dict | None) -> None:
    """The heading for None. A value that this row does not have, or this device does not count, is a dash."""
    cells = [
        name if row is None else "-" if row.get(name) is None else form.format(row[name]) for name, form in COLUMNS
    ]
    print("  ".join(cell.rjust(len(name)) for cell, (name, _) in zip(cells, COLUMNS, strict=True)), flush=True)
