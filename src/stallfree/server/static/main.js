// Puts the page together: the feed fills the store, and what changed is drawn, at most so often.

import { Surface, TimeAxis, palette } from "./canvas.js";
import { Connection } from "./connection.js";
import { count, duration } from "./format.js";
import { Inspector } from "./inspector.js";
import { IterationsView } from "./iterations.js";
import { Playground } from "./playground.js";
import { Replicas } from "./replicas.js";
import { RequestsView, gutterOf } from "./requests.js";
import { key } from "./sse.js";
import { Store } from "./store.js";
import { Table } from "./table.js";
import { Tiles } from "./tiles.js";

const LAG_S = 0.3; // behind the engine's clock, so that what is shown is there already
const SHORTEST_FRAME_MS = 33;
const CALM_FRAME_MS = 1000; // for those who asked for less motion
const NUMBERS_MS = 500;
const SPOKEN_MS = 15000;
const SPANS = [5, 10, 30, 60, 120, 300];

const find = (id) => document.getElementById(id);
const store = new Store();
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");
const requests = new RequestsView(new Surface(find("requests"), invalidate), store);
const iterations = new IterationsView(new Surface(find("iterations"), invalidate), store);
const tiles = new Tiles(store, invalidate);
const table = new Table(find("table"), store);
const playground = new Playground(find("playground"), store, () => show({ name: "locked" }));
const inspector = new Inspector(requests, iterations, find("tip"), find("spoken"), invalidate);
const connection = new Connection(take, show);
const replicas = new Replicas(find("replicas"), (place) => connection.choose(place));

let colors = palette();
let span = 30;
let pausedAt = null; // the engine's clock where the picture stands still
let timer; // of the next drawing
let dueAt = Infinity;
let isFrameAsked = false;
let drawnAt = 0;
let cost = 0;
let numbersAt = -Infinity;

// What comes from the server

function take(message) {
  store.take(message);
  if (message.type === "snapshot") begin(message);
  replicas.take(message.replicas, store.settings.replica);
  document.body.dataset.status = message.status;
  find("empty").hidden = store.rows.size > 0 || store.iterations.count > 0;
  if (store.lost) find("lost").textContent = `${count(store.lost)} records lost: this page was too slow`;
  if (pausedAt === null) invalidate();
  else showBehind();
}

function begin(settings) {
  pausedAt = null;
  requests.thaw();
  showPause();
  const budget = settings.token_budget ? `budget ${count(settings.token_budget)} tokens` : "no budget";
  const target = settings.tbt_slo_s ? `target ${duration(settings.tbt_slo_s)}` : budget;
  find("about").textContent = `${settings.model} · ${settings.scheduler} · ${target} · ${settings.dtype}`;
  find("curl").textContent = curlOf(settings.model);
  find("lost").textContent = "";
  playground.begin(settings);
  numbersAt = -Infinity;
}

function curlOf(model) {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  const secret = key.get() ? ' -H "Authorization: Bearer $KEY"' : "";
  const body = { model, prompt: "Once upon a time", max_tokens: 200, stream: true };
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl -N ${base}/v1/completions${secret} \\\n  -H "Content-Type: application/json" \\\n  -d '${json}'`;
}

// What is drawn, and when

/** Draw soon: never more often than the eye follows or the processor affords. */
function invalidate() {
  const least = isCalm.matches ? CALM_FRAME_MS : Math.max(SHORTEST_FRAME_MS, cost * 8);
  drawBy(Math.max(performance.now(), drawnAt + least));
}

function drawBy(time) {
  if (isFrameAsked || dueAt <= time) return;
  clearTimeout(timer);
  dueAt = time;
  timer = setTimeout(() => {
    isFrameAsked = true;
    requestAnimationFrame(draw);
  }, time - performance.now());
}

function draw() {
  const began = performance.now();
  isFrameAsked = false;
  dueAt = Infinity;
  const end = pausedAt ?? store.now() - LAG_S;
  const axis = axisAt(end);
  const cursor = inspector.cursor(axis);
  requests.draw(axis, colors, cursor);
  iterations.draw(axis, colors, cursor);
  if (began - numbersAt > NUMBERS_MS) {
    numbersAt = began;
    drawNumbers(end);
  }
  drawnAt = performance.now();
  cost = drawnAt - began;
  const moves = pausedAt === null && !isCalm.matches && store.hasContent(end - span - 1);
  if (moves) drawBy(drawnAt + Math.max(SHORTEST_FRAME_MS, cost * 8, 1000 / axis.scale)); // a pixel on
}

function drawNumbers(end) {
  const over = Number(find("over").value);
  tiles.draw(end, over, colors);
  find("sentence").textContent = tiles.sentence(over);
  playground.draw(colors);
  table.draw();
}

setInterval(() => {
  const text = tiles.sentence(Number(find("over").value));
  if (text && pausedAt === null) find("summary").textContent = text;
}, SPOKEN_MS);

// What the operator does

function setPaused(isPaused) {
  pausedAt = isPaused ? store.now() - LAG_S : null;
  if (isPaused) requests.freeze(axisAt(pausedAt));
  else requests.thaw();
  showPause();
  numbersAt = -Infinity;
  invalidate();
}

function showPause() {
  const isPaused = pausedAt !== null;
  find("pause").setAttribute("aria-pressed", String(isPaused));
  find("pause").textContent = isPaused ? "Resume" : "Pause";
  find("paused").hidden = !isPaused;
  if (isPaused) showBehind();
}

function showBehind() {
  const behind = Math.max(0, store.now() - pausedAt);
  find("paused").textContent = `paused, ${Math.round(behind)} s behind`;
}

function axisAt(end) {
  const { width } = requests.surface;
  return new TimeAxis(end, span, gutterOf(width), width - 10);
}

function setSpan(seconds) {
  span = seconds;
  find("span").value = String(seconds);
  invalidate();
}

function zoom(steps) {
  const place = SPANS.indexOf(span) + steps;
  setSpan(SPANS[Math.max(0, Math.min(SPANS.length - 1, place))]);
}

function setTheme(theme) {
  localStorage.setItem("stallfree-theme", theme);
  document.documentElement.dataset.theme = theme;
}

/** Move a picture that stands still. */
function pan(seconds) {
  if (pausedAt === null) return;
  const oldest = store.iterations.count ? store.iterations.at(store.iterations.first).start : pausedAt;
  pausedAt = Math.max(oldest, Math.min(store.now() - LAG_S, pausedAt + seconds));
  numbersAt = -Infinity;
  invalidate();
}

function show(state) {
  const words = {
    connecting: "connecting",
    live: "live",
    lost: `connection lost: ${state.reason}; next attempt in ${Math.ceil(state.seconds)} s`,
    locked: "this server asks for its API key",
  };
  find("connection").textContent = words[state.name];
  find("connection").dataset.state = state.name;
  find("again").hidden = state.name !== "lost" && state.name !== "locked";
  find("forget").hidden = key.get() === null;
  if (state.name === "locked" && !find("ask").open) {
    find("ask-wrong").hidden = key.get() === null;
    find("ask").showModal();
  }
}

find("pause").addEventListener("click", () => setPaused(pausedAt === null));
find("span").addEventListener("change", (event) => setSpan(Number(event.target.value)));
find("zoom-in").addEventListener("click", () => zoom(-1));
find("zoom-out").addEventListener("click", () => zoom(1));
find("over").addEventListener("change", () => {
  numbersAt = -Infinity;
  invalidate();
});
find("rule").addEventListener("change", (event) => {
  const rule = event.target.value;
  store.rule = rule === "target" ? rule : Number(rule);
  numbersAt = -Infinity;
  invalidate();
});
find("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});
find("again").addEventListener("click", () => connection.open());
find("forget").addEventListener("click", () => {
  key.forget();
  connection.open();
});
find("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(find("curl").textContent);
  find("copy").textContent = "Copied";
});
find("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("ask-key").value);
  find("ask-key").value = "";
  find("ask").close();
  connection.open();
});

document.addEventListener("keydown", (event) => {
  const { target } = event;
  const types = /^(INPUT|TEXTAREA|SELECT|BUTTON|SUMMARY|A)$/.test(target.tagName) || find("ask").open;
  if (types || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") setPaused(pausedAt === null);
  else if (event.key === "+" || event.key === "=") zoom(-1);
  else if (event.key === "-") zoom(1);
  else if (event.key === "[") pan(-span / 4);
  else if (event.key === "]") pan(span / 4);
  else return;
  event.preventDefault();
});

for (const { surface } of [requests, iterations]) {
  let from = null;
  surface.canvas.addEventListener("pointerdown", (event) => {
    if (pausedAt !== null) from = event.clientX;
  });
  surface.canvas.addEventListener("pointermove", (event) => {
    if (from === null || !event.buttons) return;
    pan(((from - event.clientX) * span) / surface.width);
    from = event.clientX;
  });
  surface.canvas.addEventListener("pointerup", () => (from = null));
  surface.canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      zoom(Math.sign(event.deltaY));
    },
    { passive: false },
  );
}

new MutationObserver(() => {
  colors = palette();
  const isDark = document.documentElement.dataset.theme === "dark";
  find("theme").setAttribute("aria-pressed", String(isDark));
  numbersAt = -Infinity;
  invalidate();
}).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

find("theme").setAttribute("aria-pressed", String(document.documentElement.dataset.theme === "dark"));
connection.open();
