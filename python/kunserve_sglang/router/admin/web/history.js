// Demand against capacity since the page was opened, with a mark for each drop and restore.

import { byId, setAttribute, setText } from "./dom.js";
import { totals } from "./figures.js";
import { count } from "./format.js";

const KEPT_S = 300;
const WIDTH = 600;
const HEIGHT = 120;
const SVG = "http://www.w3.org/2000/svg";

export class History {
  constructor() {
    this.points = [];
    this.marks = [];
    this.svg = byId("history");
    this.lines = {};
    for (const name of ["marks", "capacity", "demand"]) {
      this.lines[name] = document.createElementNS(SVG, "path");
      this.lines[name].setAttribute("class", name);
      this.svg.append(this.lines[name]);
    }
  }

  add({ instances }, events) {
    const now = Date.now() / 1000;
    const { demand, capacity } = totals(instances);
    this.points.push({ time: now, demand, capacity });
    this.points = this.points.filter(({ time }) => time > now - KEPT_S);
    // Only what lies within the curve: the clock of the router need not be that of the browser.
    const first = this.points[0].time;
    this.marks = events.map(({ time }) => time).filter((time) => time >= first && time <= now);
  }

  show() {
    const last = this.points.at(-1);
    const first = this.points[0].time;
    const span = Math.max(last.time - first, 1);
    const top = 1.1 * Math.max(1, ...this.points.flatMap((p) => [p.demand, p.capacity]));
    const x = (time) => (((time - first) / span) * WIDTH).toFixed(1);
    const y = (value) => (HEIGHT * (1 - value / top)).toFixed(1);
    for (const name of ["capacity", "demand"]) {
      const steps = this.points.map((p) => `${x(p.time)} ${y(p[name])}`);
      setAttribute(this.lines[name], "d", `M${steps.join("L")}`);
    }
    const marks = this.marks.map((time) => `M${x(time)} 0V${HEIGHT}`).join("");
    setAttribute(this.lines.marks, "d", marks || "M0 0");
    this.describe(last, span);
  }

  describe({ demand, capacity }, span) {
    const text = `last ${count(span)} s, up to ${count(Math.max(demand, capacity))} slots now`;
    setText(byId("span"), text);
    const label = `Demand ${count(demand)} against capacity ${count(capacity)} token slots`;
    setAttribute(this.svg, "aria-label", label);
  }
}
