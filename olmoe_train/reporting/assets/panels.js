"use strict";
// Everything that is not a chart: the verdict, key numbers, starts, samples, alerts, configuration, analyses.

const ICONS = { good: "✓", watch: "!", bad: "✕" };
const WORDS = { good: "good", watch: "watch", bad: "bad" };

function badge(level, text) {
  return el("span", { class: `badge ${level}` }, el("i", { "aria-hidden": "true", text: ICONS[level] }), el("span", { text }));
}

/** The verdict of each run, with its checks. */
function healthPanel() {
  const cards = app.data.runs.map((run) => {
    const { level, headline, checks, state } = run.health;
    const icon = el("div", { class: "icon", "aria-hidden": "true", text: ICONS[level] });
    const list = checks.map((check) => el("li", { class: check.level, title: check.definition },
      el("i", { "aria-hidden": "true", text: ICONS[check.level] }),
      el("span", { class: "sr", text: `${WORDS[check.level]}: ` }), el("b", { text: check.name }), el("span", { text: check.text })));
    const notes = el("dl", {}, ...checks.flatMap((check) => [el("dt", { text: check.name }), el("dd", { text: check.definition })]));
    const trouble = run.bad_lines.length ? el("p", { class: "muted", text: `metrics.jsonl has lines that hold no record, left out here: ${run.bad_lines.join(", ")}.` }) : null;
    return el("article", { class: `health ${level}` },
      el("header", {}, icon, el("div", {}, app.data.runs.length > 1 ? runName(run) : null, el("h2", { text: headline }), badge(state.level, `Run ${state.text}`))),
      el("ul", {}, ...list), trouble,
      el("details", { class: "behind" }, el("summary", { text: "What these mean, and where the limits are" }),
        el("p", { class: "muted", text: "Values are medians over the last tenth of the records." }), notes));
  });
  return el("div", { class: "healths" }, ...cards);
}

const TILES = [
  { label: "Validation loss", metrics: ["eval/validation/loss"], unit: "nats", kind: "least", digits: 4 },
  { label: "Training loss", metrics: ["train/ce_loss", "train/loss"], unit: "nats", kind: "recent", digits: 4 },
  { label: "Perplexity", metrics: ["eval/validation/perplexity"], unit: "", kind: "least" },
  { label: "Reward", metrics: ["reward"], unit: "", kind: "recent" },
  { label: "Preference accuracy", metrics: ["rewards/accuracies", "rewards_per_token/accuracies"], unit: "fraction", kind: "recent" },
  { label: "Busiest expert", metrics: ["router/max_violation"], unit: "x fair share", kind: "recent", plus: 1 },
  { label: "Router entropy", metrics: ["router/entropy"], unit: "nats", kind: "recent" },
  { label: "Dead experts", metrics: ["router/dead_experts"], unit: "", kind: "last" },
  { label: "Throughput", metrics: ["perf/tokens_per_second"], unit: "tokens/s", kind: "median" },
  { label: "MFU", metrics: ["perf/mfu"], unit: "fraction", kind: "median" },
  { label: "Peak memory", metrics: ["perf/peak_memory_gib"], unit: "GiB", kind: "last" },
];
const KINDS = { least: "lowest", recent: "median of the last tenth of the records", median: "median", last: "last" };

/** Key numbers with sparklines. */
function tilesPanel() {
  const tiles = [];
  for (const tile of TILES) {
    const names = app.data.runs.map((run) => tile.metrics.find((name) => run.curves[name]));
    const found = app.data.runs.map((run, r) => run.curves[names[r]]);
    if (!found.some(Boolean)) continue;
    if (tile.metrics[0].startsWith("router/") && !app.data.runs.some((run) => run.loads)) continue;
    const canvas = el("canvas", { class: "spark", "aria-hidden": "true" });
    const unit = tile.unit.startsWith("fraction") ? "" : tile.unit;
    const values = app.data.runs.map((run, r) => {
      if (!found[r]) return null;
      const value = run.summary[names[r]][tile.kind];
      const dot = el("i", { class: "dot" });
      dot.style.background = paletteColor(r);
      const full = value + (tile.plus || 0), digits = tile.digits || 3;
      const fixed = !Number.isInteger(value) && !tile.unit.startsWith("fraction") && full >= 0.1 && full < 1000;
      const number = value !== null && fixed ? full.toPrecision(digits) : show(value === null ? null : full, tile.unit, digits);
      return el("div", { class: "value" }, app.data.runs.length > 1 ? dot : null, el("b", { text: number }), el("span", { text: unit }));
    });
    tiles.push(el("div", { class: "tile", title: KINDS[tile.kind] }, el("span", { class: "label", text: tile.label }), ...values, canvas));
    queueMicrotask(() => sparkline(canvas, found));
  }
  const clocks = app.data.runs.map((run) => [run, last(run.clock.steps), last(run.clock.tokens), last(run.clock.hours)]);
  tiles.push(el("div", { class: tiles.length % 2 ? "tile" : "tile double" }, el("span", { class: "label", text: "Trained" }), ...clocks.map(([run, step, tokens, hours], r) => {
    const dot = el("i", { class: "dot" });
    dot.style.background = paletteColor(r);
    return el("div", { class: "value" }, app.data.runs.length > 1 ? dot : null, el("b", { text: step === undefined ? "–" : brief(step) }), el("span", { text: `steps${tokens ? `, ${brief(tokens)} tokens` : ""}${hours ? `, ${duration(3600 * hours)}` : ""}` }));
  })));
  const panel = el("div", { class: "tiles" }, ...tiles);
  panel.style.setProperty("--columns", tiles.length > 7 ? Math.ceil(tiles.length / 2) : tiles.length);
  return panel;
}

function sparkline(canvas, curves) {
  const width = canvas.clientWidth || 160, height = 34, context = sizeCanvas(canvas, width, height);
  canvas.style.width = "";
  const present = curves.filter(Boolean), numbers = present.flatMap((curve) => curve.values).filter((value) => value !== null);
  const low = Math.min(...numbers), high = Math.max(...numbers), far = Math.max(...present.map((curve) => last(stepsOf(curve))));
  curves.forEach((curve, r) => {
    if (!curve) return;
    context.beginPath();
    stepsOf(curve).forEach((step, i) => {
      const value = curve.values[i];
      if (value === null) return;
      context.lineTo(2 + ((width - 4) * step) / (far || 1), high > low ? height - 3 - ((height - 6) * (value - low)) / (high - low) : height / 2);
    });
    context.strokeStyle = paletteColor(r);
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
  });
}

/** When the run was started and interrupted: a bar of the time, and a table. */
function startsPanel() {
  return el("div", { class: "blocks" }, ...app.data.runs.map((run) => {
    const starts = run.starts, timed = starts.every((start) => start.first_time && start.last_time);
    const bar = el("div", { class: "timeline", "aria-hidden": "true" });
    if (timed && starts.length) {
      const begin = starts[0].first_time, all = Math.max(1, last(starts).last_time - begin);
      for (const start of starts) {
        const piece = el("i");
        piece.style.background = paletteColor(app.data.runs.indexOf(run));
        piece.style.left = `${(100 * (start.first_time - begin)) / all}%`;
        piece.style.width = `${Math.max(0.4, (100 * (start.last_time - start.first_time)) / all)}%`;
        bar.append(piece);
      }
    }
    const rows = starts.map((start, i) => [
      String(start.resumes + 1), `${whole.format(start.first_step)} to ${whole.format(start.last_step)}`, at(start.first_time), start.last_time ? duration(start.last_time - start.first_time) : "–",
      i && timed ? duration(start.first_time - starts[i - 1].last_time) : "–",
    ]);
    const note = starts.length > 1 ? `${starts.length - 1} ${starts.length === 2 ? "interruption" : "interruptions"}; records after the checkpoint of a resume are replaced.` : starts.length && starts[0].resumes ? "Earlier starts left no records." : "No interruption.";
    return el("div", { class: "block" }, app.data.runs.length > 1 ? runName(run) : null, el("p", { class: "muted", text: note }), timed ? bar : null,
      simpleTable(["start", "logged steps", "first record", "lasted", "gap before"], rows));
  }));
}

function simpleTable(head, body) {
  return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": head.filter(Boolean).join(", ") || "Table" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { text, scope: "col" })))),
    el("tbody", {}, ...body.map((row) => el("tr", {}, ...row.map((cell) => (cell instanceof Node ? el("td", {}, cell) : el("td", { text: cell === null ? "" : String(cell) }))))))));
}

/** Texts that the model generated at its evaluations. */
function samplesPanel() {
  return el("div", { class: "blocks" }, ...app.data.runs.filter((run) => run.samples.length).map((run) => {
    const list = el("div", { class: "samples" });
    const fill = (index) => list.replaceChildren(...run.samples[index].texts.map((text) => el("pre", {}, el("span", { class: "prompt", text: text.prompt }), el("span", { text: text.completion }))));
    const select = el("select", { "aria-label": `Step of the samples, ${run.name}`, onchange: () => fill(select.selectedIndex) }, ...run.samples.map((sample) => el("option", { text: `step ${whole.format(sample.step)}` })));
    select.selectedIndex = run.samples.length - 1;
    fill(select.selectedIndex);
    return el("div", { class: "block" }, el("div", { class: "blockhead" }, app.data.runs.length > 1 ? runName(run) : null, select), list);
  }));
}

function alertsPanel() {
  const rows = app.data.runs.flatMap((run) => run.alerts.map((alert) => [...(app.data.runs.length > 1 ? [runName(run)] : []), whole.format(alert.step), alert.name, alert.text]));
  return el("div", {}, el("h3", { text: "Alerts" }), simpleTable([...(app.data.runs.length > 1 ? ["run"] : []), "step", "alert", "text"], rows.reverse()));
}

const MOST_EVALUATIONS = 30;

/** The curves of a run's validation splits: [[name, curve]]. */
const validations = (run) => Object.entries(run.curves).filter(([name]) => name.startsWith("eval/"));

/** The newest evaluations, each with all that it measured. */
function evaluationsPanel() {
  return el("div", { class: "blocks" }, ...app.data.runs.filter((run) => validations(run).length).map((run) => {
    const curves = validations(run);
    const values = curves.map(([, curve]) => new Map(stepsOf(curve).map((step, i) => [step, curve.values[i]])));
    const steps = [...new Set(values.flatMap((of) => [...of.keys()]))].sort((a, b) => b - a).slice(0, MOST_EVALUATIONS);
    const rows = steps.map((step) => [whole.format(step), ...values.map((of) => (of.has(step) ? show(of.get(step), "", 5) : ""))]);
    return el("div", { class: "block" }, app.data.runs.length > 1 ? runName(run) : null, simpleTable(["step", ...curves.map(([name]) => name.slice("eval/".length))], rows));
  }));
}

/** The last results of the downstream tasks, the runs side by side. */
function tasksPanel() {
  const runs = app.data.runs.filter((run) => run.tasks), several = app.data.runs.length > 1;
  const keyOf = (result) => `${result.task}/${result.metric}`;
  const tables = runs.map((run) => new Map(run.tasks.results.map((result) => [keyOf(result), result])));
  const keys = [...new Set(tables.flatMap((table) => [...table.keys()]))];
  const rows = keys.map((key) => {
    const results = tables.map((table) => table.get(key)), any = results.find(Boolean);
    const values = (name, digits) => [...new Set(results.filter(Boolean).map((result) => show(result[name], "", digits)))].join(" or ");
    return [any.task, any.metric, ...results.map(taskScore), values("chance", 3), values("questions", 6)];
  });
  const heads = runs.map((run) => `${several ? `${run.name}, ` : "score ± standard error, "}step ${whole.format(run.tasks.step)}`);
  const note = `${several ? "Score ± standard error of the mean over questions" : "The standard error is that of the mean over questions"}. "Not above chance": at most two standard errors above guessing.`;
  return el("div", {}, el("h3", { text: "Tasks" }), el("p", { class: "muted", text: note }), simpleTable(["task", "metric", ...heads, "chance", "questions"], rows));
}

function taskScore(result) {
  if (!result || result.score === null) return "–";
  const error = result.stderr === null ? "" : ` ± ${result.stderr.toFixed(3)}`;
  return el("span", {}, `${result.score.toFixed(3)}${error} `, result.at_chance ? badge("watch", "not above chance") : null);
}

/** The configuration, and where the runs differ. */
class ConfigTable {
  constructor() {
    this.different = app.data.runs.length > 1;
    this.search = el("input", { type: "search", placeholder: "Find a key or value", "aria-label": "Find a key or value", oninput: () => this.fill() });
    this.only = toggle("only differences", this.different, (on) => { this.different = on; this.fill(); });
    this.only.hidden = app.data.runs.length < 2;
    this.table = el("div", { class: "scroll tall", tabIndex: 0, role: "region", "aria-label": "Configuration" });
    this.count = el("span", { class: "muted" });
    this.root = el("div", {}, el("div", { class: "controls" }, this.search, this.only, this.count), this.table);
    this.fill();
  }

  update() {
    this.fill();
  }

  fill() {
    const runs = app.data.runs, keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
    const shown = (value) => (value === undefined ? "" : value === null ? "null" : String(value));
    const rows = keys.map((key) => [key, ...runs.map((run) => shown(run.config[key]))]);
    const differs = (row) => row.slice(2).some((value) => value !== row[1]);
    const wanted = this.search.value.toLowerCase();
    const kept = rows.filter((row) => (!this.different || differs(row)) && (!wanted || row.some((text) => text.toLowerCase().includes(wanted))));
    this.count.textContent = keys.length ? `${kept.length} of ${keys.length} keys` : "no config.yaml beside metrics.jsonl";
    this.table.replaceChildren(el("table", { class: "config" },
      el("thead", {}, el("tr", {}, el("th", { text: "key", scope: "col" }), ...runs.map((run) => el("th", { scope: "col" }, runs.length > 1 ? runName(run) : "value")))),
      el("tbody", {}, ...kept.map((row) => el("tr", { class: runs.length > 1 && !this.different && differs(row) ? "differs" : "" }, el("td", {}, el("code", { text: row[0] })), ...row.slice(1).map((text) => el("td", { text })))))));
  }
}

/** Named matrices and tables of `olmoe analyze`. */
function analysisPanel() {
  return el("div", { class: "cards loose" }, ...app.data.runs.flatMap((run) => run.analysis.map((part) => (
    part.kind === "matrix" ? analysisMatrix(run, part) : el("figure", { class: "card" }, analysisCaption(run, part), simpleTable(part.columns, part.cells))
  ))));
}

function analysisCaption(run, part, ...tools) {
  return el("figcaption", {}, el("h3", { text: part.name.replaceAll("_", " ") }), app.data.runs.length > 1 ? runName(run) : null, el("span", { class: "tools" }, ...tools));
}

function analysisMatrix(run, part) {
  const colors = valueRamp(), scale = { low: part.low, step: (part.high - part.low) / 254 };
  let levels = bytes(part.levels[0]);
  const value = (r, c) => (levels[r * part.columns + c] ? scale.low + (levels[r * part.columns + c] - 1) * scale.step : null);
  const cell = (r, c) => `${part.row_title} ${part.row_labels[r]}, ${part.column_title} ${c}`.trim();
  const map = new HeatMap({ label: part.name, describe: (r, c) => [cell(r, c), [[null, select.value || part.name, `≈ ${show(value(r, c), "", 3)}`]]] });
  const long = part.row_labels.some((label) => label.length > 3);
  const draw = () => map.set({ rows: part.rows, columns: part.columns, levels, colors, rowLabel: (r) => (long ? String(r) : part.row_labels[r]), columnLabel: String, columnTitle: part.column_title, rowTitle: part.row_title, zero: hex(color("line")) });
  const table = tableBehind(() => ({ head: ["", ...Array.from({ length: part.columns }, (_, c) => String(c))], body: part.row_labels.map((label, r) => [label, ...Array.from({ length: part.columns }, (_, c) => show(value(r, c), "", 3))]) }));
  const select = el("select", { "aria-label": `Choice of ${part.name}`, hidden: part.options.length < 2, onchange: () => { levels = bytes(part.levels[select.selectedIndex]); draw(); table.refresh(); } }, ...part.options.map((text) => el("option", { text, value: text })));
  queueMicrotask(draw);
  return el("figure", { class: "card" }, analysisCaption(run, part, select), colorBar(colors, [[0, show(part.low)], [1, show(part.high)]]), map.root, table);
}
