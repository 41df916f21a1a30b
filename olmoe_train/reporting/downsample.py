"""Fewer points and fewer bytes, with every extreme kept.

A curve keeps the least and the greatest value of each bucket of records. A matrix over steps, such as experts
x steps, keeps the least and the greatest value of each row and bucket, one byte each.

Shapes: N records, B buckets, L layers, E experts, R rows.
"""

import base64
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmoe_train.reporting.run_data import Series

Array = NDArray[Any]


def bucket_starts(records: int, buckets: int) -> Array:
    """First record of each bucket, int64 [B]; as many buckets as records where there are fewer records."""
    return np.unique(np.linspace(0, records, min(records, buckets), endpoint=False).astype(np.int64))


def keep_extremes(series: Series, points: int) -> tuple[list[int], list[float | None]]:
    """The curve of a metric with about `points` points, as (steps, values). NaN becomes None.

    Each bucket keeps its least and its greatest value, and one NaN if it has any; the first and the last
    record are kept.
    """
    values = np.asarray(series.values, np.float64)
    steps = np.asarray(series.steps)
    if len(values) > points:
        kept = {0, len(values) - 1}
        starts = bucket_starts(len(values), points // 2)
        for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
            bucket = values[start:end]
            is_nan = np.isnan(bucket)
            if is_nan.any():
                kept.add(int(start + is_nan.argmax()))
            if not is_nan.all():
                kept |= {int(start + np.nanargmin(bucket)), int(start + np.nanargmax(bucket))}
        index = sorted(kept)
        values, steps = values[index], steps[index]
    return steps.tolist(), [rounded(value) for value in values.tolist()]


def rounded(value: float) -> float | None:
    """Six significant digits; None for NaN and infinity, which JSON lacks. A whole number is an int."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


def encode(levels: Array) -> str:
    """Base64 of bytes, in C order."""
    return base64.b64encode(np.ascontiguousarray(levels, np.uint8).tobytes()).decode()


def linear_levels(values: Array, low: float, high: float) -> Array:
    """Levels 1 to 255 from low to high, uint8; 0 for NaN."""
    scaled = 1 + 254 * (values - low) / (high - low if high > low else 1.0)
    return np.where(np.isnan(values), 0, np.clip(np.nan_to_num(scaled), 1, 255).round()).astype(np.uint8)


def log_levels(values: Array, low: float, high: float) -> Array:
    """Levels 1 to 255 from low to high, at equal ratios, uint8; 0 for the value 0."""
    ratio = np.log(np.maximum(values, low) / low) / (math.log(high / low) if high > low else 1.0)
    return np.where(values > 0, np.clip(1 + 254 * ratio, 1, 255).round(), 0).astype(np.uint8)


def bucketed(steps: list[int], starts: Array) -> dict[str, list[int]]:
    """First and last step of each bucket."""
    ends = [*(starts[1:] - 1), len(steps) - 1]
    return {"from": [steps[i] for i in starts], "to": [steps[i] for i in ends]}


def matrix_over_steps(steps: list[int], values_NR: Array, buckets: int) -> dict[str, Any]:
    """R rows over steps as bytes.

    Returns:
        `from` and `to` (steps of the buckets), `low` and `high` (values of the levels 1 and 255), `most` and
        `least`: base64 of [R, B]. `least` is absent where every bucket is one record.
    """
    starts = bucket_starts(len(steps), buckets)
    finite = values_NR[np.isfinite(values_NR)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    most = np.fmax.reduceat(values_NR, starts, axis=0).T
    least = np.fmin.reduceat(values_NR, starts, axis=0).T
    matrix: dict[str, Any] = bucketed(steps, starts) | {
        "low": rounded(low),
        "high": rounded(high),
        "rows": len(most),
    }
    matrix["most"] = encode(linear_levels(most, low, high))
    if len(starts) < len(steps):
        matrix["least"] = encode(linear_levels(least, low, high))
    return matrix


def expert_loads(loads: Series, layers: list[int], most_buckets: int, most_bytes: int) -> dict[str, Any]:
    """The experts' loads as multiples of the fair share, in bytes.

    A frame is a whole layers x experts matrix of one step: of each bucket the step whose busiest expert has
    the greatest load, and the first and the last step. `most` and `least` are the extremes of each expert in
    each bucket, of all its steps.

    Args:
        loads: Shares, float32 [L, E] each.
        layers: Numbers of the layers.
        most_buckets: Most buckets.
        most_bytes: Most bytes, before base64, of frames, `most` and `least` together.

    Returns:
        `layers`, `experts`, `low` and `high` (loads of the levels 1 and 255, at equal ratios; level 0 is no
        token), `steps` and `frames` [frames, L, E], and `from`, `to`, `most` and `least` [L, E, B] as in
        `matrix_over_steps`; the latter four are absent where every record is a frame.
    """
    loads_NLE = np.stack(loads.values)
    records, num_layers, experts = loads_NLE.shape
    loads_NLE *= experts
    buckets = max(8, min(most_buckets, most_bytes // (3 * num_layers * experts)))
    starts = bucket_starts(records, buckets)
    low, high = float(loads_NLE[loads_NLE > 0].min(initial=1.0)), float(loads_NLE.max(initial=1.0))
    low = max(low, high / 4096)  # keeps neighboring levels within 3.4% of each other
    peak_N = loads_NLE.max((1, 2))
    ends = [*starts[1:], records]
    kept = {int(start + peak_N[start:end].argmax()) for start, end in zip(starts, ends, strict=True)}
    frames = sorted(kept | {0, records - 1})
    content = {
        "layers": layers,
        "experts": experts,
        "low": rounded(low),
        "high": rounded(high),
        "steps": [loads.steps[i] for i in frames],
        "frames": encode(log_levels(loads_NLE[frames], low, high)),
    }
    if len(starts) < records:
        content |= bucketed(loads.steps, starts)
        for name, extreme in (("most", np.maximum), ("least", np.minimum)):
            values_BLE = extreme.reduceat(loads_NLE, starts, axis=0)
            content[name] = encode(log_levels(values_BLE.transpose(1, 2, 0), low, high))
    return content
