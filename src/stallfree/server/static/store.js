// What the page knows: requests, iterations and samples, built from the feed. Draws nothing.

import { Ring, Samples, Times } from "./rings.js";

const MAX_ITERATIONS = 6000;
const MAX_SAMPLES = 1 << 17;
const MAX_LIVE = 2048;
const MAX_ENDED = 48;
const MAX_SPANS = 512; // chunks and waits of one request
export const NO_TARGET_S = 1; // a pause longer than this is a stall, where there is no target

/** One request, and where its tokens are in time. */
class Row {
  constructor(facts) {
    Object.assign(this, facts); // request, id, tier, at, prompt, most_outputs, tbt_s, ttft_s
    this.state = "waiting";
    this.outputs = 0;
    this.computed = 0;
    this.hasBegun = false; // whether its first token came
    this.tokens = new Times();
    this.chunks = [];
    this.waits = [];
    this.worst = 0;
    this.ended = null;
    this.reason = null;
    // What a gap is compared with: flex has no target, as it is made to yield.
    this.target = this.tbt_s ?? (this.tier === "flex" ? Infinity : NaN);
  }

  wait(from) {
    const last = this.waits[this.waits.length - 1];
    if (!last || last.end !== null) keep(this.waits, { start: from, end: null });
  }

  run(at) {
    const last = this.waits[this.waits.length - 1];
    if (last && last.end === null) last.end = at;
  }
}

function keep(list, value) {
  list.push(value);
  if (list.length > MAX_SPANS) list.splice(0, MAX_SPANS >> 1);
}

export class Store {
  constructor() {
    this.rule = "target"; // what a stall is: over the target, or over so many seconds
    this.reset();
  }

  reset() {
    this.settings = null;
    this.state = null; // the latest: status, running, waiting, free_blocks, ...
    this.rows = new Map();
    this.ended = []; // rows, the latest first
    this.iterations = new Ring(MAX_ITERATIONS);
    this.gaps = new Samples(MAX_SAMPLES);
    this.firsts = new Samples(8192);
    this.refusals = new Ring(1024);
    this.lost = 0;
    this.offset = null; // the engine's clock less ours
    this.next = 0; // the number of the first record that is not in the snapshot
  }

  /** The engine's clock now. */
  now() {
    return this.offset === null ? 0 : performance.now() / 1000 + this.offset;
  }

  /** How long a gap may be, by its target. */
  limit(target) {
    if (target === Infinity) return Infinity;
    if (this.rule !== "target") return this.rule;
    return Number.isNaN(target) ? NO_TARGET_S : target;
  }

  /** Take an event of the feed. */
  take(message) {
    if (message.type === "snapshot") this.begin(message);
    else {
      this.lost += message.lost;
      message.records.forEach((record, place) => this.apply(record, message.first + place));
    }
    this.state = message;
    // Events come late by what the network takes, never early.
    const offset = message.now - performance.now() / 1000;
    this.offset = this.offset === null ? offset : Math.max(offset, this.offset - 0.0005);
  }

  begin(message) {
    this.reset();
    this.settings = message;
    this.next = message.next;
    for (const facts of message.requests) {
      const row = this.add(facts);
      if (!row) continue;
      row.isKnown = true; // its counts hold what older records tell
      row.outputs = facts.outputs;
      row.computed = facts.computed;
      row.hasBegun = facts.outputs > 0;
      row.state = facts.state === "waiting" ? "waiting" : row.hasBegun ? "answering" : "reading";
      if (row.state === "waiting") row.wait(row.at);
    }
  }

  add(facts) {
    if (this.rows.size >= MAX_LIVE) return null;
    const row = new Row(facts);
    this.rows.set(row.request, row);
    return row;
  }

  apply(record, number) {
    switch (record.kind) {
      case "added":
        return this.added(record);
      case "iteration":
        return this.iterated(record, number);
      case "ended":
        return this.end(record);
      case "preempted":
        return this.preempted(record, number);
      case "refused":
        return this.refusals.push(record);
      default:
        return undefined; // of a later server
    }
  }

  added(record) {
    let row = this.rows.get(record.request);
    if (row) row.hasBegun = false; // its whole story follows
    else row = this.add(record);
    if (row && !row.waits.length) row.wait(record.at);
  }

  preempted(record, number) {
    for (const request of record.requests) {
      const row = this.rows.get(request);
      if (!row) continue;
      row.wait(record.at);
      if (this.isNews(row, number)) row.state = "waiting";
    }
  }

  /** Whether a record tells of a request what its counts do not hold yet. */
  isNews(row, number) {
    return !row.isKnown || number >= this.next;
  }

  iterated(record, number) {
    let read = 0;
    let outputs = record.decodes.length;
    for (const [request, start, tokens, samples] of record.prefills) {
      read += tokens;
      outputs += samples;
      const row = this.rows.get(request);
      if (!row) continue;
      row.run(record.start);
      keep(row.chunks, { start: record.start, end: record.end, from: start, tokens });
      if (this.isNews(row, number)) {
        row.computed = start + tokens;
        row.state = "reading";
      }
      if (samples && !record.failed) this.token(row, record.end, number);
    }
    for (const request of record.decodes) {
      const row = this.rows.get(request);
      if (row && !record.failed) this.token(row, record.end, number);
    }
    this.iterations.push({
      ...record,
      read,
      outputs: record.failed ? 0 : outputs,
      tokens: record.decodes.length + read,
    });
  }

  token(row, at, number) {
    if (row.hasBegun && row.tokens.length) {
      const gap = at - row.tokens.last;
      row.worst = Math.max(row.worst, gap);
      this.gaps.push(at, gap, row.target);
    } else if (!row.hasBegun) {
      this.firsts.push(at, at - row.at, row.ttft_s ?? NaN);
    }
    row.hasBegun = true;
    row.tokens.push(at);
    if (!this.isNews(row, number)) return;
    row.outputs += 1;
    row.state = "answering";
  }

  end(record) {
    const row = this.rows.get(record.request);
    if (!row) return;
    row.run(record.at);
    row.ended = record.at;
    row.reason = record.reason;
    row.outputs = record.outputs;
    row.state = "ended";
    this.rows.delete(record.request);
    this.ended.unshift(row);
    this.ended.length = Math.min(this.ended.length, MAX_ENDED);
  }

  /** Whether there is anything to see after `start`. */
  hasContent(start) {
    return this.rows.size > 0 || (this.iterations.last?.end ?? -Infinity) > start;
  }

  /** Totals of the iterations that ended from `start` to `end`. */
  totals(start, end) {
    const total = { iterations: 0, outputs: 0, read: 0, error: 0, predicted: 0 };
    const iterations = this.iterations;
    for (let n = iterations.find((each) => each.end >= start); n < iterations.count; n++) {
      const each = iterations.at(n);
      if (each.end > end) break;
      total.iterations += 1;
      total.outputs += each.outputs;
      total.read += each.read;
      if (each.predicted !== null) {
        total.predicted += 1;
        total.error += Math.abs(each.end - each.start - each.predicted) / each.predicted;
      }
    }
    return total;
  }
}
