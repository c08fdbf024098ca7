// Curves over time in an SVG of index.html, with a mark for each drop and restore.

import { byId, setAttribute } from "./dom.js";

const WIDTH = 600;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  /** `curves` are the values of points that are drawn, from the lowest to the uppermost. */
  constructor(id, curves) {
    this.svg = byId(id);
    this.height = this.svg.viewBox.baseVal.height;
    this.curves = curves;
    this.lines = {};
    for (const name of ["marks", ...curves]) {
      this.lines[name] = document.createElementNS(SVG, "path");
      this.lines[name].setAttribute("class", name);
      this.svg.append(this.lines[name]);
    }
  }

  /** `marks` are times; a curve is interrupted where it has no value. */
  draw(points, marks, top) {
    const first = points[0].time;
    const span = Math.max(points.at(-1).time - first, 1);
    const x = (time) => (((time - first) / span) * WIDTH).toFixed(1);
    const y = (value) => (this.height * (1 - value / top)).toFixed(1);
    for (const name of this.curves) {
      let pen = "M";
      const steps = points.map((point) => {
        if (point[name] === null) {
          pen = "M";
          return "";
        }
        const step = `${pen}${x(point.time)} ${y(point[name])}`;
        pen = "L";
        return step;
      });
      setAttribute(this.lines[name], "d", steps.join("") || "M0 0");
    }
    const lines = marks.map((time) => `M${x(time)} 0V${this.height}`).join("");
    setAttribute(this.lines.marks, "d", lines || "M0 0");
  }

  describe(text) {
    setAttribute(this.svg, "aria-label", text);
  }
}
