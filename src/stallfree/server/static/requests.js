// The timeline of requests: a row for each, a tick for each of its tokens.

import { fontOf } from "./canvas.js";
import { count, duration, plural, shortId } from "./format.js";

const TOP = 6;
const AXIS = 22;
const HEIGHTS = [24, 18, 14, 11, 9, 7, 6]; // of rows: few sizes, so that they seldom change
const FEWEST_GONE = 4; // ended requests that are shown however many run
const BAND = 0.6; // how strong a band of ticks is, beside a tick
const FADE_S = 20; // after which an ended request is gone
const MARKS = { stop: "done", length: "done", abort: "left", error: "failed" };
export const TIER_MARKS = { priority: "▲", default: "●", flex: "◇" };

/** The width of the labels beside both timelines. */
export const gutterOf = (width) => (width < 560 ? 78 : 150);

export class RequestsView {
  constructor(surface, store) {
    this.surface = surface;
    this.store = store;
    this.shown = []; // rows with their places, from top to bottom
    this.frozen = null; // the rows and what was said of them, while the picture stands still
  }

  /** Keep the rows where they are, whatever becomes of them. */
  freeze(axis) {
    const { live, gone } = this.rowsAt(axis);
    const said = new Map([...live, ...gone].map((row) => [row, progress(row)]));
    this.frozen = { live, gone, said };
  }

  thaw() {
    this.frozen = null;
  }

  /** What to show at the end of the axis: rows that live, and those that ended lately. */
  rowsAt(axis) {
    const live = [...this.store.rows.values()].filter((row) => row.at <= axis.end);
    const running = live.filter((row) => row.state !== "waiting" || row.chunks.length);
    const waiting = live.filter((row) => row.state === "waiting" && !row.chunks.length);
    const gone = this.store.ended.filter(
      (row) => row.at <= axis.end && row.ended > axis.end - FADE_S,
    );
    const room = Math.floor((this.surface.height - TOP - AXIS) / 14) - live.length;
    return { live: running.concat(waiting), gone: gone.slice(0, Math.max(FEWEST_GONE, room)) };
  }

  draw(axis, colors, cursor) {
    const { surface } = this;
    const context = surface.clear(colors.panel);
    const bottom = surface.height - AXIS;
    axis.draw(context, TOP, bottom, colors);
    const { live, gone } = this.frozen ?? this.rowsAt(axis);
    const room = bottom - TOP;
    const divider = gone.length && live.length ? 8 : 0;
    const wanted = (room - divider) / Math.max(1, live.length + gone.length);
    const height = HEIGHTS.find((each) => each <= wanted) ?? HEIGHTS[HEIGHTS.length - 1];
    const most = Math.floor((room - divider) / height);
    const rows = live.concat(gone).slice(0, most);
    this.shown = rows.map((row, place) => ({
      row,
      y: TOP + place * height + (place >= live.length ? divider : 0),
      height,
    }));
    context.save();
    context.beginPath();
    context.rect(axis.left, 0, axis.right - axis.left, bottom);
    context.clip();
    for (const place of this.shown) this.drawRow(context, axis, colors, place);
    context.restore();
    for (const place of this.shown) this.drawLabel(context, axis, colors, place, cursor?.row);
    if (divider && rows.length > live.length) this.drawDivider(context, axis, colors, live, height);
    const hidden = live.length + gone.length - rows.length;
    if (hidden > 0) this.drawHidden(context, axis, colors, hidden, bottom);
    if (cursor) {
      context.fillStyle = colors.cursor;
      context.fillRect(Math.round(axis.x(cursor.time)), TOP, 1, bottom - TOP);
    }
  }

  drawRow(context, axis, colors, { row, y, height }) {
    const alpha = row.ended === null || row.ended > axis.end ? 1 : fade(axis.end - row.ended);
    const end = Math.min(row.ended ?? axis.end, axis.end);
    const middle = y + height / 2;
    const inner = Math.max(2, Math.round(height * 0.62));
    const bar = (from, to, tall, color, strength = 1) => {
      const left = Math.max(axis.left - 2, axis.x(from));
      const right = Math.min(axis.right, axis.x(to));
      if (right < left) return;
      context.globalAlpha = alpha * strength;
      context.fillStyle = color;
      context.fillRect(left, middle - tall / 2, Math.max(1, right - left), tall);
    };
    for (const wait of row.waits) {
      bar(wait.start, wait.end ?? end, Math.max(2, inner * 0.55), colors.wait);
    }
    const { values, length } = row.tokens;
    if (length) bar(values[0], end, 1.5, colors.thread);
    for (const chunk of row.chunks) {
      const gap = Math.min(1, (chunk.end - chunk.start) * axis.scale * 0.12) / axis.scale;
      if (chunk.end >= axis.start) bar(chunk.start, chunk.end - gap, inner, colors.prefill);
    }
    const limit = this.store.limit(row.target);
    const stall = (from, to) => bar(from, to, height - (height > 9 ? 3 : 1), colors.stall, 0.9);
    const tick = Math.max(1, Math.min(2, axis.scale * 0.01));
    const near = (tick + 0.8) / axis.scale; // closer ticks cannot be told apart: they become a band
    const bands = [];
    const stalls = [];
    context.globalAlpha = alpha;
    context.fillStyle = colors.decode;
    let from = null;
    let last = null;
    const flush = () => {
      if (from === null) return;
      if (last - from > near) bands.push([from, last]);
      else context.fillRect(axis.x(from), middle - inner / 2, tick, inner);
    };
    for (let place = Math.max(0, row.tokens.place(axis.start) - 1); place < length; place++) {
      const time = values[place];
      if (time > axis.end) break;
      if (last !== null && time - last > limit) stalls.push([last, time]);
      if (last === null || time - last > Math.min(near, limit)) {
        flush();
        from = time;
      }
      last = time;
    }
    flush();
    for (const [start, stop] of bands) {
      bar(start, stop + tick / axis.scale, inner, colors.decode, BAND);
    }
    for (const [start, stop] of stalls) stall(start, stop);
    const isOpen = row.ended === null || row.ended > axis.end;
    if (last !== null && isOpen && end - last > limit) stall(last, end); // it lasts
    if (row.reason === "error" || row.reason === "abort") {
      bar(row.ended, row.ended + 2 / axis.scale, height - 1, colors.text);
    }
    context.globalAlpha = 1;
  }

  drawLabel(context, axis, colors, { row, y, height }, chosen) {
    const isPast = row.ended !== null && row.ended <= axis.end;
    context.globalAlpha = isPast ? fade(axis.end - row.ended) : 1;
    context.textBaseline = "middle";
    const middle = y + height / 2 + 0.5;
    context.fillStyle = row === chosen ? colors.text : colors.soft;
    const size = Math.min(12, height - 1);
    if (height < 10) {
      context.fillRect(axis.left - 9, y + 1, 3, height - 2);
    } else {
      context.font = fontOf(size);
      context.textAlign = "left";
      const narrow = axis.left < 100;
      context.fillText(`${TIER_MARKS[row.tier]} ${shortId(row.id)}`, narrow ? 4 : 14, middle);
      if (!narrow) {
        context.textAlign = "right";
        context.fillText(this.frozen?.said.get(row) ?? progress(row), axis.left - 10, middle);
      }
    }
    if (row === chosen) {
      context.globalAlpha = 0.1;
      context.fillStyle = colors.cursor;
      context.fillRect(0, y, axis.right, height);
    }
    context.globalAlpha = 1;
  }

  drawDivider(context, axis, colors, live, height) {
    const y = TOP + live.length * height + 4;
    context.fillStyle = colors.line;
    context.fillRect(0, y, axis.right, 1);
  }

  drawHidden(context, axis, colors, hidden, bottom) {
    context.font = fontOf(11);
    context.textAlign = "left";
    context.textBaseline = "top";
    context.fillStyle = colors.soft;
    context.fillText(`and ${count(hidden)} more`, 14, bottom + 5);
  }

  /** The row at a height, and its token or chunk nearest to a time. */
  rowAt(y) {
    return this.shown.find((place) => y >= place.y && y < place.y + place.height)?.row ?? null;
  }

  /** What a tooltip says of a row at a time: a title and lines. */
  describe(row, time, axis) {
    const reach = 7 / axis.scale;
    const title = `${TIER_MARKS[row.tier]} ${shortId(row.id)} · ${row.tier}`;
    const { values, length } = row.tokens;
    const place = row.tokens.place(time);
    const wait = row.waits.find((each) => each.start <= time && (each.end ?? axis.end) >= time);
    const chunk = row.chunks.find((each) => each.start <= time && each.end >= time);
    const lines = [];
    const nearest = [place - 1, place]
      .filter((each) => each >= 0 && each < length)
      .sort((a, b) => Math.abs(values[a] - time) - Math.abs(values[b] - time))[0];
    const isNear = nearest !== undefined && Math.abs(values[nearest] - time) < reach;
    const gapFrom = place > 0 && place < length ? values[place] - values[place - 1] : null;
    const limit = this.store.limit(row.target);
    if (chunk) {
      const stop = chunk.from + chunk.tokens;
      lines.push(`reads tokens ${count(chunk.from)} to ${count(stop)} of ${count(row.prompt)}`);
      lines.push(`in ${duration(chunk.end - chunk.start)}`);
    } else if (gapFrom !== null && gapFrom > limit && !isNear) {
      lines.push(`stalled for ${duration(gapFrom)}`);
    } else if (isNear) {
      lines.push(nearest > 0 ? `token after ${duration(values[nearest] - values[nearest - 1])}` : "token");
    } else if (wait) {
      lines.push(`waits, for ${duration((wait.end ?? axis.end) - wait.start)}`);
    }
    const target = Number.isFinite(row.target) ? duration(row.target) : "none";
    lines.push(`${plural(row.outputs, "token")}, longest gap ${duration(row.worst || null)}`);
    lines.push(`target ${target}${row.ttft_s === null ? "" : `, first token ${duration(row.ttft_s)}`}`);
    if (row.ended !== null) lines.push(`ended: ${row.reason}`);
    return { title, lines };
  }
}

/** How visible a request is so many seconds after its end. */
function fade(ago) {
  return Math.max(0.1, 0.6 * (1 - ago / FADE_S));
}

function progress(row) {
  if (row.state === "ended") return `${count(row.outputs)} ${MARKS[row.reason]}`;
  if (row.state === "answering") return count(row.outputs);
  if (row.state === "reading") return `${Math.floor((100 * row.computed) / row.prompt)} % read`;
  return "waits";
}
