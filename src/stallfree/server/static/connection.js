// Keeps the feed open: says what it is doing, and comes back after a while when it is lost.

import { ask, eventsOf } from "./sse.js";

const SILENT_MS = 6000; // the server says something every second
const FIRST_WAIT_S = 1;
const LONGEST_WAIT_S = 15;

export class Connection {
  /**
   * @param onMessage takes each event.
   * @param onState takes what is known of the connection: `connecting`, `live`, `lost` (with
   *   `seconds` until the next attempt, and why) or `locked` (a key is needed).
   */
  constructor(onMessage, onState) {
    this.onMessage = onMessage;
    this.onState = onState;
    this.replica = null; // whose feed, if there are several
    this.attempts = 0;
    this.timer = null;
    this.abort = null;
  }

  /** Connect to the feed of a replica, now. */
  choose(replica) {
    this.replica = replica;
    this.attempts = 0;
    this.open();
  }

  /** Connect, now. */
  async open() {
    clearTimeout(this.timer);
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.onState({ name: "connecting" });
    let watchdog;
    const feedWatchdog = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENT_MS);
    };
    let reason = "the server ended the connection";
    let wait = 0;
    try {
      feedWatchdog();
      const query = this.replica === null ? "" : `?replica=${this.replica}`;
      const response = await ask(`dashboard/feed${query}`, { signal: abort.signal });
      for await (const data of eventsOf(response)) {
        feedWatchdog();
        if (this.abort !== abort) return;
        const message = JSON.parse(data);
        this.hand(message);
        if (message.type === "snapshot") {
          this.attempts = 0;
          this.onState({ name: "live" });
        }
      }
    } catch (error) {
      if (this.abort !== abort) return;
      if (error.status === 401) {
        this.onState({ name: "locked", reason: error.message });
        return;
      }
      wait = error.retryAfter ?? 0;
      reason = error.status ? error.message : "the server does not answer";
    } finally {
      clearTimeout(watchdog);
    }
    if (this.abort === abort) this.retry(reason, wait);
  }

  /** A fault of the page is not one of the connection. */
  hand(message) {
    try {
      this.onMessage(message);
    } catch (error) {
      reportError(error);
    }
  }

  retry(reason, wait) {
    const backoff = Math.min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** this.attempts);
    const seconds = Math.max(wait, backoff * (0.75 + Math.random() / 2));
    this.attempts += 1;
    this.onState({ name: "lost", reason, seconds });
    this.timer = setTimeout(() => this.open(), seconds * 1000);
  }
}
