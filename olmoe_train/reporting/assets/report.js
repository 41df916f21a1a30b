"use strict";
// The page: header, sections in the order of the registry's groups, navigation, theme, and the live form.

const slug = (name) => name.toLowerCase().replace(/[^a-z]+/g, "-");

/** A section with its heading, made once; content is a function that is called again when the data changes. */
function section(name, intro) {
  const body = el("div", { class: "body" });
  const root = el("section", { id: slug(name), "aria-label": name }, el("h2", { text: name }), intro ? el("p", { class: "muted", text: intro }) : null, body);
  return { name, root, body };
}

const sections = new Map();

function sectionNamed(name, intro) {
  if (!sections.has(name)) sections.set(name, section(name, intro));
  return sections.get(name);
}

/** A part of a section that is built anew when its values, those of each run, have changed. */
function panel(name, id, values, make, intro) {
  if (!values.some((value) => (Array.isArray(value) ? value.length : value))) return;
  const { body } = sectionNamed(name, intro);
  let place = app.parts.get(id);
  if (!place) {
    place = { root: el("div", { id: `panel-${id}` }) };
    place.redraw = () => {
      const open = [...place.root.querySelectorAll("details")].map((details) => details.open);
      place.root.replaceChildren(make());
      place.root.querySelectorAll("details").forEach((details, i) => { details.open = open[i] === true; });
    };
    app.parts.set(id, place);
    body.append(place.root);
  }
  const shown = JSON.stringify(values);
  if (place.shown !== shown) place.redraw();
  place.shown = shown;
}

function charts() {
  for (const chart of app.data.charts) {
    const known = app.parts.get(chart.id);
    if (known) {
      known.update(chart);
      continue;
    }
    const part = chart.kind === "matrix" ? new MatrixChart(chart) : new LineChart(chart);
    app.parts.set(chart.id, part);
    const { body } = sectionNamed(chart.section);
    let grid = body.querySelector(":scope > .cards");
    if (!grid) body.append((grid = el("div", { class: "cards" })));
    grid.append(part.root);
    part.update(chart);
  }
}

function loads() {
  if (!app.data.runs.some((run) => run.loads)) return;
  if (!app.parts.has("loads")) {
    const part = new ExpertLoads();
    app.parts.set("loads", part);
    sectionNamed("Experts").body.prepend(part.root);
  }
  app.parts.get("loads").update();
}

/** Bring the page to the state of app.data. */
function refresh() {
  const { runs } = app.data;
  panel("Overview", "health", runs.map((run) => run.health), healthPanel);
  panel("Overview", "tiles", runs.map((run) => run.summary), tilesPanel);
  charts();
  loads();
  panel("Progress", "starts", runs.map((run) => run.starts), startsPanel, "Starts of the run, interruptions and resumes.");
  panel("Health", "alerts", runs.map((run) => run.alerts), alertsPanel);
  panel("Evaluation", "tasks", runs.map((run) => run.tasks), tasksPanel);
  panel("Evaluation", "evaluations", runs.map(validations), evaluationsPanel, "Newest first. The curves of the losses are in the section Loss.");
  panel("Samples", "samples", runs.map((run) => run.samples), samplesPanel, "Texts that the model generated at its evaluations: the prompt, then what it wrote.");
  panel("Router analyses", "analysis", runs.map((run) => run.analysis), analysisPanel, "Written by olmoe analyze.");
  const { body } = sectionNamed("Configuration");
  if (!app.parts.has("config")) {
    const table = new ConfigTable();
    app.parts.set("config", Object.assign(table, { redraw: () => table.fill() }));
    body.append(table.root);
  } else app.parts.get("config").update();
  arrange();
}

/** Sections in their order, and the navigation. */
function arrange() {
  const order = ["Overview", ...app.data.sections.filter((name) => name !== "Progress"), "Samples", "Progress", "Configuration"];
  order.splice(order.indexOf("Experts") + 1, 0, "Router analyses");
  const shown = order.filter((name) => sections.has(name));
  const main = document.getElementById("main");
  const nav = document.getElementById("nav");
  if (nav.dataset.names === shown.join()) return;
  nav.dataset.names = shown.join();
  main.querySelector("noscript")?.remove();
  for (const name of shown) main.append(sections.get(name).root);
  nav.replaceChildren(el("div", { class: "inner" }, ...shown.map((name) => el("a", { href: `#${slug(name)}`, text: name }))));
  app.watch?.disconnect();
  app.watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = nav.querySelector(`a[href="#${entry.target.id}"]`);
      if (link && entry.isIntersecting) {
        for (const other of nav.querySelectorAll("a")) other.removeAttribute("aria-current");
        link.setAttribute("aria-current", "true");
        const box = link.parentElement.parentElement;
        box.scrollLeft = link.offsetLeft - box.clientWidth / 2 + link.clientWidth / 2;
      }
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const name of shown) app.watch.observe(sections.get(name).root);
}

function redrawAll() {
  for (const part of app.parts.values()) part.redraw();
}

function header() {
  const { runs } = app.data;
  const has = (axis) => runs.every((run) => run.clock[axis].length && run.clock[axis].every((value) => value !== null));
  const axis = choice("Horizontal axis of all curves", [["steps", "steps"], ["tokens", "tokens", !has("tokens")], ["hours", "time", !has("hours")]], app.axis, (value) => {
    app.axis = value;
    for (const part of app.parts.values()) if (part instanceof LineChart) part.zoom = null; // it was on the other axis
    redrawAll();
  });
  const theme = el("button", { type: "button", class: "toggle", id: "theme", title: "Light or dark", text: "◐ Theme", onclick: () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    redrawAll();
  } });
  app.live = el("span", { class: "live", role: "status", hidden: !app.data.live });
  document.getElementById("head").replaceChildren(el("div", { class: "inner" },
    el("div", { class: "title" }, el("h1", { text: runs.length > 1 ? "Training runs" : runs[0].name }), el("div", { class: "names" }, ...(runs.length > 1 ? runs.map(runName) : [el("span", { class: "muted", text: "Training report" })]), app.live)),
    el("div", { class: "tools" }, axis, theme)));
  document.getElementById("foot").replaceChildren(el("p", { text: `Made ${at(app.data.made)} by olmoe report, olmoe-train ${app.data.version}. Drag over a curve to zoom, double-click to see all of it. Curves are drawn with uPlot.` }));
}

/** Ask the server for new records, and bring the page up to date without loading it again. */
async function follow() {
  let tag = "";
  for (;;) {
    await new Promise((done) => setTimeout(done, 2000));
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag") || "";
        app.data = Object.assign(await answer.json(), { live: true });
        refresh();
      }
      app.live.textContent = `live: step ${brief(Math.max(...app.data.runs.map((run) => last(run.clock.steps) ?? 0)))}`;
      app.live.classList.remove("lost");
    } catch (error) {
      app.live.textContent = "the server is gone";
      app.live.classList.add("lost");
    }
  }
}

document.body.append(tooltip);
header();
refresh();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
addEventListener("scroll", () => showTooltip(0, 0, "", null), { passive: true });
document.documentElement.dataset.ready = "true";
if (app.data.live) follow();
