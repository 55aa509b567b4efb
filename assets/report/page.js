"use strict";
// Draws the page from the JSON in #data. Text is only ever set as text, never as HTML: a model wrote it.

window.onerror = (message) => {
  document.getElementById("about").append(make("div", "failed", "This page failed: " + message));
};

const data = JSON.parse(document.getElementById("data").textContent);
const { runs, groups } = data;
const COLOURS = 8;

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}
const at = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const deviation = (values) => Math.sqrt(values.reduce((a, b) => a + (b - mean(values)) ** 2, 0) / Math.max(values.length - 1, 1));
const key = (colour, text) => {
  const swatch = make("i");
  swatch.style.background = colour;
  return make("span", "key", swatch, text);
};

function number(v) {
  if (v === null || v === undefined) return "";
  const size = Math.abs(v);
  if (size >= 1000) return Math.round(v).toLocaleString("en");
  if (size !== 0 && size < 0.001) return v.toExponential(1);
  return String(+v.toPrecision(3));
}

// ---------------------------------------------------------------- results

const values = (run, name) => ((run.columns[name] || [[], []])[1]).filter((v) => v !== null);
const total = (run, name) => mean(values(run, name).concat(values(run, name).length ? [] : [0]));

function facts(run) {
  const judged = Object.keys(run.columns).some((n) => n.startsWith("reward/")) ? "held-out reward" : "accuracy";
  const main = run.columns.reward ? "reward" : "loss";
  const [steps, curve] = run.columns[main];
  const out = { steps: [run.columns.loss[0].at(-1) + 1], [main + ", first"]: [curve[0]], [main + ", last 5"]: [mean(curve.slice(-5))] };
  for (const [name, place] of [["eval_reward", judged], ["eval_loss", "held-out loss"]]) {
    if (!run.columns[name]) continue;
    const error = (run.columns.eval_stderr || [[], []])[1];
    out[place + ", first"] = [run.columns[name][1][0], name === "eval_reward" ? error[0] : undefined];
    out[place + ", last"] = [run.columns[name][1].at(-1), name === "eval_reward" ? error.at(-1) : undefined];
  }
  // The first step holds the start, which says nothing of the others.
  const later = (name) => { const v = values(run, name); return mean(v.length > 1 ? v.slice(1) : v.length ? v : [0]); };
  out["seconds a step"] = [later("step_s")];
  out["tokens a second"] = [later("tokens") / later("step_s")];
  out["trainers wait"] = [later("idle_trainer_s") / later("step_s"), undefined, "share"];
  if (run.columns.generate_s)
    out["engines wait"] = [later("idle_generator_s") / (later("generate_s") + later("idle_generator_s") + later("other_generator_s") || 1), undefined, "share"];
  return out;
}

// One run: value and its standard error. Several: their mean, and the deviation between them.
function fact(group, name) {
  const all = group.runs.map((r) => facts(runs[r])[name]).filter(Boolean);
  if (!all.length) return "";
  const own = all.map((f) => f[0]);
  const share = all[0][2] === "share";
  const show = (v) => share ? (100 * v).toFixed(0) + "%" : number(v);
  const spread = own.length > 1 ? deviation(own) : all[0][1];
  return show(mean(own)) + (spread === undefined || name === "steps" ? "" : " ± " + (share ? show(spread) : number(+spread.toPrecision(2))));
}

function results() {
  const names = [...new Set(groups.flatMap((g) => g.runs.flatMap((r) => Object.keys(facts(runs[r])))))];
  if (groups.length === 1) {
    const tiles = make("div", "tiles");
    for (const name of names) tiles.append(make("div", "", make("b", "", fact(groups[0], name)), make("span", "", name)));
    return tiles;
  }
  const table = make("table");
  const head = make("tr", "", make("th"));
  groups.forEach((g, i) => head.append(make("th", "", key(colour(i), g.label + (g.runs.length > 1 ? ` (${g.runs.length} seeds)` : "")))));
  table.append(head);
  for (const name of names) {
    const row = make("tr", "", make("th", "", name));
    for (const g of groups) row.append(make("td", "", fact(g, name)));
    table.append(row);
  }
  return make("div", "scroll", table);
}

// ---------------------------------------------------------------- curves

const colour = (i) => css("--c" + (i % COLOURS));

// A metric of a group: the mean over its runs; the band is from the lowest to the highest, and for
// one run's held-out reward its standard error.
function series(group, name) {
  const points = new Map();
  let lost = 0;
  for (const r of group.runs) {
    const [steps, column] = runs[r].columns[name] || [[], []];
    steps.forEach((step, i) => {
      if (!points.has(step)) points.set(step, []);
      if (column[i] === null) lost += 1;
      else points.get(step).push(column[i]);
    });
  }
  const x = [...points.keys()].sort((a, b) => a - b);
  const by = (how) => x.map((step) => (points.get(step).length ? how(points.get(step)) : null));
  const out = { x, lost, mean: by(mean) };
  if (group.runs.length > 1) Object.assign(out, { low: by((v) => Math.min(...v)), high: by((v) => Math.max(...v)) });
  else if (name === "eval_reward") {
    const error = runs[group.runs[0]].columns.eval_stderr[1];
    out.low = out.mean.map((v, i) => v - error[i]);
    out.high = out.mean.map((v, i) => v + error[i]);
  }
  return out;
}

// A chart for each row of the table of metrics that some run has, then one for each name it lacks.
function charts() {
  const have = [...new Set(runs.flatMap((run) => Object.keys(run.columns)))];
  const left = new Set(have.filter((name) => !name.startsWith("reward/")));
  const out = [];
  for (const [cell, ...about] of data.metrics) {
    const names = [...cell.matchAll(/`([\w/]+)`/g)].map((m) => m[1]);
    names.forEach((name) => left.delete(name));
    let shown = names.filter((n) => have.includes(n) && n !== "eval_stderr" && n !== "eval_rows");
    if (shown.includes("reward")) shown = shown.concat(have.filter((n) => n.startsWith("reward/")));
    // Several groups: a chart for each metric, or nobody could tell the lines apart.
    if (groups.length === 1 && shown.length) out.push({ names: shown, about });
    else shown.forEach((name, i) => out.push({ names: [name], about: i ? ["see " + shown[0], "", ""] : about }));
  }
  for (const name of left) out.push({ names: [name], about: ["of your own loss or task", "", ""] });
  return out;
}

const plain = (text) => text.replaceAll("`", "");

function figure({ names, about }) {
  const box = make("figure");
  const plot = make("div", "plot");
  const [means, healthy, otherwise] = about.map(plain);
  const caption = make("figcaption", "", means[0].toUpperCase() + means.slice(1) + ". ");
  if (healthy) caption.append(make("b", "", "Healthy: "), healthy + ". ");
  if (otherwise) caption.append(make("b", "", "Else: "), otherwise + ".");
  box.append(make("h3", "", names.join(", ")), plot, caption);
  box.draw = () => draw(plot, names, caption);
  return box;
}

function draw(plot, names, caption) {
  plot.replaceChildren();
  const curves = groups.flatMap((group, g) => names.map((name, n) => ({ ...series(group, name), name, g, n }))).filter((c) => c.x.length);
  const x = [...new Set(curves.flatMap((c) => c.x))].sort((a, b) => a - b);
  const place = new Map(x.map((step, i) => [step, i]));
  const table = [x], options = [{ label: "step" }], bands = [];
  const onto = (c, column) => { const out = Array(x.length).fill(undefined); c.x.forEach((step, i) => (out[place.get(step)] = column[i])); return out; };
  for (const c of curves) {
    const ink = colour(groups.length > 1 ? c.g : c.n); // one group: a colour for each metric
    const label = groups.length > 1 ? groups[c.g].label : c.name;
    const few = c.x.length <= 25;
    options.push({ label, stroke: ink, width: 1.6, spanGaps: false, points: { show: few, size: 5, fill: ink }, value: (u, v) => (v == null ? "" : number(v)) });
    table.push(onto(c, c.mean));
    if (c.low) {
      const first = table.length;
      for (const column of [c.high, c.low]) {
        options.push({ label: "", class: "u-band", stroke: "transparent", points: { show: false }, spanGaps: false });
        table.push(onto(c, column));
      }
      bands.push({ series: [first, first + 1], fill: ink + "2b" });
    }
  }
  // Values over several decades need a log scale; a first step with the whole start in it a cut one.
  const all = curves.flatMap((c) => c.mean).filter((v) => v !== null).sort((a, b) => a - b);
  const seconds = names.some((n) => n.endsWith("_s"));
  const log = !seconds && all.length > 0 && all[0] > 0 && all.at(-1) / all[0] > 1000;
  const most = all[Math.floor(0.97 * (all.length - 1))];
  const cut = seconds && all.at(-1) > 3 * most && most > 0;
  const notes = [];
  if (cut) notes.push(`the highest, ${number(all.at(-1))}, is above the picture`);
  const lost = curves.reduce((sum, c) => sum + c.lost, 0);
  if (lost) notes.push(`${lost} points are NaN or infinite`);
  if (!caption.dataset.noted && notes.length) caption.append(make("span", lost ? "failed" : "", ` (${notes.join("; ")})`));
  caption.dataset.noted = "yes";
  const low = all[0], flat = (a, b) => a === null || a === b;
  const range = (u, a, b) => {
    if (flat(a, b)) return [Math.min(0, a || 0), a > 0 ? 1.25 * a : 1];
    if (a >= 0 && b <= 1 && b > 0.5) return [0, 1.03];
    const pad = 0.06 * (b - a);
    return [a >= 0 && a < 0.4 * b ? 0 : a - pad, cut ? 1.3 * most : b + pad];
  };
  const axis = { stroke: css("--soft"), font: "11px system-ui, sans-serif", grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } };
  const decades = (u, splits) => splits.map((v) => (!log || Math.abs(Math.log10(v) % 1) < 1e-9 ? v : null));
  new uPlot({
    width: plot.clientWidth, height: 170, series: options, bands,
    legend: { live: true }, cursor: { sync: { key: "step" }, y: false },
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
    axes: [{ ...axis, size: 24, values: (u, v) => v.map(number) }, { ...axis, size: 56, grid: { ...axis.grid, filter: decades }, values: (u, v) => v.map((y) => (y === null ? "" : number(y))) }],
  }, table, plot);
  plot.style.height = "auto";
}

function curves() {
  const width = Math.max(...runs.map((run) => { const x = run.columns.loss[0]; return x.length > 1 ? x[1] - x[0] : 1; }));
  const note = [];
  if (width > 1) note.push(`Each point is the mean of ${width} steps (of a metric in _max, the largest).`);
  if (groups.some((g) => g.runs.length > 1)) note.push("Lines are means over seeds, bands go from the lowest to the highest.");
  else if (runs[0].columns.eval_reward) note.push("The band of held-out reward is its standard error.");
  note.push("Drag to zoom, double-click to go back.");
  at("curves-note").textContent = note.join(" ");
  if (groups.length > 1) at("charts").before(...groups.map((g, i) => key(colour(i), g.label)));
  const boxes = charts().map(figure);
  at("charts").append(...boxes);
  boxes.forEach((box) => box.draw());
  return boxes;
}

// ---------------------------------------------------------------- timeline

const KINDS = { generate: "generate", train: "train", score: "train", sync: "sync", check: "sync", idle: "wait", "arrive sync": "wait", "arrive gather": "wait", gather: "gather", save: "save", export: "save" };
const NAMES = { generate: "generate", train: "train", sync: "send weights", gather: "send rollouts", wait: "wait", save: "save", other: "other" };
const kind = (name) => KINDS[name] || "other";

// The innermost span is what a rank does: [kind, start, end] without overlaps, from spans.
function flat(spans) {
  const edges = [...new Set(spans.flatMap((s) => [s.start, s.end]))].sort((a, b) => a - b);
  const out = [];
  for (let i = 0; i + 1 < edges.length; i++) {
    const over = spans.filter((s) => s.start <= edges[i] && s.end >= edges[i + 1]);
    if (!over.length) continue;
    const inner = over.reduce((a, b) => (b.end - b.start < a.end - a.start ? b : a));
    const what = kind(inner.name), last = out.at(-1);
    if (last && last[0] === what && last[2] === edges[i]) last[2] = edges[i + 1];
    else out.push([what, edges[i], edges[i + 1]]);
  }
  return out;
}

// A step begins with its sync, where nobody generates (SFT) with its gather, on the first trainer.
function lanes(rows) {
  const spans = rows.map(([rank, name, start, length, step]) => ({ rank, name, start, end: start + length, step }));
  const ranks = [...new Set(spans.map((s) => s.rank))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const first = ranks.find((rank) => rank.startsWith("trainer")) || ranks[0];
  const sync = spans.some((s) => s.name === "sync") ? "sync" : "arrive gather";
  const borders = new Map();
  for (const s of spans) if (s.rank === first && s.name === sync) borders.set(s.step, s.start);
  const steps = [...borders.keys()].sort((a, b) => a - b);
  const start = borders.get(steps[0]) || 0;
  const end = steps.length > 1 ? borders.get(steps.at(-1)) : Math.max(0, ...spans.map((s) => s.end));
  const inside = spans.filter((s) => s.end > start && s.start < end).map((s) => ({ ...s, start: Math.max(s.start, start) - start, end: Math.min(s.end, end) - start }));
  return { length: end - start, borders: steps.map((step) => [step, borders.get(step) - start]), ranks: ranks.map((rank) => [rank, flat(inside.filter((s) => s.rank === rank))]) };
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  element.append(...children);
  return element;
}

function drawLanes(found, longest, width) {
  const left = 96, right = 84, row = 26, top = 18;
  const scale = (width - left - right) / longest;
  const height = top + row * found.ranks.length + 4;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "what each rank does over time" });
  found.ranks.forEach(([rank, parts], i) => {
    const y = top + i * row;
    picture.append(svg("text", { x: 0, y: y + 15, class: "lane" }, rank));
    for (const [what, start, end] of parts) {
      const bar = svg("rect", { x: left + start * scale, y: y + 2, width: Math.max((end - start) * scale, 0.4), height: row - 6, fill: `var(--${what})` });
      bar.append(svg("title", {}, `${rank}: ${NAMES[what]}, ${(end - start).toFixed(1)} ms`));
      picture.append(bar);
    }
    const waits = parts.filter((p) => p[0] === "wait").reduce((sum, p) => sum + p[2] - p[1], 0);
    picture.append(svg("text", { x: left + found.length * scale + 8, y: y + 15 }, `waits ${Math.round((100 * waits) / found.length)}%`));
  });
  found.borders.forEach(([step, x], i) => {
    picture.append(svg("line", { x1: left + x * scale, x2: left + x * scale, y1: 4, y2: height, class: "border" }));
    if (i + 1 < found.borders.length) picture.append(svg("text", { x: left + x * scale + 4, y: 13 }, `step ${step}`));
  });
  return picture;
}

function timeline() {
  const shown = groups.map((g) => [g.label, runs[g.runs[0]].timeline]).filter(([, t]) => t.early && t.early.length);
  if (!shown.length) return at("timeline").append(make("p", "note", "There are no spans in trace.json yet."));
  at("timeline").append(make("p", "note", "What every rank does over a few steps, all on one scale of time. With max_policy_age=0 engines and trainers take turns; with 1 the engines generate the next batch while the trainers train. The whole run: open trace.json in Perfetto."));
  const bar = make("div", "bar"), place = make("div");
  const show = (when) => {
    for (const b of bar.querySelectorAll("button")) b.setAttribute("aria-pressed", b.textContent.startsWith(when));
    const found = shown.map(([label, t]) => [label, lanes(t[when])]);
    const longest = Math.max(...found.map(([, f]) => f.length));
    place.replaceChildren();
    for (const [label, f] of found) {
      const each = f.borders.length > 1 ? `, ${number(f.length / (f.borders.length - 1) / 1000)} s a step` : "";
      place.append(make("p", "", label + each));
      const box = make("div", "lanes");
      place.append(make("div", "scroll", box));
      box.append(drawLanes(f, longest, Math.max(box.clientWidth, 640)));
    }
  };
  for (const when of ["early", "latest"]) {
    const button = make("button", "", when + " steps");
    button.onclick = () => show(when);
    bar.append(button);
  }
  for (const name in NAMES) bar.append(key(`var(--${name})`, NAMES[name]));
  at("timeline").append(bar, place);
  show("early");
  addEventListener("resize", () => show(bar.querySelector("[aria-pressed=true]").textContent.split(" ")[0]));
}

// ---------------------------------------------------------------- samples

// Characters that would not be seen, or turn the text around them, are written out.
const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff])/;

function text(name, title, words) {
  const span = make("span", name);
  span.title = title;
  words.split(HIDDEN).forEach((part, i) => {
    if (i % 2) span.append(make("span", "hidden", "\\u" + part.charCodeAt(0).toString(16).padStart(4, "0")));
    else if (part) span.append(part);
  });
  return span;
}

function sample(s) {
  const what = make("div", "what", make("b", "", s.chosen.join(", ") || "sample"));
  for (const [name, value] of Object.entries(s.rewards)) what.append(make("span", "", `${name} ${number(value)}`));
  what.append(make("span", "", `advantage ${number(s.advantage)}`));
  if (s.surprise) what.append(make("span", "", `surprise ${number(s.surprise)}`));
  what.append(make("span", "", `prompt ${s.slot}, reply ${s.reply}, weights ${s.version}`));
  if (!s.finished) what.append(make("span", "failed", "cut off"));
  const words = make("div", "text", text("given", "the prompt", String(s.prompt)));
  // The turns are the policy's and the environment's in turn, as the mask has them.
  s.turns.forEach((turn, i) => words.append(i % 2 ? text("given", "the environment", turn) : text("policy", "the policy", turn)));
  const more = make("details", "", make("summary", "note", "problem"), make("div", "text", text("", "", s.problem)));
  return make("div", "card sample", what, words, more);
}

function samples() {
  const steps = [...new Set(runs.flatMap((run) => Object.keys(run.samples).map(Number)))].sort((a, b) => a - b);
  if (!steps.length) return at("samples").append(make("p", "note", "There are no samples: nothing was generated."));
  at("samples").append(make("p", "note", "Of each step the best and the worst reply by reward, and the one that was least likely to the policy (surprise: nats per token)."));
  const bar = make("div", "bar"), place = make("div", "columns");
  const range = make("input"), label = make("b");
  Object.assign(range, { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, ariaLabel: "step" });
  const shown = groups.map((g) => [g.label, runs[g.runs[0]]]);
  const show = () => {
    const step = steps[range.value];
    label.textContent = "step " + step;
    place.replaceChildren();
    for (const [name, run] of shown) {
      const column = make("div");
      if (shown.length > 1) column.append(make("p", "", name));
      for (const s of run.samples[step] || []) column.append(sample(s));
      place.append(column);
    }
  };
  const move = (by) => { range.value = +range.value + by; show(); };
  const [before, after] = ["←", "→"].map((arrow) => make("button", "", arrow));
  Object.assign(before, { onclick: () => move(-1), ariaLabel: "the step before" });
  Object.assign(after, { onclick: () => move(1), ariaLabel: "the next step" });
  range.oninput = show;
  bar.append(before, after, label, range, key("var(--policy)", "the policy's words: trained"), key("var(--given)", "given: prompt and environment"));
  at("samples").append(bar, place);
  show();
}

// ---------------------------------------------------------------- settings

function settings() {
  const names = [...new Set(groups.flatMap((g) => Object.keys(runs[g.runs[0]].settings)))];
  const rows = (chosen, name) => {
    const table = make("table", name), head = make("tr", "", make("th", "", "setting"));
    for (const g of groups) head.append(make("th", "", g.label));
    table.append(head);
    for (const n of chosen) {
      const row = make("tr", "", make("td", "", n));
      for (const g of groups) row.append(make("td", "", String([...new Set(g.runs.map((r) => String(runs[r].settings[n])))].join(", "))));
      table.append(row);
    }
    return make("div", "scroll", table);
  };
  if (data.differ.length) at("settings").append(make("p", "note", "What is not the same:"), rows(data.differ, "differ"));
  const all = make("details", "", make("summary", "", `all ${names.length} settings`), rows(names, ""));
  at("settings").append(all);
  for (const run of runs) {
    const versions = Object.entries(run.about.versions || {}).map(([n, v]) => `${n} ${v}`).join(", ");
    at("settings").append(make("p", "note", `${run.name}: ${run.about.command || ""}, ${run.about.ranks || "?"} ranks. ${versions}`));
  }
}

// ---------------------------------------------------------------- all of it

document.title = document.querySelector("h1").textContent = runs.map((run) => run.name).join(", ");
at("about").append(`Written ${data.written} after step ${Math.max(...runs.map((run) => run.columns.loss[0].at(-1)))}. `);
at("results").append(results());
const boxes = curves();
timeline();
samples();
settings();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes.forEach((box) => box.draw()));
let wide = innerWidth, waiting;
addEventListener("resize", () => {
  if (innerWidth === wide) return; // a phone's address bar
  wide = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => boxes.forEach((box) => box.draw()), 150);
});
setTimeout(() => (document.documentElement.dataset.drawn = Math.round(performance.now()))); // ms: after uPlot's own microtasks
