"use strict";
// The experts' loads: layers x experts at a step, with a slider over steps, and one layer's experts over steps.

const LOAD_MEANING = "Load: the tokens that an expert got, as a multiple of its fair share. 1x is perfect balance; 2x is twice as many tokens as the average expert of its layer. One row per layer, one column per expert.";

class ExpertLoads {
  constructor() {
    this.layer = 0;
    this.which = "most";
    this.views = new Map(); // run name -> {now, over}
    this.decoded = new Map();
    this.follow = true; // stay at the last step while the run goes on
    this.slider = el("input", { type: "range", id: "load-step", min: 0, step: 1, oninput: () => { this.follow = this.slider.value === this.slider.max; this.show(); } });
    this.output = el("output", { for: "load-step", class: "big" });
    this.play = el("button", { type: "button", class: "small", text: "▶ Play", onclick: () => this.run() });
    this.now = el("div", { class: "blocks" });
    this.over = el("div", { class: "blocks" });
    this.layers = el("select", { id: "load-layer", onchange: () => { this.layer = this.layers.selectedIndex; this.show(); } });
    this.pick = el("span");
    this.bar = el("div");
    this.table = tableBehind(() => this.rows());
    this.root = el("figure", { class: "card wide", id: "chart-expert-load" },
      el("figcaption", {}, el("h3", { text: "Expert load" }), el("span", { class: "unit", text: "multiples of the fair share" })),
      el("p", { class: "muted meaning", text: LOAD_MEANING }),
      this.bar,
      el("div", { class: "controls" }, el("label", { for: "load-step", text: "Step" }), this.slider, this.output, this.play),
      this.now,
      el("div", { class: "controls" }, el("label", { for: "load-layer", text: "Over all steps, layer" }), this.layers, this.pick),
      this.over, this.table);
  }

  update() {
    this.runs = app.data.runs.filter((run) => run.loads);
    this.decoded.clear();
    for (const run of this.runs) {
      const loads = run.loads, frames = bytes(loads.frames);
      this.decoded.set(run.name, { frames, most: loads.most ? bytes(loads.most) : null, least: loads.least ? bytes(loads.least) : null });
    }
    this.steps = [...new Set(this.runs.flatMap((run) => run.loads.steps))].sort((a, b) => a - b);
    this.slider.max = this.steps.length - 1;
    if (this.follow) this.slider.value = this.slider.max;
    const layers = this.runs.reduce((most, run) => (run.loads.layers.length > most.length ? run.loads.layers : most), []);
    if (this.layers.options.length !== layers.length) {
      this.layers.replaceChildren(...layers.map((layer) => el("option", { text: String(layer) })));
      this.layers.selectedIndex = Math.min(this.layer, layers.length - 1);
    }
    if (this.runs.some((run) => run.loads.most) && !this.pick.firstChild) {
      this.pick.append(choice("Value of each bucket of steps", [["most", "highest"], ["least", "lowest"]], this.which, (which) => { this.which = which; this.show(); }));
    }
    this.build();
    this.table.refresh();
  }

  redraw() {
    this.show();
  }

  build() {
    for (const run of this.runs) {
      if (this.views.has(run.name)) continue;
      const view = {};
      view.now = new HeatMap({ label: `Load of each expert in each layer at one step, ${run.name}`, describe: (r, c) => view.nowWords(r, c), onpick: (row) => { this.layer = this.layers.selectedIndex = row; this.show(); } });
      view.over = new HeatMap({ label: `Load of the experts of one layer over the steps, ${run.name}`, describe: (r, c) => view.overWords(r, c), onpick: (row, column) => this.seek(view.over.matrix.stepOf(column)) });
      this.views.set(run.name, view);
      const name = () => (app.data.runs.length > 1 ? runName(run) : null);
      view.caption = el("span", { class: "muted small" });
      this.now.append(el("div", { class: "block" }, el("div", { class: "blockhead" }, name(), view.caption), view.now.root));
      this.over.append(el("div", { class: "block" }, name(), view.over.root));
    }
    this.show();
  }

  seek(step) {
    this.slider.value = floorIndex(this.steps, step);
    this.follow = this.slider.value === this.slider.max;
    this.show();
  }

  /** A level of a run as a multiple of the fair share. */
  load(run, level) {
    const { low, high } = run.loads;
    return level === 0 ? 0 : low * Math.exp(((level - 1) / 254) * Math.log(high / low));
  }

  show() {
    const step = this.steps[Number(this.slider.value)];
    this.output.textContent = whole.format(step);
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    const colors = loadRamp();
    this.bar.replaceChildren(colorBar(colors, [[0, "≤ ¼x"], [0.25, "½x"], [0.5, "1x fair"], [0.75, "2x"], [1, "≥ 4x"]], "no token"));
    for (const run of this.runs) {
      const { loads } = run, { frames } = this.decoded.get(run.name), view = this.views.get(run.name);
      const table = Array.from({ length: 256 }, (_, level) => colors[Math.round(255 * loadPosition(this.load(run, level)))]);
      const layers = loads.layers.length, experts = loads.experts, index = floorIndex(loads.steps, step);
      const now = frames.subarray(index * layers * experts, (index + 1) * layers * experts);
      const words = (level) => (level === 0 ? "no token" : `≈ ${show(this.load(run, level), "", 3)}x its fair share`);
      let busiest = 0;
      now.forEach((level, i) => { if (level > now[busiest]) busiest = i; });
      view.caption.textContent = `step ${whole.format(loads.steps[index])}: busiest is expert ${busiest % experts} of layer ${loads.layers[Math.floor(busiest / experts)]}, ≈ ${show(this.load(run, now[busiest]), "", 3)}x`;
      view.nowWords = (r, c) => [`layer ${loads.layers[r]}, expert ${c}`, [[null, `step ${whole.format(loads.steps[index])}`, words(now[r * experts + c])]]];
      view.now.rowMark = Math.min(this.layer, layers - 1);
      view.now.set({ rows: layers, columns: experts, levels: now, colors: table, rowLabel: (r) => String(loads.layers[r]), columnLabel: String, columnTitle: "expert", rowTitle: "layer" });
      this.showOver(run, view, table, words, step);
    }
  }

  /** Experts over steps: of every record where the file holds all of them, else the extremes of each bucket. */
  showOver(run, view, colors, words, step) {
    const { loads } = run, parts = this.decoded.get(run.name), experts = loads.experts;
    const row = Math.min(this.layer, loads.layers.length - 1), layers = loads.layers.length;
    const buckets = loads.from ? loads : { from: loads.steps, to: loads.steps }, columns = buckets.from.length;
    let levels;
    if (loads.from) levels = parts[this.which].subarray(row * experts * columns, (row + 1) * experts * columns);
    else {
      levels = new Uint8Array(experts * columns);
      for (let e = 0; e < experts; e += 1) for (let c = 0; c < columns; c += 1) levels[e * columns + c] = parts.frames[(c * layers + row) * experts + e];
    }
    view.overWords = (r, c) => [`${stepRange(buckets, c)}`, [[null, `layer ${loads.layers[row]}, expert ${r}${loads.from ? (this.which === "most" ? ", highest" : ", lowest") : ""}`, words(levels[r * columns + c])]]];
    view.over.mark = floorIndex(buckets.from, step);
    view.over.set({ rows: experts, columns, levels, colors, rowLabel: String, columnLabel: (c) => brief(buckets.from[c]), columnTitle: "step", rowTitle: "expert", stepOf: (c) => buckets.to[c] });
  }

  /** Play the steps like a film of at most ten seconds. */
  run() {
    if (this.timer) {
      clearInterval(this.timer);
      this.timer = null;
      this.play.textContent = "▶ Play";
      return;
    }
    const total = this.steps.length, stride = Math.max(1, Math.ceil(total / 150));
    if (Number(this.slider.value) >= total - 1) this.slider.value = 0;
    this.play.textContent = "❚❚ Pause";
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + stride;
      this.slider.value = Math.min(next, total - 1);
      this.show();
      if (next >= total - 1) this.run();
    }, 66);
  }

  rows() {
    const step = this.steps[Number(this.slider.value)];
    const body = this.runs.flatMap((run) => {
      const { loads } = run, index = floorIndex(loads.steps, step), { frames } = this.decoded.get(run.name);
      return loads.layers.map((layer, l) => {
        const start = (index * loads.layers.length + l) * loads.experts;
        return [run.name, String(layer), ...Array.from(frames.subarray(start, start + loads.experts), (level) => show(this.load(run, level), "", 3))];
      });
    });
    const experts = Math.max(...this.runs.map((run) => run.loads.experts));
    return {
      head: ["run", "layer", ...Array.from({ length: experts }, (_, e) => `expert ${e}`)], body,
      note: `Step ${whole.format(step)}. Loads are stored in 255 levels at equal ratios, so they are rounded.`,
    };
  }
}
