// The running requests as a table: the timeline for those who read, or hear, rather than look.

import { count, duration, shortId } from "./format.js";

const MOST = 200;

export class Table {
  constructor(details, store) {
    this.details = details;
    this.body = details.querySelector("tbody");
    this.caption = details.querySelector("caption");
    this.store = store;
    details.addEventListener("toggle", () => this.draw());
  }

  draw() {
    if (!this.details.open) return;
    const rows = [...this.store.rows.values()].slice(0, MOST);
    this.caption.textContent = `${count(this.store.rows.size)} requests run or wait`;
    while (this.body.rows.length > rows.length) this.body.deleteRow(-1);
    rows.forEach((row, place) => this.fill(this.body.rows[place] ?? this.insert(), row));
  }

  insert() {
    const line = this.body.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    line.append(head);
    for (let place = 0; place < 6; place++) line.insertCell();
    return line;
  }

  fill(line, row) {
    const texts = [
      shortId(row.id),
      row.tier,
      row.state,
      `${count(Math.min(row.computed, row.prompt))} of ${count(row.prompt)}`,
      count(row.outputs),
      duration(row.worst || null),
      Number.isFinite(row.target) ? duration(row.target) : "none",
    ];
    texts.forEach((text, place) => {
      const cell = line.cells[place];
      if (cell.textContent !== text) cell.textContent = text;
    });
    line.cells[0].title = row.id;
  }
}
