"use strict";
// Heat maps on a canvas: a byte per cell, values under the pointer and at the arrow keys.

/** Colors of loads: blue below the fair share, neutral at it, orange above. Readable with every color vision. */
function loadRamp() {
  return isDark()
    ? ramp([[0, "#173f78"], [0.25, "#2c5c94"], [0.5, "#565e66"], [0.75, "#cc7630"], [1, "#ffc682"]])
    : ramp([[0, "#0b4a8f"], [0.25, "#6fa8d6"], [0.5, "#f6f4ef"], [0.75, "#ee9a4d"], [1, "#b03a06"]]);
}

/** Colors of other values, from low to high. */
function valueRamp() {
  return isDark()
    ? ramp([[0, "#20262e"], [0.3, "#2f5f86"], [0.55, "#3f9f98"], [0.8, "#a9cf76"], [1, "#fdeb96"]])
    : ramp([[0, "#f2f0e6"], [0.25, "#b9d8c2"], [0.5, "#5fb0a6"], [0.75, "#2f6f95"], [1, "#1d2b53"]]);
}

/** A load on the ramp: 1/4 of the fair share and less is 0, the fair share 0.5, 4 times and more 1. */
const loadPosition = (load) => (load <= 0 ? 0 : Math.min(1, Math.max(0, 0.5 + Math.log2(load) / 4)));

class HeatMap {
  /**
   * options: label of the canvas, onpick(row, column), describe(row, column) -> [heading, rows of a tooltip].
   * The matrix is set with `set`.
   */
  constructor({ label, describe, onpick = () => {} }) {
    Object.assign(this, { describe, onpick, cell: null, mark: null, rowMark: null });
    this.canvas = el("canvas", {
      class: "heat", tabIndex: 0, role: "img", "aria-label": `${label}. Arrow keys read the cells.`,
      onpointermove: (event) => this.point(event),
      onpointerleave: () => { this.cell = null; showTooltip(0, 0, "", null); },
      onclick: (event) => { const cell = this.cellAt(event); if (cell) this.onpick(...cell); },
      onkeydown: (event) => this.key(event),
      onblur: () => { this.cell = null; this.draw(); showTooltip(0, 0, "", null); },
    });
    this.said = el("span", { class: "said", role: "status" });
    this.root = el("div", { class: "heatbox" }, this.canvas, this.said);
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** levels: Uint8Array [rows x columns]; colors: 256 x [r, g, b]; zero: of level 0, which is no value; rowLabel, columnLabel: functions of an index. */
  set(matrix) {
    this.matrix = matrix;
    this.draw();
  }

  layout() {
    const { rows } = this.matrix, width = this.root.clientWidth;
    const left = 38, bottom = 34, top = 4, right = 4;
    const cell = Math.max(4, Math.min(26, Math.floor((innerWidth < 600 ? 260 : 300) / rows)));
    return { left, top, width: width - left - right, height: rows * cell, cell, full: width, total: rows * cell + top + bottom };
  }

  draw() {
    if (!this.matrix || !this.root.clientWidth) return;
    const { rows, columns, levels, colors } = this.matrix, box = this.layout();
    const context = sizeCanvas(this.canvas, box.full, box.total);
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = rows;
    const inside = small.getContext("2d"), image = inside.createImageData(columns, rows);
    const zero = this.matrix.zero || hex(color("nothing"));
    for (let i = 0; i < rows * columns; i += 1) {
      const rgb = levels[i] === 0 ? zero : colors[levels[i]];
      image.data.set([...rgb, 255], 4 * i);
    }
    inside.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, box.left, box.top, box.width, box.height);
    this.frame(context, box);
  }

  /** Labels, separating lines where cells are large, and marks. */
  frame(context, box) {
    const { rows, columns } = this.matrix, cellWidth = box.width / columns;
    context.fillStyle = context.strokeStyle = color("card");
    context.lineWidth = 1;
    if (cellWidth >= 8 && box.cell >= 8) {
      for (let r = 1; r < rows; r += 1) context.fillRect(box.left, box.top + r * box.cell - 0.5, box.width, 1);
      for (let c = 1; c < columns; c += 1) context.fillRect(box.left + c * cellWidth - 0.5, box.top, 1, box.height);
    }
    context.fillStyle = color("muted");
    context.font = FONT;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(14 / box.cell));
    for (let r = 0; r < rows; r += every) context.fillText(this.matrix.rowLabel(r), box.left - 6, box.top + (r + 0.5) * box.cell);
    context.textBaseline = "top";
    let free = -1e9;
    const between = Math.max(1, Math.ceil((columns * 44) / box.width));
    for (let c = 0; c < columns; c += between) {
      const text = this.matrix.columnLabel(c), x = box.left + (c + 0.5) * cellWidth, wide = context.measureText(text).width;
      context.textAlign = c === 0 && wide > cellWidth ? "left" : x + wide / 2 > box.full ? "right" : "center";
      const from = context.textAlign === "left" ? box.left : context.textAlign === "right" ? box.full - wide : x - wide / 2;
      if (from < free + 10) continue;
      context.fillText(text, context.textAlign === "left" ? box.left : context.textAlign === "right" ? box.full : x, box.top + box.height + 5);
      free = from + wide;
    }
    context.textAlign = "center";
    context.fillText(this.matrix.columnTitle, box.left + box.width / 2, box.top + box.height + 20);
    context.save();
    context.translate(7, box.top + box.height / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    if (box.height > 40) context.fillText(this.matrix.rowTitle, 0, 0);
    context.restore();
    context.strokeStyle = color("ink");
    context.lineWidth = 1.5;
    if (this.rowMark !== null) context.strokeRect(box.left - 0.5, box.top + this.rowMark * box.cell, box.width + 1, box.cell);
    if (this.mark !== null) context.strokeRect(box.left + this.mark * cellWidth, box.top - 1, Math.max(2, cellWidth), box.height + 2);
    if (this.cell) context.strokeRect(box.left + this.cell[1] * cellWidth, box.top + this.cell[0] * box.cell, Math.max(3, cellWidth), box.cell);
  }

  cellAt(event) {
    const area = this.canvas.getBoundingClientRect(), box = this.layout();
    const row = Math.floor((event.clientY - area.top - box.top) / box.cell);
    const column = Math.floor(((event.clientX - area.left - box.left) / box.width) * this.matrix.columns);
    return row >= 0 && row < this.matrix.rows && column >= 0 && column < this.matrix.columns ? [row, column] : null;
  }

  point(event) {
    this.cell = this.cellAt(event);
    if (this.cell) showTooltip(event.clientX, event.clientY, ...this.describe(...this.cell));
    else showTooltip(0, 0, "", null);
  }

  key(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0] }[event.key];
    if (!move || !this.matrix) return;
    event.preventDefault();
    const [row, column] = this.cell || [0, 0], { rows, columns } = this.matrix;
    this.cell = [Math.min(rows - 1, Math.max(0, row + move[0])), Math.min(columns - 1, Math.max(0, column + move[1]))];
    if (event.key === "Enter") this.onpick(...this.cell);
    this.draw();
    const area = this.canvas.getBoundingClientRect(), box = this.layout(), [heading, values] = this.describe(...this.cell);
    showTooltip(area.left + box.left + ((this.cell[1] + 0.5) / columns) * box.width, area.top + box.top + (this.cell[0] + 0.5) * box.cell, heading, values);
    this.said.textContent = `${heading}: ${values.map(([, label, value]) => `${label} ${value}`).join(", ")}`;
  }
}

/** A bar of colors with labels: [[position 0 to 1, text]]. */
function colorBar(colors, labels, zeroText) {
  const canvas = el("canvas", { class: "bar" });
  const context = sizeCanvas(canvas, 180, 10);
  colors.forEach((rgb, i) => {
    context.fillStyle = `rgb(${rgb.join(",")})`;
    context.fillRect((i * 180) / 256, 0, 1, 10);
  });
  const marks = el("div", { class: "barlabels" }, ...labels.map(([position, text]) => {
    const mark = el("span", { text });
    mark.style.left = `${100 * position}%`;
    mark.style.transform = `translateX(-${100 * position}%)`;
    return mark;
  }));
  const zero = zeroText ? [el("i", { class: "swatch" }), el("span", { text: zeroText })] : [];
  return el("div", { class: "colorbar" }, ...zero, el("div", {}, canvas, marks));
}

/** Rows over steps, such as layers: one heat map per run. */
class MatrixChart {
  constructor(chart) {
    this.chart = chart;
    this.which = "most";
    this.maps = new Map();
    this.bar = el("div");
    this.blocks = el("div", { class: "blocks" });
    this.pick = el("div");
    this.table = tableBehind(() => this.rows());
    this.root = el("figure", { class: "card", id: `chart-${chart.id}` },
      el("figcaption", {}, el("h3", { text: chart.title }), el("span", { class: "unit", text: chart.unit }), el("span", { class: "tools" }, this.pick)),
      el("p", { class: "muted meaning" }, ...prose(chart.meaning)), this.bar, this.blocks, this.table);
  }

  update(chart) {
    this.chart = chart;
    this.redraw();
    this.table.refresh();
  }

  redraw() {
    const runs = app.data.runs.filter((run) => run.matrices[this.chart.lines[0].metric]);
    const all = runs.map((run) => run.matrices[this.chart.lines[0].metric]);
    const low = Math.min(...all.map((matrix) => matrix.low)), high = Math.max(...all.map((matrix) => matrix.high));
    const colors = valueRamp();
    this.bar.replaceChildren(colorBar(colors, [[0, show(low, this.chart.unit)], [1, show(high, this.chart.unit)]]));
    if (all.some((matrix) => matrix.least) && !this.pick.firstChild) {
      this.pick.append(choice("Value of each bucket of steps", [["most", "highest"], ["least", "lowest"]], this.which, (which) => { this.which = which; this.redraw(); }));
    }
    this.blocks.replaceChildren(...runs.map((run, i) => {
      const matrix = all[i], levels = bytes(matrix[this.which] || matrix.most), columns = matrix.from.length;
      const value = (r, c) => matrix.low + ((levels[r * columns + c] - 1) / 254) * (matrix.high - matrix.low);
      if (!this.maps.has(run.name)) this.maps.set(run.name, new HeatMap({ label: `${this.chart.title}, ${run.name}`, describe: (r, c) => this.maps.get(run.name).words(r, c) }));
      const map = this.maps.get(run.name);
      map.words = (r, c) => [stepRange(matrix, c), [[null, `${this.chart.rows} ${matrix.labels[r]}`, levels[r * columns + c] ? `≈ ${show(value(r, c), this.chart.unit, 3)}` : "not finite"]]];
      // The scale of colors is common to all runs.
      const common = levels.map((level, j) => level && Math.round(1 + (254 * (value(Math.floor(j / columns), j % columns) - low)) / (high - low || 1)));
      const block = el("div", { class: "block" }, app.data.runs.length > 1 ? runName(run) : null, map.root);
      queueMicrotask(() => map.set({
        rows: matrix.rows, columns, levels: common, colors, rowLabel: (r) => String(matrix.labels[r]), columnLabel: (c) => brief(matrix.from[c]), columnTitle: "step", rowTitle: matrix.rows > 3 ? this.chart.rows : "", zero: hex(color("line")),
      }));
      return block;
    }));
  }

  rows() {
    const head = ["run", this.chart.rows, "last", "lowest", "highest"], body = [];
    for (const run of app.data.runs) {
      const matrix = run.matrices[this.chart.lines[0].metric];
      if (!matrix) continue;
      const most = bytes(matrix.most), least = bytes(matrix.least || matrix.most), columns = matrix.from.length;
      const value = (level) => matrix.low + ((level - 1) / 254) * (matrix.high - matrix.low);
      for (let r = 0; r < matrix.rows; r += 1) {
        const row = (levels) => levels.subarray(r * columns, (r + 1) * columns).filter((level) => level > 0);
        body.push([run.name, String(matrix.labels[r]), ...[last(row(most)), Math.min(...row(least)), Math.max(...row(most))].map((level) => show(value(level), this.chart.unit, 3))]);
      }
    }
    return { head, body, note: "Values are stored in 255 levels between the lowest and the highest." };
  }
}

function stepRange(matrix, column) {
  const from = matrix.from[column], to = matrix.to[column];
  return from === to ? `step ${whole.format(from)}` : `steps ${whole.format(from)} to ${whole.format(to)}`;
}

/** Name of a run with the dot of its color. */
function runName(run) {
  const dot = el("i", { class: "dot" });
  dot.style.background = paletteColor(app.data.runs.indexOf(run));
  return el("span", { class: "runname" }, dot, el("span", { text: run.name }));
}
