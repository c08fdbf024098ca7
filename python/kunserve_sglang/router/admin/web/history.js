// The last half hour: demand against capacity, and who keeps the limits.

import { Chart } from "./chart.js";
import { byId, setText } from "./dom.js";
import { judged, totals } from "./figures.js";
import { count, NOTHING, percent } from "./format.js";

const KEPT_S = 1800;

export class History {
  /** `complete` says whether it knows what the router remembers. */
  constructor() {
    this.complete = false;
    this.points = [];
    this.marks = [];
    this.ahead = 0;
    this.load = new Chart("history", ["capacity", "demand"]);
    this.limits = new Chart("kept-history", ["attainment"]);
  }

  /** Begins with what was before the page was opened, or while the router was out of reach. */
  begin({ now, samples }) {
    this.complete = true;
    // All times are the router's: the clock of the browser may show another.
    this.ahead = now - Date.now() / 1000;
    const since = samples[0]?.time ?? Infinity;
    this.points = [...this.points.filter(({ time }) => time < since), ...samples];
  }

  add({ instances, attainment }, events) {
    const now = Date.now() / 1000 + this.ahead;
    const { demand, capacity } = totals(instances);
    this.points.push({ time: now, demand, capacity, attainment: judged(attainment).share });
    this.points = this.points.filter(({ time }) => time > now - KEPT_S);
    const first = this.points[0].time;
    this.marks = events.map(({ time }) => time).filter((time) => time >= first && time <= now);
  }

  show() {
    const { demand, capacity, attainment } = this.points.at(-1);
    const span = Math.max(this.points.at(-1).time - this.points[0].time, 1);
    const highest = Math.max(1, ...this.points.map((p) => Math.max(p.demand, p.capacity)));
    this.load.draw(this.points, this.marks, 1.1 * highest);
    this.limits.draw(this.points, this.marks, 1.1);
    const slots = `up to ${count(Math.max(demand, capacity))} slots now`;
    setText(byId("span"), `last ${long(span)}, ${slots}`);
    this.load.describe(
      `Demand ${count(demand)} against capacity ${count(capacity)} token slots`,
    );
    const share = attainment === null ? NOTHING : percent(attainment);
    setText(byId("kept-span"), `last ${long(span)}, ${share} now`);
    this.limits.describe(`Requests within their limits: ${share}`);
  }
}

function long(seconds) {
  return seconds < 120 ? `${count(seconds)} s` : `${count(seconds / 60)} min`;
}
