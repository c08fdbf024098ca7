// The cluster in a few numbers: demand against capacity, the queue, and how fast answers are.

import { byId, make, reconcile, setText } from "./dom.js";
import { count, duration, NOTHING, percent } from "./format.js";

/** Below this share of requests within their limits it is worth a look. */
const FEW_KEPT = 0.9;

/** Sums over the instances that have reported; what a lost one has is of no use to anybody. */
export function totals(instances) {
  const reported = instances.filter((instance) => instance.slots && !instance.lost);
  const sum = (value) => reported.reduce((total, instance) => total + value(instance), 0);
  return {
    demand: sum((instance) => instance.demand),
    capacity: sum((instance) => instance.slots.capacity),
    used: sum((instance) => instance.slots.used),
    running: sum((instance) => instance.running),
    waiting: sum((instance) => instance.waiting),
    groups: new Set(reported.map((instance) => instance.group.join())).size,
    instances: instances.length,
  };
}

/** All classes together: how many requests, and the share of them that kept their limits, or null. */
export function judged({ classes }) {
  const requests = classes.reduce((total, { requests }) => total + requests, 0);
  const kept = classes.reduce((total, { kept }) => total + kept, 0);
  return { requests, share: requests ? kept / requests : null };
}

export function showFigures({ instances, latency, attainment, queue }) {
  const all = totals(instances);
  const share = all.capacity ? percent(all.demand / all.capacity) : "no capacity";
  const figures = [
    {
      name: "Demand",
      value: count(all.demand),
      note: `${share} of ${count(all.capacity)} slots`,
      warn: all.demand > all.capacity,
    },
    { name: "Running", value: count(all.running), note: `hold ${count(all.used)} slots` },
    { name: "Waiting", value: count(all.waiting), note: "for slots", warn: all.waiting > 0 },
    ...(queue.requests ? [held(queue)] : []),
    {
      name: "Groups",
      value: count(all.groups),
      note: `of ${count(all.instances)} ${all.instances === 1 ? "instance" : "instances"}`,
    },
    { ...quantiles("TTFT", latency.ttft_ms), more: sampleOf(latency) },
    quantiles("TPOT", latency.tpot_ms),
    keeping(attainment),
  ];
  reconcile(byId("figures"), figures, (figure) => figure.name, create, update);
}

/** What the router holds back; nothing is shown of an empty queue, which is the rule. */
function held({ requests, oldest_s: oldest }) {
  return {
    name: "Queued",
    value: count(requests),
    note: `in the router, the oldest for ${duration(1000 * oldest)}`,
    warn: true,
  };
}

function keeping(attainment) {
  const { requests, share } = judged(attainment);
  const kind = requests === 1 ? "request" : "requests";
  const used = attainment.classes.filter((each) => each.requests);
  return {
    name: "Within limits",
    value: share === null ? NOTHING : percent(share),
    note: `of ${count(requests)} ${kind} in ${count(attainment.window_s)} s`,
    more: used.length > 1 ? used.map(ofClass).join(" · ") : "",
    warn: share !== null && share < FEW_KEPT,
  };
}

function ofClass({ name, attainment }) {
  return `${name} ${percent(attainment)}`;
}

function quantiles(name, values) {
  return {
    name,
    value: duration(values.p50),
    note: `p90 ${duration(values.p90)} · p99 ${duration(values.p99)}`,
  };
}

function sampleOf({ samples, window_s: window }) {
  return `median of ${count(samples)} ${samples === 1 ? "stream" : "streams"} in ${count(window)} s`;
}

function create({ name }) {
  return make(
    "div",
    "figure",
    make("dt", "", name),
    make("dd", "value"),
    make("dd", "quiet note"),
    make("dd", "quiet more"),
  );
}

function update(element, { value, note, more = "", warn = false }) {
  const [, number, about, rest] = element.children;
  setText(number, value);
  setText(about, note);
  setText(rest, more);
  rest.hidden = !more;
  element.classList.toggle("warn", warn);
}
