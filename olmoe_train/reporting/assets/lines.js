"use strict";
// Curves, drawn by uPlot: values under the pointer, zoom, lines on and off, a logarithmic axis, a table.

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

class LineChart {
  constructor(chart) {
    this.chart = chart;
    this.hidden = new Set();
    this.log = chart.log;
    this.zoom = null; // [least, greatest] position of the axis, or null: everything
    this.legend = el("div", { class: "legend" });
    this.box = el("div", {
      class: "plot", tabIndex: 0, role: "img",
      "aria-label": `${chart.title}. Keys: plus and minus zoom, arrows move, 0 shows everything.`,
      onkeydown: (event) => this.key(event),
    });
    this.reset = el("button", { type: "button", class: "small", text: "Reset zoom", hidden: true, onclick: () => this.zoomTo(null) });
    this.logButton = toggle("log", this.log, (on) => { this.log = on; this.build(); }, { class: "toggle small", title: "Logarithmic axis" });
    this.table = tableBehind(() => this.rows());
    this.root = el("figure", { class: "card", id: `chart-${chart.id}` },
      el("figcaption", {}, el("h3", { text: chart.title }), el("span", { class: "unit", text: chart.unit }), el("span", { class: "tools" }, this.reset, this.logButton)),
      el("p", { class: "muted meaning" }, ...prose(chart.meaning)),
      this.legend, this.box, this.table);
    new ResizeObserver(() => this.resize()).observe(this.box);
  }

  /** New data in the lines that are there, or other lines. */
  update(chart) {
    this.chart = chart;
    const before = this.lines?.map((line) => line.key).join();
    this.lines = this.series();
    if (this.plot && before === this.lines.map((line) => line.key).join()) this.plot.setData(this.joined(), this.zoom === null);
    else this.build();
    this.table.refresh();
  }

  redraw() {
    this.build();
  }

  /** The lines of all runs: {key, label, color, dash, steps, values, run}. */
  series() {
    const found = [], runs = app.data.runs, { lines } = this.chart;
    runs.forEach((run, r) => {
      lines.forEach((line, l) => {
        const curve = run.curves[line.metric];
        if (!curve) return;
        const label = runs.length > 1 ? (lines.length > 1 ? `${run.name}: ${line.label}` : run.name) : line.label;
        const requested = line.metric.endsWith("requested_share");
        const of = requested ? lines.findIndex((other) => other.metric === line.metric.replace("requested_", "")) : l;
        const dash = requested ? DASHES[2] : runs.length > 1 ? DASHES[l % 4] : line.dashed ? DASHES[1] : DASHES[l < 7 ? 0 : 3];
        found.push({ key: `${run.name}/${line.metric}`, label, color: paletteColor(runs.length > 1 ? r : of), dash, thin: requested, steps: stepsOf(curve), values: curve.values, run });
      });
    });
    if (this.chart.unigram) {
      const seen = new Set();
      for (const run of runs) {
        if (run.unigram === null || seen.has(run.unigram) || !found.some((line) => line.run === run)) continue;
        seen.add(run.unigram);
        const value = this.chart.exp_unigram ? Math.exp(run.unigram) : run.unigram;
        const steps = found.filter((line) => line.run === run).flatMap((line) => [line.steps[0], last(line.steps)]);
        found.push({ key: `unigram ${value}`, label: this.chart.unigram, color: color("muted"), dash: [3, 3], steps: [Math.min(...steps), Math.max(...steps)], values: [value, value], run, flat: true, thin: true });
      }
    }
    return found;
  }

  /** The lines as uPlot wants them: all positions of the axis, then the values of each line at them. */
  joined() {
    const tables = this.lines.map((line) => {
      // Increasing positions only: records of a validation share the step of a training record.
      const xs = [], ys = [];
      line.steps.forEach((step, i) => {
        const x = onAxis(line.run, step);
        if (x === null || (xs.length && x <= last(xs))) return;
        xs.push(x);
        ys.push(this.log && line.values[i] !== null && line.values[i] <= 0 ? null : line.values[i]);
      });
      return [xs, ys];
    });
    return tables.length ? uPlot.join(tables) : [[]];
  }

  build() {
    this.lines = this.series();
    const lines = this.lines, zoom = this.zoom; // uPlot shows everything at first
    if (this.plot) this.plot.destroy();
    this.logButton.hidden = lines.some((line) => line.values.some((value) => value !== null && value <= 0));
    const muted = color("muted"), grid = color("grid");
    const axis = { stroke: muted, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 }, font: FONT };
    this.plot = new uPlot({
      width: Math.max(120, this.box.clientWidth), height: this.height(), padding: [10, 10, 0, 0], legend: { show: false },
      cursor: { sync: { key: "curves", setSeries: false, scales: ["x", null] }, drag: { x: true, y: false, dist: 6 }, points: { size: 7 } },
      scales: { x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) }, y: this.log ? { distr: 3 } : { range: (u, low, high) => (low === null ? [0, 1] : low === high ? (low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10]) : uPlot.rangeNum(low, high, 0.08, true)) } },
      axes: [
        { ...axis, space: 64, values: (u, ticks) => ticks.map(brief), size: 30 },
        { ...axis, size: 56, values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : this.chart.unit.startsWith("fraction") ? show(tick, this.chart.unit) : brief(tick))) },
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.label, stroke: line.color, width: line.thin ? 1.25 : 1.75, dash: line.dash, show: !this.hidden.has(line.key),
        spanGaps: line.flat === true, points: { show: line.values.length < 30 && !line.flat, size: 6, fill: color("card") },
      }))],
      hooks: {
        setCursor: [(u) => this.hover(u)],
        setScale: [(u, key) => { if (key === "x") this.zoomed(u); }],
        drawAxes: [(u) => this.marks(u)],
      },
    }, this.joined(), this.box);
    if (zoom) this.zoomTo(zoom);
    this.drawLegend();
  }

  height() {
    return innerWidth < 600 ? 200 : 230;
  }

  resize() {
    const width = this.box.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.height() });
    else if (!this.plot && width > 0) this.build();
  }

  drawLegend() {
    const buttons = this.lines.map((line, i) => {
      return toggle(line.label, !this.hidden.has(line.key), (on) => {
        if (on) this.hidden.delete(line.key);
        else this.hidden.add(line.key);
        this.plot.setSeries(i + 1, { show: on });
      }, { class: "toggle", title: "Show or hide" });
    });
    buttons.forEach((button, i) => {
      const key = el("i", { class: "key" });
      key.style.borderTopColor = this.lines[i].color;
      if (this.lines[i].dash.length) key.style.borderTopStyle = this.lines[i].dash[0] < 4 ? "dotted" : "dashed";
      button.prepend(key);
    });
    const notes = [];
    if (this.chart.skipped && app.data.runs.some((run) => run.skipped.length)) notes.push(el("span", { class: "note bad", text: "▼ skipped steps" }));
    if (app.data.runs.some((run) => run.starts.length > 1)) notes.push(el("span", { class: "note", text: "┊ resumed" }));
    this.legend.replaceChildren(...(buttons.length > 1 ? buttons : []), ...notes);
  }

  /** Resumes as vertical lines, and skipped steps as triangles at the top. */
  marks(u) {
    const context = u.ctx, ratio = uPlot.pxRatio, { left, top, width, height } = u.bbox;
    const inside = (x) => x >= left && x <= left + width;
    context.save();
    for (const run of app.data.runs) {
      context.strokeStyle = color("muted");
      context.setLineDash([2 * ratio, 3 * ratio]);
      context.lineWidth = ratio;
      for (const start of run.starts.slice(1)) {
        const position = onAxis(run, start.first_step);
        const x = position === null ? NaN : Math.round(u.valToPos(position, "x", true)) + 0.5;
        if (!inside(x)) continue;
        context.beginPath();
        context.moveTo(x, top);
        context.lineTo(x, top + height);
        context.stroke();
      }
      context.setLineDash([]);
      if (!this.chart.skipped) continue;
      context.fillStyle = color("bad");
      for (const { step } of run.skipped) {
        const position = onAxis(run, step);
        const x = position === null ? NaN : u.valToPos(position, "x", true);
        if (!inside(x)) continue;
        context.beginPath();
        context.moveTo(x - 4.5 * ratio, top);
        context.lineTo(x + 4.5 * ratio, top);
        context.lineTo(x, top + 8 * ratio);
        context.fill();
      }
    }
    context.restore();
  }

  hover(u) {
    if (u.cursor.event === undefined || u.cursor.left < 0 || !u.over.matches(":hover")) {
      if (app.hovered === this) showTooltip(0, 0, "", null);
      return;
    }
    app.hovered = this;
    const rows = [];
    this.lines.forEach((line, i) => {
      const index = u.cursor.idxs[i + 1];
      if (index === null || index === undefined || !u.series[i + 1].show) return;
      const value = u.data[i + 1][index];
      rows.push([line.color, line.label, value === null || value === undefined ? "not finite" : show(value, this.chart.unit, 5)]);
    });
    const area = u.over.getBoundingClientRect();
    const x = u.data[0][u.cursor.idx];
    showTooltip(area.left + u.cursor.left, area.top + u.cursor.top, axisText(x), rows.length ? rows : null);
  }

  zoomed(u) {
    const { min, max } = u.scales.x, xs = u.data[0];
    if (!xs.length || min === null) return;
    const whole = min <= xs[0] && max >= last(xs);
    this.zoom = whole ? null : [min, max];
    this.reset.hidden = whole;
  }

  zoomTo(range) {
    const xs = this.plot.data[0];
    this.plot.setScale("x", range ? { min: range[0], max: range[1] } : { min: xs[0], max: last(xs) });
  }

  key(event) {
    const { min, max } = this.plot.scales.x, width = max - min;
    const moves = {
      "+": [min + width / 4, max - width / 4], "=": [min + width / 4, max - width / 4], "-": [min - width / 2, max + width / 2],
      ArrowLeft: [min - width / 4, max - width / 4], ArrowRight: [min + width / 4, max + width / 4], 0: null, Escape: null,
    };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const range = moves[event.key], xs = this.plot.data[0];
    this.zoomTo(range === null ? null : [Math.max(range[0], xs[0]), Math.min(range[1], last(xs))]);
  }

  rows() {
    const [xs, ...ys] = this.plot.data;
    const body = Array.from(xs, (x, i) => [axisText(x), ...ys.map((values) => (values[i] === undefined ? "" : show(values[i], this.chart.unit, 6)))]);
    const cut = app.data.runs.some((run) => run.records > run.points);
    return {
      head: [app.axis === "steps" ? "step" : app.axis, ...this.lines.map((line) => line.label)], body,
      note: cut ? "Long runs: the least and the greatest value of each bucket of records." : "",
    };
  }
}

/** A position of the axis in words. */
function axisText(x) {
  if (x === undefined || x === null) return "";
  if (app.axis === "hours") return duration(3600 * x);
  return `${app.axis === "steps" ? "step" : ""} ${whole.format(x)}${app.axis === "tokens" ? " tokens" : ""}`.trim();
}
