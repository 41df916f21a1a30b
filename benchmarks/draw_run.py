"""Draws a run as one SVG: its losses by step, and the load of every expert at the last logged step.

    python benchmarks/draw_run.py runs/quickstart docs/images/quickstart.svg

Reads metrics.jsonl only. The heat map has a row per layer and a column per expert; 1 is an even load.
"""

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, TOP, BOTTOM = 860, 300, 40, 46
LEFT_PANEL, RIGHT_PANEL = (60, 400), (500, 830)
"""Horizontal extent of the plot areas, in pixels."""
INK, GRID, TRAIN, VALIDATION = "#888888", "#88888844", "#3b82c4", "#d9722e"
"""Colors that read on white and on dark grounds."""
HOTTEST = 2.0
"""Load, as a multiple of an even load, that has the full color."""


def read_run(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(Records of training steps, records of validations) of metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return (
        [record for record in records if "train/ce_loss" in record],
        [record for record in records if "eval/validation/loss" in record],
    )


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, color: str = INK) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} font-size="{size}" fill="{color}">{words}</text>'


def losses(steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> list[str]:
    """The left panel: cross-entropy in nats per token."""
    series = {
        "training": (TRAIN, [(record["step"], record["train/ce_loss"]) for record in steps]),
        "validation": (
            VALIDATION,
            [(record["step"], record["eval/validation/loss"]) for record in validations],
        ),
    }
    points = [point for _, values in series.values() for point in values]
    last = max(step for step, _ in points)
    low, high = int(min(loss for _, loss in points)), int(max(loss for _, loss in points)) + 1
    left, right = LEFT_PANEL

    def place(step: float, loss: float) -> tuple[float, float]:
        return (
            left + (right - left) * step / last,
            HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (loss - low) / (high - low),
        )

    parts = [text((left + right) / 2, 20, "cross-entropy, nats per token", size=14)]
    for loss in range(low, high + 1):
        _, y = place(0, loss)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(text(left - 8, y + 4, str(loss), "end"))
    for step in (0, last // 2, last):
        parts.append(text(place(step, low)[0], HEIGHT - BOTTOM + 18, str(step)))
    parts.append(text((left + right) / 2, HEIGHT - 8, "optimizer step"))
    for number, (name, (color, values)) in enumerate(series.items()):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*value) for value in values))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(text(right - 8, TOP + 16 + 16 * number, name, "end", color=color))
    return parts


def expert_load(record: dict[str, Any]) -> list[str]:
    """The right panel: load of each expert as a multiple of an even load."""
    keys = sorted(key for key in record if key.startswith("router/layer_") and key.endswith("/load"))
    loads_LE = [record[key] for key in keys]
    layers, experts = len(loads_LE), len(loads_LE[0])
    left, right = RIGHT_PANEL
    width, height = (right - left) / experts, (HEIGHT - BOTTOM - TOP) / layers
    parts = [text((left + right) / 2, 20, f"expert load at step {record['step']}, 1 = even", size=14)]
    for layer, loads_E in enumerate(loads_LE):
        y = TOP + layer * height
        parts.append(text(left - 8, y + height / 2 + 4, str(layer), "end"))
        for expert, share in enumerate(loads_E):
            load = share * experts
            parts.append(
                f'<rect x="{left + expert * width:.1f}" y="{y:.1f}" width="{width:.2f}" '
                f'height="{height:.2f}" '
                f'fill="{TRAIN}" fill-opacity="{min(load / HOTTEST, 1):.3f}"><title>layer {layer}, '
                f"expert {expert}: {load:.2f}</title></rect>"
            )
    parts.append(
        f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{layers * height}" fill="none" '
        f'stroke="{INK}"/>'
    )
    parts.append(text(left, HEIGHT - BOTTOM + 18, "0", "start"))
    parts.append(text(right, HEIGHT - BOTTOM + 18, str(experts - 1), "end"))
    parts.append(
        text((left + right) / 2, HEIGHT - 8, f"expert (color: 0 to {HOTTEST:g} and more); rows: layers")
    )
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    steps, validations = read_run(options.run_dir)
    body = "\n".join([*losses(steps, validations), *expert_load(steps[-1])])
    options.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
