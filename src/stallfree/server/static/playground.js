// Two chats side by side, and a long prompt thrown in: what its clients see of the server.

import { Surface } from "./canvas.js";
import { count, duration, plural } from "./format.js";
import { ask, eventsOf } from "./sse.js";

const GAPS = 160; // shown of a lane
const WORDS =
  "river stone cloud table garden window paper light water bread mountain forest bridge morning " +
  "summer winter coffee letter music number picture question answer market station";

/** So many common words, of about a token each. */
function longText(words) {
  const known = WORDS.split(" ");
  const drawn = Array.from({ length: words }, () => known[Math.floor(Math.random() * known.length)]);
  return `${drawn.join(" ")}\n\nWhich of these words is the most beautiful, and why?`;
}

class Lane {
  /**
   * @param element holds the lane's parts, marked with `data-lane`.
   * @param playground knows the model and the targets.
   */
  constructor(element, playground) {
    this.playground = playground;
    this.part = {};
    for (const each of element.querySelectorAll("[data-lane]")) this.part[each.dataset.lane] = each;
    this.strip = new Surface(this.part.strip, () => this.drawStrip());
    this.messages = [];
    this.gaps = [];
    this.abort = null;
    element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    this.part.stop.addEventListener("click", () => this.abort?.abort());
    this.part.clear.addEventListener("click", () => this.clear());
  }

  get isBusy() {
    return this.abort !== null;
  }

  /** Whether an answer is followed up, with all that was said before. */
  get remembers() {
    return true;
  }

  clear() {
    this.messages = [];
    this.part.log.replaceChildren();
    this.say("");
  }

  /** The message to send, and how it is shown; null if there is none. */
  compose() {
    const text = this.part.prompt.value.trim();
    return text ? { text, shown: text } : null;
  }

  say(text, isError = false) {
    this.part.status.textContent = text;
    this.part.status.classList.toggle("bad", isError);
  }

  append(role, text) {
    const element = document.createElement("p");
    element.className = role;
    const node = document.createTextNode(text);
    element.append(node);
    this.part.log.append(element);
    return node;
  }

  async start() {
    const message = this.compose();
    if (!message || this.isBusy) return;
    const abort = (this.abort = new AbortController());
    this.setBusy(true);
    this.messages.push({ role: "user", content: message.text });
    this.append("user", message.shown);
    const answer = this.append("assistant", "");
    const sent = performance.now() / 1000;
    Object.assign(this, { gaps: [], longest: 0, last: null, first: null, tokens: 0 });
    const timer = setInterval(() => this.follow(sent), 250);
    let ending = "done";
    let isError = false;
    try {
      await this.stream(answer, sent, abort.signal);
    } catch (error) {
      ending = abort.signal.aborted ? "stopped" : error.message;
      isError = !abort.signal.aborted;
      if (error.status === 401) this.playground.onLocked();
    }
    clearInterval(timer);
    if (!this.remembers || !answer.data) this.messages.pop();
    else this.messages.push({ role: "assistant", content: answer.data });
    this.say(isError ? ending : `${ending} · ${this.facts()}`, isError);
    this.abort = null;
    this.setBusy(false);
    this.playground.changed();
  }

  setBusy(isBusy) {
    this.part.send.disabled = this.part.clear.disabled = isBusy;
    this.part.stop.disabled = !isBusy;
  }

  async stream(answer, sent, signal) {
    const { log } = this.part;
    this.playground.changed();
    const response = await ask("v1/chat/completions", {
      method: "POST",
      signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: this.playground.model,
        messages: this.messages,
        stream: true,
        temperature: 0.7,
        max_tokens: Number(this.playground.mostTokens),
        service_tier: this.part.tier?.value ?? "default",
      }),
    });
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      this.note(performance.now() / 1000, sent);
      answer.appendData(event.choices[0]?.delta.content ?? "");
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    }
    throw new Error("the stream ended before the answer did");
  }

  note(now, sent) {
    this.tokens += 1;
    if (this.first === null) this.first = now - sent;
    else {
      const gap = now - this.last;
      this.longest = Math.max(this.longest, gap);
      this.gaps.push(gap);
      if (this.gaps.length > GAPS) this.gaps.shift();
    }
    this.last = now;
  }

  facts() {
    if (this.first === null) return "no token";
    const gap = this.gaps.length ? `, longest gap ${duration(this.longest)}` : "";
    return `${plural(this.tokens, "token")}, first after ${duration(this.first)}${gap}`;
  }

  follow(sent) {
    const waited = performance.now() / 1000 - sent;
    this.say(this.first === null ? `waiting for ${duration(waited)}` : this.facts());
    this.drawStrip();
  }

  /** The latest gaps as bars; those that are stalls are red. */
  drawStrip() {
    const { colors } = this.playground;
    if (!colors) return;
    const context = this.strip.clear(colors.panel);
    const { width, height } = this.strip;
    const limit = this.playground.limit();
    const longest = Math.max(0.02, ...this.gaps);
    const most = Math.max(longest * 1.15, limit < longest * 4 ? limit * 1.1 : 0);
    const step = width / GAPS;
    this.gaps.forEach((gap, place) => {
      const tall = Math.max(1, (height * gap) / most);
      context.fillStyle = gap > limit ? colors.stall : colors.decode;
      context.fillRect(place * step, height - tall, Math.max(1, step - 0.6), tall);
    });
    if (!this.gaps.length || limit > most) return;
    context.fillStyle = colors.target;
    context.fillRect(0, Math.round(height - (height * limit) / most), width, 1);
  }
}

class LongLane extends Lane {
  get remembers() {
    return false;
  }

  compose() {
    const words = Number(this.part.length.value);
    return { text: longText(words), shown: `a prompt of about ${count(words)} tokens` };
  }
}

export class Playground {
  /** @param onLocked is called when the server asks for its key. */
  constructor(element, store, onLocked) {
    this.store = store;
    this.onLocked = onLocked;
    this.colors = null;
    this.model = "";
    this.most = element.querySelector("#most-tokens");
    const forms = [...element.querySelectorAll("form.lane")];
    this.lanes = forms.map((form) => new (form.id === "long-lane" ? LongLane : Lane)(form, this));
    this.both = element.querySelector("#both");
    this.both.addEventListener("click", () => this.lanes.slice(0, 2).forEach((lane) => lane.start()));
  }

  get mostTokens() {
    return this.most.value;
  }

  /** Take the model, and the lengths that its context has room for. */
  begin(settings) {
    this.model = settings.model;
    const room = settings.max_model_len - Number(this.mostTokens);
    for (const option of document.querySelectorAll("#long-lane option[data-words]")) {
      option.disabled = Number(option.value) * 1.15 > room;
    }
  }

  limit() {
    return this.store.limit(this.store.settings?.tiers.default?.tbt_s ?? NaN);
  }

  changed() {
    this.both.disabled = this.lanes.slice(0, 2).every((lane) => lane.isBusy);
  }

  draw(colors) {
    this.colors = colors;
    for (const lane of this.lanes) lane.drawStrip();
  }
}
