// The numbers above the timelines, and one sentence that says the same.

import { Surface, sparkline } from "./canvas.js";
import { count, duration, percent, plural, rate } from "./format.js";

const TIERS = ["priority", "default", "flex"];
const POINTS = 60; // of a small line

export class Tiles {
  constructor(store, onResize) {
    this.store = store;
    this.parts = {};
    for (const element of document.querySelectorAll("[data-part]")) {
      this.parts[element.dataset.part] = element;
    }
    this.lines = {};
    for (const name of ["rate", "blocks"]) {
      this.lines[name] = new Surface(document.getElementById(`line-${name}`), onResize);
    }
  }

  set(part, text) {
    const element = this.parts[part];
    if (element.textContent !== text) element.textContent = text;
  }

  /** Show what holds at `end`, over the `span` seconds before it. */
  draw(end, span, colors) {
    const { store } = this;
    if (!store.settings) return;
    const start = end - span;
    const gaps = store.gaps.summary(start, end, (target) => store.limit(target));
    const firsts = store.firsts.summary(start, end, (target) =>
      Number.isNaN(target) ? Infinity : target,
    );
    const slo = store.settings.tbt_slo_s ?? null;
    const ttft = store.settings.tiers.default?.ttft_s ?? null;
    this.drawPercentiles("tbt", gaps, slo);
    this.drawPercentiles("ttft", firsts, ttft);
    this.set("tbt-share", share(gaps, slo === null && store.rule === "target" ? "under 1 s" : "in time"));
    this.set("ttft-share", firsts.limited ? share(firsts, "in time") : "");
    this.drawRates(start, end, colors);
    this.drawQueue(end);
    this.drawBlocks(start, end, colors);
    this.set("stalls", count(gaps.over));
    this.parts.stalls.classList.toggle("bad", gaps.over > 0);
    this.set("stalls-worst", gaps.count ? `longest gap ${duration(gaps.worst)}` : "no gaps yet");
    this.set("stalls-squeezed", `${count(store.state.squeezed)} squeezed iterations`);
    this.gaps = gaps;
    this.firsts = firsts;
  }

  drawPercentiles(name, summary, target) {
    const most = Math.max(summary.p99 ?? 0, target ?? 0) * 1.08 || 1;
    for (const p of ["p50", "p90", "p99"]) {
      this.set(`${name}-${p}`, summary.count ? duration(summary[p]) : "–");
      const bar = this.parts[`${name}-${p}-bar`];
      bar.style.width = `${(100 * (summary[p] ?? 0)) / most}%`;
      bar.classList.toggle("over", target !== null && summary[p] > target);
    }
    const mark = this.parts[`${name}-mark`];
    mark.hidden = target === null;
    mark.style.left = `${(100 * (target ?? 0)) / most}%`;
    this.parts[`${name}-p99`].classList.toggle("bad", target !== null && summary.p99 > target);
    this.set(`${name}-target`, target === null ? "no target" : `target ${duration(target)}`);
  }

  drawRates(start, end, colors) {
    const { store } = this;
    const from = Math.max(start, store.iterations.count ? store.iterations.at(store.iterations.first).start : start);
    const total = store.totals(start, end);
    const span = Math.max(1, Math.min(end - start, end - from));
    this.set("rate", rate(total.outputs / span));
    this.set("rate-read", `${rate(total.read / span)} prompt tokens/s`);
    this.set("rate-iterations", `${rate(total.iterations / span)} iterations/s`);
    const error = total.predicted ? percent(total.error / total.predicted) : null;
    this.set("rate-error", error === null ? "" : `predicted to ±${error}`);
    const bins = new Array(POINTS).fill(0);
    this.each(start, end, (each) => {
      bins[Math.min(POINTS - 1, Math.floor(((each.end - start) / (end - start)) * POINTS))] += each.outputs;
    });
    sparkline(this.lines.rate, bins, Math.max(...bins, 1), colors.decode, colors);
  }

  drawQueue(end) {
    const { store } = this;
    const { running, waiting } = this.load(end);
    this.set("running", count(running));
    this.set("running-most", `of ${count(store.settings.max_num_seqs)} at most`);
    const total = waiting[0] + waiting[1] + waiting[2];
    this.set("waiting", plural(total, "request").replace(/requests?$/, "waiting"));
    TIERS.forEach((tier, place) => this.set(`waiting-${tier}`, count(waiting[place])));
    this.set("refused", store.refusals.count ? `${count(store.refusals.count)} refused` : "");
  }

  drawBlocks(start, end, colors) {
    const { store } = this;
    const total = store.settings.num_blocks;
    const taken = total - this.load(end).free_blocks;
    this.set("blocks", percent(taken / total));
    this.set("blocks-count", `${count(taken)} of ${count(total)}`);
    const gauge = this.parts["blocks-bar"];
    gauge.style.width = `${(100 * taken) / total}%`;
    gauge.classList.toggle("over", taken / total > 0.9);
    const preempted = Object.values(store.state.preemptions).reduce((sum, each) => sum + each, 0);
    this.set("preempted", plural(preempted, "preemption"));
    const values = new Array(POINTS).fill(null);
    this.each(start, end, (each) => {
      const place = Math.min(POINTS - 1, Math.floor(((each.end - start) / (end - start)) * POINTS));
      values[place] = total - each.free_blocks;
    });
    let last = 0;
    const filled = values.map((value) => (last = value ?? last));
    sparkline(this.lines.blocks, filled, Math.max(...filled, 1) * 1.2, colors.soft, colors);
  }

  /** Queues and blocks at a time: the latest that the server said, or those of an iteration. */
  load(end) {
    const { iterations, state } = this.store;
    if (end >= state.now - 1) return state;
    const number = iterations.find((each) => each.end > end) - 1;
    return number >= iterations.first ? iterations.at(number) : state;
  }

  each(start, end, take) {
    const { iterations } = this.store;
    for (let n = iterations.find((each) => each.end >= start); n < iterations.count; n++) {
      const iteration = iterations.at(n);
      if (iteration.end > end) return;
      take(iteration);
    }
  }

  /** What an operator would say of it all. */
  sentence(span) {
    const { store, gaps, firsts } = this;
    if (!store.settings || !gaps) return "";
    const { running, waiting } = store.state;
    const total = waiting[0] + waiting[1] + waiting[2];
    if (!running && !total && !gaps.count) return "Nothing runs.";
    const parts = [`${plural(running, "request")} running`, `${count(total)} waiting`];
    const text = [parts.join(", ") + "."];
    if (gaps.count) {
      const slo = store.settings.tbt_slo_s;
      const target = slo ? `, target ${duration(slo)}` : "";
      text.push(`99 % of tokens came within ${duration(gaps.p99)} of the one before${target}.`);
      const stalls = gaps.over ? plural(gaps.over, "stall") : "No stalls";
      const time = { 60: "minute", 300: "5 minutes" }[span] ?? `${span} seconds`;
      text.push(`${stalls} in the last ${time}.`);
    }
    if (firsts.count) text.push(`Half of the first tokens came within ${duration(firsts.p50)}.`);
    return text.join(" ");
  }
}

function share(summary, what) {
  return summary.limited ? `${percent(1 - summary.over / summary.limited)} ${what}` : "–";
}
