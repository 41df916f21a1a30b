"""Pictures of a router analysis as SVG: lines, bars and heat maps, after the figures of the OLMoE paper.

A plotting library would be a dependency for five pictures. The colors read on white and on dark grounds.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from olmoe_train.reporting.router_analysis import ALL_PAIRS

INK, GRID, FILL, EVEN = "#888888", "#88888844", "#3b82c4", "#d9722e"
SERIES = ("#3b82c4", "#d9722e", "#3a9e5f")
FIRST_LAYER, LAST_LAYER = (67, 197, 224), (240, 83, 155)
"""Colors of the layers' lines, red, green, blue; those between are mixed."""
FULL_COACTIVATION = 0.6
"""Co-activation with the full color, as in the paper's figure 21."""
GAP = 56
"""Pixels around a panel, for its title and labels."""

Record = dict[str, Any]


def pictures(record: Record) -> dict[str, str]:
    """File name -> SVG. Saturation needs a second model; co-activation, domains and importance are those of
    the reference."""
    found = {
        "coactivation.svg": _coactivation(record),
        "domains.svg": draw_domains(record, record["top_k"]),
        "importance.svg": _importance(record),
    }
    if record["top_k"] > 1:
        found["domains_top_1.svg"] = draw_domains(record, 1)
    if record["saturation"]:
        found["saturation.svg"] = _saturation(record)
    if record["vocabulary"]:
        found["vocabulary.svg"] = _vocabulary(record)
    return found


def drawn_layers(layers: int) -> list[int]:
    """The first, the middle and the last layer: 0, 7 and 15 of 16, as in the paper."""
    return sorted({0, (layers - 1) // 2, layers - 1})


def _text(x: float, y: float, words: object, anchor: str = "middle", size: int = 11, color: str = INK) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} font-size="{size}" fill="{color}">{escape(str(words))}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="system-ui, sans-serif">\n{body}\n</svg>\n'
    )


def _lines(
    left: float,
    top: float,
    title: str,
    labels: Sequence[object],
    series: Sequence[tuple[str, str, list[float | None]]],
    even: float | None = None,
) -> list[str]:
    """A panel of 320 x 220 pixels. series: (name, color, values 0 to 1, one per label; None leaves a gap)."""
    width, height = 320.0, 220.0

    def place(index: int, value: float) -> tuple[float, float]:
        return left + width * (index + 0.5) / len(labels), top + height * (1 - value)

    parts = [_text(left + width / 2, top - 14, title, size=14)]
    for percent in (0, 25, 50, 75, 100):
        y = place(0, percent / 100)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 6, y + 4, f"{percent}%", "end"))
    for index in range(0, len(labels), max(1, len(labels) // 8)):
        parts.append(_text(place(index, 0)[0], top + height + 16, labels[index]))
    if even is not None:
        y = place(0, even)[1]
        line = f'x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"'
        parts.append(f'<line {line} stroke="{EVEN}" stroke-dasharray="4 3"><title>chance</title></line>')
    for name, color, values in series:
        points = [place(index, value) for index, value in enumerate(values) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), value in zip(points, [one for one in values if one is not None], strict=True):
            hover = f"<title>{escape(name)}: {value:.1%}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}">{hover}</circle>')
    return parts


def _heat_map(
    left: float,
    top: float,
    size: tuple[float, float],
    title: str,
    rows: list[list[float]],
    labels: tuple[Sequence[object], Sequence[object]],
    highest: float,
) -> list[str]:
    """A panel of `size` pixels. labels: of the rows and the columns. highest: value with the full color."""
    width, height = size[0] / len(rows[0]), size[1] / len(rows)
    parts = [_text(left + size[0] / 2, top - 14, title, size=14)]
    for i, row in enumerate(rows):
        if i % max(1, len(rows) // 16) == 0:
            parts.append(_text(left - 5, top + (i + 0.5) * height + 4, labels[0][i], "end", 10))
        for j, value in enumerate(row):
            box = f'x="{left + j * width:.1f}" y="{top + i * height:.1f}" width="{width:.2f}"'
            opacity = min(value / highest, 1.0) if highest else 0.0
            hover = f"<title>{labels[0][i]}, {labels[1][j]}: {value:.1%}</title>"
            parts.append(
                f'<rect {box} height="{height:.2f}" fill="{FILL}" fill-opacity="{opacity:.3f}">{hover}</rect>'
            )
    for j in range(0, len(rows[0]), max(1, len(rows[0]) // 16)):
        parts.append(_text(left + (j + 0.5) * width, top + size[1] + 14, labels[1][j], size=10))
    frame = f'x="{left}" y="{top}" width="{size[0]}" height="{size[1]}"'
    return [*parts, f'<rect {frame} fill="none" stroke="{INK}"/>']


def _saturation(record: Record) -> str:
    """As the paper's figure 20: a line per layer over the checkpoints, a panel per k."""
    layers, parts = record["layers"], []
    sizes = sorted({entry["k"] for entry in record["saturation"]})
    for panel, k in enumerate(sizes):
        entries = [entry for entry in record["saturation"] if entry["k"] == k]
        names = [short_name(record["sources"][entry["source"]]["name"]) for entry in entries]
        series = [
            (
                f"layer {layer}",
                _layer_color(layer, layers),
                [entry["by_layer"][layer] for entry in entries],
            )
            for layer in range(layers)
        ]
        left = GAP + panel * (320 + GAP)
        parts += _lines(left, 50, f"router saturation, k = {k}", names, series, entries[0]["chance"])
    width = GAP + len(sizes) * (320 + GAP)
    for layer in range(layers):
        x = GAP + layer * 24
        parts.append(_text(x, 312, layer, "start", color=_layer_color(layer, layers)))
    parts.append(_text(GAP - 6, 312, "layer", "end"))
    return _svg(max(width, GAP + layers * 24), 324, parts)


def short_name(name: str) -> str:
    """The last part of a source's name: the step, the revision, or the name of the directory."""
    return name.rstrip("/").rsplit("@", 1)[-1].rsplit("/", 1)[-1]


def _layer_color(layer: int, layers: int) -> str:
    share = layer / max(1, layers - 1)
    mixed = [round(a + (b - a) * share) for a, b in zip(FIRST_LAYER, LAST_LAYER, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _coactivation(record: Record) -> str:
    """As figure 21 (experts chosen greedily), with all experts below."""
    (entry,) = (
        one
        for one in record["coactivation"]
        if one["rule"] == ALL_PAIRS and one["source"] == record["reference"]
    )
    parts, side = [], 260
    layers = drawn_layers(record["layers"])
    for column, layer in enumerate(layers):
        one = entry["layers"][layer]
        left = GAP + column * (side + GAP)
        everyone = list(range(record["experts"]))
        for top, experts, title in (
            (50, one["most_coactivated"], f"layer {layer}: most co-activated"),
            (50 + side + GAP, everyone, f"layer {layer}: all experts"),
        ):
            rows = [[one["matrix"][i][j] for j in experts] for i in experts]
            parts += _heat_map(left, top, (side, side), title, rows, (experts, experts), FULL_COACTIVATION)
    height = 50 + 2 * (side + GAP)
    note = (
        f"of a row's tokens, the share that has the column's expert, too; full color: {FULL_COACTIVATION:.0%}"
    )
    parts.append(_text(GAP, height, f"{note}; uniform: {entry['uniform']:.1%}", "start"))
    return _svg(GAP + len(layers) * (side + GAP), height + 14, parts)


def draw_domains(record: Record, k: int) -> str:
    """As figures 22 and 34: a bar per expert, a row of panels per drawn layer, a column per domain."""
    entries = [one for one in record["domains"] if one["source"] == record["reference"] and one["k"] == k]
    layers, parts = drawn_layers(record["layers"]), []
    width, height = 260.0, 90.0
    highest = max(max(one["by_layer"][layer]) for one in entries for layer in layers) or 1.0
    for column, one in enumerate(entries):
        for row, layer in enumerate(layers):
            left, top = GAP + column * (width + 30), 50 + row * (height + 44)
            parts.append(_text(left + width / 2, top - 12, f"{one['domain']}, layer {layer}", size=13))
            shares = one["by_layer"][layer]
            for expert, share in enumerate(shares):
                bar = height * share / highest
                box = f'x="{left + expert * width / len(shares):.1f}" y="{top + height - bar:.1f}"'
                size = f'width="{0.8 * width / len(shares):.2f}" height="{bar:.1f}"'
                parts.append(
                    f'<rect {box} {size} fill="{FILL}"><title>expert {expert}: {share:.1%}</title></rect>'
                )
            even = top + height * (1 - one["uniform"] / highest)
            line = f'x1="{left}" y1="{even:.1f}" x2="{left + width}" y2="{even:.1f}"'
            parts.append(f'<line {line} stroke="{EVEN}" stroke-dasharray="4 3"/>')
            parts.append(_text(left, top + height + 13, "expert 0", "start", 10))
            parts.append(_text(left + width, top + height + 13, len(shares) - 1, "end", 10))
            if column == 0:
                parts.append(_text(left - 6, top + 8, f"{highest:.0%}", "end"))
    note = f"share of a domain's tokens that goes to each expert, k = {k}; dashed: uniform"
    bottom = 50 + len(layers) * (height + 44)
    parts.append(_text(GAP, bottom, note, "start"))
    return _svg(max(GAP + len(entries) * (width + 30), 480), bottom + 14, parts)


def _vocabulary(record: Record) -> str:
    """As figure 32: vocabulary specialization over layers, a line per kind of token, a panel per k."""
    entries = [one for one in record["vocabulary"] if one["source"] == record["reference"]]
    parts, layers = [], list(range(record["layers"]))
    names = {"input": "input", "predicted": "predicted next token", "next": "true next token"}
    sizes = sorted({one["k"] for one in entries})
    for panel, k in enumerate(sizes):
        series = [
            (names[one["tokens"]], color, one["by_layer"])
            for one, color in zip((one for one in entries if one["k"] == k), SERIES, strict=True)
        ]
        left = GAP + panel * (320 + GAP)
        parts += _lines(left, 50, f"vocabulary specialization, k = {k}", layers, series)
    for number, (name, color) in enumerate(zip(names.values(), SERIES, strict=True)):
        parts.append(_text(GAP + number * 150, 312, name, "start", color=color))
    note = f"layers; token ids with at least {entries[0]['min_count']} occurrences"
    parts.append(_text(GAP, 330, note, "start"))
    return _svg(max(GAP + len(sizes) * (320 + GAP), 500), 340, parts)


def _importance(record: Record) -> str:
    """Heat maps of layers x experts: frequency, and contribution; full color: four times an even share."""
    (entry,) = (one for one in record["importance"] if one["source"] == record["reference"])
    layers, experts = record["layers"], record["experts"]
    height = max(120, 16 * layers)
    parts = []
    for column, (key, title, even) in enumerate(
        (
            ("frequency", "share of the tokens", record["top_k"] / experts),
            ("contribution", "share of the gate-weighted output norm", 1 / experts),
        )
    ):
        left = GAP + column * (400 + GAP)
        labels = range(layers), range(experts)
        parts += _heat_map(left, 50, (400, height), title, entry[key], labels, min(1.0, 4 * even))
    parts.append(_text(GAP, height + 90, "rows: layers; columns: experts; full color: 4 x even", "start"))
    return _svg(GAP + 2 * (400 + GAP), height + 100, parts)
