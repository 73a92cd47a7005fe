// Canvases that keep the size of their box, the colors of the theme, and the axis of time.

import { roundUp } from "./format.js";

const COLORS = [
  ...["panel", "line", "text", "soft", "thread", "decode", "prefill", "wait"],
  ...["stall", "target", "predicted", "cursor"],
];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

/** The colors of the theme in force. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(COLORS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export const fontOf = (size) => `${size}px ${FONT}`;

/** A canvas to draw on in CSS pixels. */
export class Surface {
  constructor(canvas, onResize) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.width = this.height = 0;
    new ResizeObserver(() => {
      this.fit();
      onResize();
    }).observe(canvas);
    this.fit();
  }

  fit() {
    const box = this.canvas.getBoundingClientRect();
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    this.width = box.width;
    this.height = box.height;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    this.ratio = ratio;
  }

  /** An empty canvas in the color of the panel. */
  clear(color) {
    const context = this.context;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.globalAlpha = 1;
    context.setLineDash([]);
    context.fillStyle = color;
    context.fillRect(0, 0, this.width, this.height);
    return context;
  }
}

/** From the engine's clock to pixels and back. */
export class TimeAxis {
  constructor(end, span, left, right) {
    Object.assign(this, { end, span, left, right, start: end - span });
    this.scale = (right - left) / span;
  }

  x(time) {
    return this.right - (this.end - time) * this.scale;
  }

  time(x) {
    return this.end - (this.right - x) / this.scale;
  }

  /** Lines and labels every round number of seconds before the end. */
  draw(context, top, bottom, colors) {
    const step = roundUp(this.span / Math.max(2, (this.right - this.left) / 110));
    context.font = fontOf(11);
    context.textBaseline = "top";
    context.textAlign = "center";
    for (let ago = 0; ago <= this.span; ago += step) {
      const x = Math.round(this.x(this.end - ago));
      context.fillStyle = colors.line;
      context.fillRect(x, top, 1, bottom - top);
      context.fillStyle = colors.soft;
      if (ago === 0) context.textAlign = "right";
      else context.textAlign = "center";
      if (x - 24 > this.left) context.fillText(ago === 0 ? "now" : `−${ago} s`, x, bottom + 5);
    }
  }
}

/** A small line of values over time, as wide as its canvas. */
export function sparkline(surface, values, most, color, colors) {
  const context = surface.clear(colors.panel);
  const step = surface.width / Math.max(1, values.length - 1);
  const y = (value) => surface.height - 1 - (surface.height - 3) * Math.min(1, value / (most || 1));
  context.beginPath();
  values.forEach((value, place) => context.lineTo(place * step, y(value)));
  context.strokeStyle = color;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(surface.width, surface.height);
  context.lineTo(0, surface.height);
  context.globalAlpha = 0.14;
  context.fillStyle = color;
  context.fill();
  context.globalAlpha = 1;
}
