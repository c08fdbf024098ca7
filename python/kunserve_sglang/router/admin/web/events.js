// The event line: every drop and restore, the latest first, with its reason and what came of it.

import { byId, make, reconcile, setAttribute, setText } from "./dom.js";
import { bytes, count, dateAndTime, duration, instances, timeOfDay } from "./format.js";

/** `events` as the router has them, the oldest first. */
export function showEvents(events) {
  const latestFirst = [...events].reverse();
  reconcile(byId("events"), latestFirst, (event) => event.epoch, create, update);
  byId("events").classList.toggle("empty", events.length === 0);
}

function create(event) {
  const date = new Date(1000 * event.time);
  const time = make("time", "quiet", timeOfDay(date));
  time.dateTime = date.toISOString();
  time.title = dateAndTime(date);
  const what = make("strong", "", `${event.kind} of ${instances(event.instances)}`);
  const head = make("p", "head", time, " ", what, " ", make("span", "badge"));
  const rest = ["reason", "quiet", "error", "quiet"].map((name) => make("p", name));
  return make("li", "event", head, ...rest);
}

function update(element, event) {
  const [head, reason, outcome, error, compared] = element.children;
  const badge = head.querySelector(".badge");
  setText(badge, event.status);
  setAttribute(badge, "data-tone", event.status);
  setText(reason, `Reason: ${event.reason}`);
  setText(outcome, outcomeOf(event));
  outcome.hidden = event.status !== "committed";
  setText(error, event.error);
  error.hidden = !event.error;
  const choices = event.decision?.choices ?? [];
  setText(compared, choices.map(choiceOf).join(" · "));
  compared.hidden = choices.length === 0;
}

/** One of the ways that the planner compared, the chosen one with a check mark. */
function choiceOf({ what, slots, verdict, chosen }) {
  const gain = `${slots < 0 ? "−" : "+"}${count(Math.abs(slots))} slots`;
  return `${chosen ? "✓ " : ""}${what} (${gain}): ${verdict}`;
}

export function outcomeOf(event) {
  const moved = [
    ["freed", event.freed_bytes],
    ["loaded", event.loaded_bytes],
    ["KV moved", event.exchanged_bytes],
  ]
    .filter(([, amount]) => amount > 0)
    .map(([what, amount]) => `${bytes(amount)} ${what}`);
  return [
    `capacity ${count(event.capacity_before)} → ${count(event.capacity_after)} slots`,
    `took ${duration(event.duration_ms)}, serving stood still for ${duration(event.stall_ms)}`,
    ...moved,
  ].join(" · ");
}
