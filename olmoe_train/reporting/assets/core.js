"use strict";
// Elements, numbers, colors and the data that every part of the report shares. Texts of a run are untrusted: they
// become text nodes only.

const app = {
  data: JSON.parse(document.getElementById("data").textContent),
  axis: "steps", // of all curves: steps, tokens or hours
  parts: new Map(), // id -> part of the page with update() and redraw()
};

/** An element. attributes: properties and on* handlers; `class`, `text` and names with a dash are what they say. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for" || name === "scope") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A text of the registry, in which `code` is marked by backticks. */
function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", { text: part }) : part));
}

// ---- numbers

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** A number in at most `digits` significant digits, and with its unit where that is short. */
function show(value, unit = "", digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit.startsWith("fraction")) return `${trim((100 * value).toPrecision(digits - 1))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(digits - 2).replace("e+", "e");
  if (size >= 1000) return whole.format(value);
  return trim(value.toPrecision(digits));
}
const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

/** A count in few characters, as on an axis: 1.2M. */
function brief(value) {
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return trim((value / (letter === "k" ? 1e3 : limit)).toPrecision(3)) + letter;
  }
  return show(value);
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

const at = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : "–");

// ---- data

/** Bytes from base64. */
function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Steps of a curve, which are stored as differences. */
function stepsOf(curve) {
  let step = 0;
  return curve.steps.map((difference) => (step += difference));
}

/** Position of a step on the axis that is chosen, interpolated between the records that the file holds. */
function onAxis(run, step) {
  if (app.axis === "steps") return step;
  const xs = run.clock.steps, ys = run.clock[app.axis];
  let low = 0, high = xs.length - 1;
  if (high < 0) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= step) low = middle;
    else high = middle;
  }
  if (ys[low] === null || ys[high] === null) return null;
  const share = xs[high] > xs[low] ? (step - xs[low]) / (xs[high] - xs[low]) : 0;
  return ys[low] + share * (ys[high] - ys[low]);
}

/** Index of the greatest element of an increasing list that is not above `value`; 0 if all are. */
function floorIndex(list, value) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (list[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

const last = (list) => list[list.length - 1];

// ---- colors

/** The value of a color of report.css in the theme that is on. */
function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Color of a run, or of a line where there is one run. The palette is Okabe and Ito's. */
const paletteColor = (index) => color(`c${(index % 7) + 1}`);

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const hex = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));

/** 256 colors between stops of [position 0 to 1, "#rrggbb"], as [r, g, b]. */
function ramp(stops) {
  return Array.from({ length: 256 }, (_, level) => {
    const x = level / 255;
    let i = 0;
    while (i < stops.length - 2 && x > stops[i + 1][0]) i += 1;
    const [[x0, a], [x1, b]] = [stops[i], stops[i + 1]];
    const t = Math.min(1, Math.max(0, (x - x0) / (x1 - x0)));
    const from = hex(a), to = hex(b);
    return from.map((value, channel) => Math.round(value + t * (to[channel] - value)));
  });
}

// ---- parts of the page

/** A canvas of this size in CSS pixels, sharp on every screen, and its context in CSS pixels. */
function sizeCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.clearRect(0, 0, width, height);
  return context;
}

/** The table behind a chart, which is built when it is opened. rows(): {head: [...], body: [[...]], note}. */
function tableBehind(rows, label = "Table") {
  const inside = el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": label });
  const details = el("details", { class: "behind" }, el("summary", { text: label }), inside);
  const fill = () => {
    if (!details.open) return;
    const { head, body, note } = rows();
    const table = el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { text, scope: "col" })))),
      el("tbody", {}, ...body.map((row) => el("tr", {}, ...row.map((text) => el("td", { text }))))));
    inside.replaceChildren(...(note ? [el("p", { class: "muted", text: note })] : []), table);
  };
  details.addEventListener("toggle", fill);
  details.refresh = fill;
  return details;
}

/** A button that is on or off. change(on) is called after it was switched. */
function toggle(text, on, change, attributes = {}) {
  const button = el("button", {
    type: "button", class: "toggle", "aria-pressed": String(on), ...attributes,
    onclick: () => {
      const next = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(next));
      change(next);
    },
  }, text);
  return button;
}

/** Buttons of which one is on. options: [value, label]; change(value). */
function choice(label, options, value, change) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  for (const [option, text, disabled] of options) {
    group.append(el("button", {
      type: "button", text, disabled, "aria-pressed": String(option === value),
      onclick: (event) => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === event.currentTarget));
        change(option);
      },
    }));
  }
  return group;
}

const tooltip = el("div", { class: "tooltip", hidden: true });

/** Show [[color or null, label, value]] under a heading at a position of the window; hide with no rows. */
function showTooltip(x, y, heading, rows) {
  tooltip.hidden = !rows;
  if (!rows) return;
  tooltip.replaceChildren(el("strong", { text: heading }), ...rows.map(([dot, label, value]) => {
    const mark = el("i", { class: "dot" });
    if (dot) mark.style.background = dot;
    return el("div", {}, dot ? mark : null, el("span", { text: label }), el("b", { text: value }));
  }));
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
}
