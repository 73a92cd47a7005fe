// The timeline of iterations: what each held, and below it how long it was to take and took.

import { fontOf } from "./canvas.js";
import { count, duration, percent, plural, scaleTop } from "./format.js";

const TOP = 8;
const AXIS = 22;
const BETWEEN = 22;
const MOST_SLOS = 2.5; // so many times the target are in the picture; what takes longer is cut off

export class IterationsView {
  constructor(surface, store) {
    this.surface = surface;
    this.store = store;
  }

  /** The numbers of the iterations in sight: the first, and the one after the last. */
  inSight(axis) {
    const { iterations } = this.store;
    return [
      iterations.find((each) => each.end >= axis.start),
      iterations.find((each) => each.start > axis.end),
    ];
  }

  draw(axis, colors, cursor) {
    const { surface, store } = this;
    const context = surface.clear(colors.panel);
    const bottom = surface.height - AXIS;
    const split = TOP + (bottom - TOP) * 0.56;
    axis.draw(context, TOP, bottom, colors);
    const [first, stop] = this.inSight(axis);
    let mostTokens = 0;
    let mostBeside = 0; // decodes: what delays nobody may be cut off
    let mostBudget = 0;
    let longest = store.settings?.tbt_slo_s ?? 0.001;
    for (let n = first; n < stop; n++) {
      const each = store.iterations.at(n);
      mostTokens = Math.max(mostTokens, each.tokens);
      if (each.decodes.length) {
        mostBeside = Math.max(mostBeside, each.tokens);
        mostBudget = Math.max(mostBudget, each.budget ?? 0);
      }
      longest = Math.max(longest, each.end - each.start, each.predicted ?? 0);
    }
    const slo = store.settings?.tbt_slo_s ?? Infinity;
    const highest = mostBeside * 1.1 || mostTokens * 1.1 || 1;
    const tokenTop = scaleTop(Math.max(highest, Math.min(mostBudget * 1.1, highest * 3)));
    const secondTop = scaleTop(Math.min(longest * 1.05, slo * MOST_SLOS));
    const tokens = { top: TOP, bottom: split - BETWEEN / 2, most: tokenTop };
    const seconds = { top: split + BETWEEN / 2, bottom, most: secondTop };
    this.drawScale(context, axis, colors, tokens, "tokens", count);
    this.drawScale(context, axis, colors, seconds, "time", duration);
    context.save();
    context.beginPath();
    context.rect(axis.left, 0, axis.right - axis.left, bottom);
    context.clip();
    this.drawTokens(context, axis, colors, tokens, first, stop);
    this.drawBudget(context, axis, colors, tokens, first, stop);
    this.drawSeconds(context, axis, colors, seconds, first, stop);
    context.restore();
    if (cursor) {
      context.fillStyle = colors.cursor;
      context.fillRect(Math.round(axis.x(cursor.time)), TOP, 1, bottom - TOP);
    }
  }

  drawScale(context, axis, colors, pane, name, format) {
    context.font = fontOf(11);
    context.textAlign = "right";
    context.fillStyle = colors.soft;
    context.textBaseline = "top";
    context.fillText(format(pane.most), axis.left - 10, pane.top - 2);
    context.textBaseline = "bottom";
    context.fillText("0", axis.left - 10, pane.bottom + 2);
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText(name, axis.left < 100 ? 4 : 14, (pane.top + pane.bottom) / 2);
    context.fillStyle = colors.line;
    context.fillRect(axis.left, pane.bottom, axis.right - axis.left, 1);
  }

  drawTokens(context, axis, colors, pane, first, stop) {
    const { iterations } = this.store;
    const scale = (pane.bottom - pane.top) / pane.most;
    for (const [color, from, size] of [
      [colors.decode, () => 0, (each) => each.decodes.length],
      [colors.prefill, (each) => each.decodes.length, (each) => each.read],
    ]) {
      context.fillStyle = color;
      for (let n = first; n < stop; n++) {
        const each = iterations.at(n);
        const bottom = Math.min(from(each), pane.most);
        const height = Math.min(size(each), pane.most - bottom) * scale;
        if (!height) continue;
        const [x, width] = extent(axis, each);
        context.fillRect(x, pane.bottom - bottom * scale - height, width, height);
      }
    }
    context.fillStyle = colors.stall;
    for (let n = first; n < stop; n++) {
      const each = iterations.at(n);
      const [x, width] = extent(axis, each);
      if (each.failed) context.fillRect(x, pane.top, width, pane.bottom - pane.top);
    }
  }

  /** The budget in force, as far as it is in the picture. */
  drawBudget(context, axis, colors, pane, first, stop) {
    const { iterations } = this.store;
    const scale = (pane.bottom - pane.top) / pane.most;
    context.strokeStyle = colors.target;
    context.lineWidth = 1.5;
    context.setLineDash([5, 3]);
    context.beginPath();
    let last = null;
    for (let n = first; n < stop; n++) {
      const each = iterations.at(n);
      if (each.budget === null || each.budget > pane.most) {
        last = null;
        continue;
      }
      const y = Math.round(pane.bottom - each.budget * scale) + 0.5;
      const x = axis.x(each.start);
      if (last === null || each.start - last > 0.25) context.moveTo(x, y);
      else context.lineTo(x, y);
      context.lineTo(axis.x(each.end), y);
      last = each.end;
    }
    context.stroke();
    context.setLineDash([]);
  }

  /** What each took as a bar, what it was predicted to take as a line over it. */
  drawSeconds(context, axis, colors, pane, first, stop) {
    const { iterations, settings } = this.store;
    const scale = (pane.bottom - pane.top) / pane.most;
    const slo = settings?.tbt_slo_s;
    for (let n = first; n < stop; n++) {
      const each = iterations.at(n);
      const [x, width] = extent(axis, each);
      const took = each.end - each.start;
      context.fillStyle = slo && took > slo && each.decodes.length ? colors.stall : colors.thread;
      const height = Math.min(took, pane.most) * scale;
      context.fillRect(x, pane.bottom - height, width, height);
    }
    context.fillStyle = colors.predicted;
    for (let n = first; n < stop; n++) {
      const each = iterations.at(n);
      if (each.predicted === null || each.predicted > pane.most) continue;
      const [x, width] = extent(axis, each);
      context.fillRect(x, pane.bottom - each.predicted * scale - 1, Math.max(1.5, width), 2);
    }
    if (!slo) return;
    context.fillStyle = colors.target;
    for (let x = axis.left; x < axis.right; x += 8) {
      context.fillRect(x, Math.round(pane.bottom - slo * scale), 5, 1.5);
    }
  }

  /** The number of the iteration at a time, or of the nearest one close by; null if there is none. */
  numberAt(time, axis) {
    const { iterations } = this.store;
    const number = iterations.find((each) => each.end >= time);
    const reach = 4 / axis.scale;
    const isNear = (n) => {
      const each = n >= iterations.first && n < iterations.count ? iterations.at(n) : null;
      return each && each.start - reach <= time && each.end + reach >= time;
    };
    return [number, number - 1].find(isNear) ?? null;
  }

  /** What a tooltip says of an iteration: a title and lines. */
  describe(iteration) {
    const { settings } = this.store;
    const took = iteration.end - iteration.start;
    const [priority, standard, flex] = iteration.waiting;
    const waiting = priority + standard + flex;
    const lines = [
      `${plural(iteration.decodes.length, "decode")}, ${plural(iteration.read, "prompt token")}`,
      iteration.budget === null ? "no budget" : `budget ${count(iteration.budget)} tokens`,
    ];
    if (iteration.predicted !== null) {
      const error = (took - iteration.predicted) / iteration.predicted;
      const sign = error < 0 ? "−" : "+";
      lines.push(`predicted ${duration(iteration.predicted)}, ${sign}${Math.round(Math.abs(error) * 100)} %`);
    }
    lines.push(`${count(iteration.running)} run, ${count(waiting)} wait`);
    lines.push(`KV blocks ${percent(1 - iteration.free_blocks / settings.num_blocks)} taken`);
    if (iteration.failed) lines.push("it failed");
    return { title: `iteration of ${duration(took)}`, lines };
  }
}

/** Where an iteration is drawn: from, and how wide. */
function extent(axis, { start, end }) {
  const width = (end - start) * axis.scale;
  return [axis.x(start), width > 3 ? width - 1 : Math.max(width, 0.75)];
}
