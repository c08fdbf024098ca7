// Numbers for people.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const NOTHING = "–";

export function count(value) {
  return whole.format(value);
}

export function percent(share) {
  return `${whole.format(100 * share)} %`;
}

/** Milliseconds with three digits at most, in seconds where that reads better. */
export function duration(ms) {
  if (ms === null || ms === undefined) return NOTHING;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  return ms < 10_000 ? `${(ms / 1000).toFixed(2)} s` : `${(ms / 1000).toFixed(1)} s`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toFixed(1) : value.toFixed(0)} ${units[unit]}`;
}

export function timeOfDay(date) {
  return clock.format(date);
}

export function dateAndTime(date) {
  return day.format(date);
}

/** `instance 3`, `instances 0 and 1`, `instances 0, 1 and 2`. */
export function instances(ids) {
  const last = ids.at(-1);
  if (ids.length === 1) return `instance ${last}`;
  return `instances ${ids.slice(0, -1).join(", ")} and ${last}`;
}

/** Layers `[lo, hi)` as people count them. */
export function layers([lo, hi], total) {
  if (lo === 0 && hi === total) return `all ${total} layers`;
  const range = hi - lo === 1 ? `layer ${lo}` : `layers ${lo} to ${hi - 1}`;
  return total === undefined ? range : `${range} of ${total}`;
}
