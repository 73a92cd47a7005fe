// The copies of the model, where there are several: how busy each is, and which one is shown.

import { plural } from "./format.js";

export class Replicas {
  /**
   * @param element holds a button for each.
   * @param onChoice takes the place of the one that is to be shown.
   */
  constructor(element, onChoice) {
    this.element = element;
    this.onChoice = onChoice;
    this.buttons = new Map(); // by place
  }

  /** Show what the server says of them; `shown` is the one whose records come. */
  take(replicas, shown) {
    this.element.hidden = replicas.length === 0;
    for (const each of replicas) {
      const button = this.buttons.get(each.replica) ?? this.add(each.replica);
      const text = `Replica ${each.replica}: ${stateOf(each)}`;
      if (button.textContent !== text) button.textContent = text;
      button.disabled = !each.ready;
    }
    const known = new Set(replicas.map((each) => each.replica));
    for (const [place, button] of this.buttons) {
      button.setAttribute("aria-pressed", String(place === shown));
      if (known.has(place)) continue;
      button.textContent = `Replica ${place}: lost`;
      button.disabled = true;
    }
  }

  add(place) {
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", () => this.onChoice(place));
    this.buttons.set(place, button);
    const places = [...this.buttons.keys()].sort((a, b) => a - b);
    this.element.append(...places.map((each) => this.buttons.get(each)));
    return button;
  }
}

function stateOf({ ready, running, waiting }) {
  if (!ready) return "loading";
  return `${plural(running, "request")} running, ${waiting} waiting`;
}
