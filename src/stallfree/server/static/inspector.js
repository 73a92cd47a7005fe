// What is under the pointer, or under the cursor that the arrow keys move, in words.

import { count } from "./format.js";

export class Inspector {
  /**
   * @param tip the tooltip; `spoken` is its text for screen readers.
   * @param onChange is called when something else is inspected.
   */
  constructor(requests, iterations, tip, spoken, onChange) {
    this.requests = requests;
    this.iterations = iterations;
    this.tip = tip;
    this.spoken = spoken;
    this.onChange = onChange;
    this.target = null; // {view, byKey, x, y} or {view, byKey, time, place}
    for (const view of [requests, iterations]) {
      const { canvas } = view.surface;
      canvas.addEventListener("pointermove", (event) => this.point(view, event));
      canvas.addEventListener("pointerdown", (event) => this.point(view, event));
      canvas.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse") this.clear();
      });
      canvas.addEventListener("keydown", (event) => this.press(view, event));
      canvas.addEventListener("blur", () => this.clear());
    }
  }

  point(view, event) {
    const box = view.surface.canvas.getBoundingClientRect();
    this.target = { view, byKey: false, x: event.clientX - box.left, y: event.clientY - box.top };
    this.onChange();
  }

  clear() {
    if (!this.target) return;
    this.target = null;
    this.tip.hidden = true;
    this.onChange();
  }

  press(view, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key === "Escape") {
      this.clear();
    } else if (steps !== undefined) {
      this.step(view, steps * (event.shiftKey ? 10 : 1));
    } else if (rows !== undefined && view === this.requests) {
      this.step(view, 0, rows);
    } else if (event.key === "Home" || event.key === "End") {
      this.step(view, event.key === "Home" ? -Infinity : Infinity);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Move the cursor by iterations, or by rows. */
  step(view, steps, rows = 0) {
    const { iterations } = this.iterations.store;
    const axis = this.axis;
    if (!axis || !iterations.count) return;
    const [first] = this.iterations.inSight(axis);
    const stop = iterations.find((each) => each.end > axis.end); // the cursor is at the end of one
    if (first >= stop) return;
    const now = this.target?.byKey && this.target.view === view ? this.target : null;
    const last = now?.number ?? stop;
    const number = Math.max(first, Math.min(stop - 1, last + steps));
    const place = Math.max(0, Math.min(this.requests.shown.length - 1, (now?.place ?? 0) + rows));
    this.target = { view, byKey: true, number: now || steps ? number : stop - 1, place };
    this.onChange();
    this.speak();
  }

  /** The time and the row to mark, on this axis. Updates the tooltip. */
  cursor(axis) {
    this.axis = axis;
    const target = this.target;
    if (!target) return null;
    const found = target.byKey ? this.byKey(target, axis) : this.byPointer(target, axis);
    if (!found || found.time < axis.start || found.time > axis.end) {
      this.tip.hidden = true;
      return null;
    }
    this.show(target.view, found);
    return found;
  }

  byPointer({ view, x, y }, axis) {
    if (x < axis.left || x > axis.right) return null;
    const time = axis.time(x);
    if (view === this.requests) {
      const row = this.requests.rowAt(y);
      return row && { time, row, x, y, ...this.requests.describe(row, time, axis) };
    }
    const number = this.iterations.numberAt(time, axis);
    if (number === null) return null;
    return { time, x, y, ...this.iterations.describe(this.iterations.store.iterations.at(number)) };
  }

  byKey({ view, number, place }, axis) {
    const { iterations } = this.iterations.store;
    if (number < iterations.first || number >= iterations.count) return null;
    const iteration = iterations.at(number);
    const time = iteration.end;
    const x = axis.x(time);
    if (view === this.iterations) return { time, x, y: 40, ...this.iterations.describe(iteration) };
    const shown = this.requests.shown[place];
    if (!shown) return null;
    const { row, y, height } = shown;
    return { time, row, x, y: y + height, ...this.requests.describe(row, time, axis) };
  }

  show(view, { title, lines, x, y }) {
    const tip = this.tip;
    const text = [title, ...lines].join("\n");
    if (tip.dataset.text !== text) {
      tip.dataset.text = text;
      tip.replaceChildren(
        ...[title, ...lines].map((line, place) => {
          const element = document.createElement(place ? "span" : "strong");
          element.textContent = line;
          return element;
        }),
      );
    }
    tip.hidden = false;
    const canvas = view.surface.canvas.getBoundingClientRect();
    const left = canvas.left + x + 14;
    const width = tip.offsetWidth;
    const isRight = left + width > document.documentElement.clientWidth - 8;
    tip.style.left = `${Math.max(8, isRight ? canvas.left + x - width - 14 : left)}px`;
    const top = canvas.top + y + 14;
    const isLow = top + tip.offsetHeight > window.innerHeight - 8;
    tip.style.top = `${Math.max(8, isLow ? canvas.top + y - tip.offsetHeight - 14 : top)}px`;
  }

  speak() {
    const found = this.axis && this.target ? this.byKey(this.target, this.axis) : null;
    if (!found) return;
    const ago = Math.max(0, this.axis.end - found.time);
    this.spoken.textContent = [found.title, `${count(ago)} s ago`, ...found.lines].join(", ");
  }
}
