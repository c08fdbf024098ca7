// The memory map: groups, their instances, which layers each holds and what its pages are for.

import { byId, make, reconcile, setAttribute, setText } from "./dom.js";
import { count, instances as named, layers, percent } from "./format.js";

export function showMap(instances) {
  const groups = [...groupsOf(instances).values()];
  reconcile(byId("map"), groups, (group) => group.ids.join(), createGroup, updateGroup);
  byId("map").classList.toggle("empty", groups.length === 0);
}

/** Instances by group. One that has not reported, or is lost, stands alone. */
function groupsOf(instances) {
  const groups = new Map();
  for (const instance of instances) {
    const ids = instance.group ?? [instance.id];
    const key = ids.join();
    if (!groups.has(key)) groups.set(key, { ids, members: [] });
    groups.get(key).members.push(instance);
  }
  for (const { ids, members } of groups.values()) {
    members.sort((one, other) => ids.indexOf(one.id) - ids.indexOf(other.id));
  }
  return groups;
}

function createGroup({ ids }) {
  const title = `group-${ids.join("-")}`;
  const heading = make("h3");
  heading.id = title;
  const group = make("section", "group", heading, make("div", "members"));
  group.setAttribute("aria-labelledby", title);
  return group;
}

function updateGroup(element, { ids, members }) {
  const shared = ids.length > 1;
  const title = shared ? `Group of ${named([...ids].sort((a, b) => a - b))}` : "Full replica";
  setText(element.children[0], title);
  element.classList.toggle("shared", shared);
  const kv = kvShares(members);
  reconcile(
    element.children[1],
    members,
    (member) => member.id,
    createInstance,
    (child, member) => updateInstance(child, member, kv),
  );
}

/** A stage keeps the KV of every owner in its group, so the group decides how full its pages are. */
function kvShares(members) {
  const slots = members.map((member) => member.slots).filter(Boolean);
  const capacity = slots.reduce((total, { capacity }) => total + capacity, 0) || 1;
  return {
    used: slots.reduce((total, { used }) => total + used, 0) / capacity,
    cached: slots.reduce((total, { cached }) => total + cached, 0) / capacity,
  };
}

function createInstance({ id }) {
  const bar = make("div", "pages");
  bar.setAttribute("role", "img");
  const strip = make("div", "layers");
  strip.setAttribute("role", "img");
  const title = make("h4", "", `Instance ${id}`);
  const head = make("div", "title-row", title, make("span", "badge mode"));
  return make(
    "article",
    "instance",
    head,
    strip,
    make("p", "quiet layers-text"),
    bar,
    make("p", "quiet pages-text"),
    make("p", "load-text"),
  );
}

function updateInstance(element, instance, kv) {
  const [head, strip, layersText, bar, pagesText, loadText] = element.children;
  const mode = instance.mode === "dead" && !instance.lost ? "starting" : instance.mode;
  setText(head.children[1], mode);
  head.children[1].dataset.tone = mode;
  element.classList.toggle("lost", Boolean(instance.lost));
  const reported = Boolean(instance.pages);
  for (const part of [strip, layersText, bar, pagesText]) part.hidden = !reported;
  if (reported) {
    showLayers(strip, layersText, instance);
    showPages(bar, pagesText, instance.pages, kv);
  }
  setText(loadText, loadOf(instance));
}

function showLayers(strip, text, { layers: [lo, hi], layer_count: total }) {
  const cells = Array.from({ length: total }, (_, layer) => layer);
  const held = (layer) => layer >= lo && layer < hi;
  reconcile(
    strip,
    cells,
    (layer) => layer,
    () => make("span"),
    (cell, layer) => cell.classList.toggle("held", held(layer)),
  );
  const said = `Holds ${layers([lo, hi], total)}`;
  setAttribute(strip, "aria-label", said);
  setText(text, said);
}

function showPages(bar, text, pages, kv) {
  const used = Math.round(pages.kv * kv.used);
  const cached = Math.min(Math.round(pages.kv * kv.cached), pages.kv - used);
  const parts = [
    { use: "parameters", pages: pages.parameters, name: "parameters" },
    { use: "used", pages: used, name: "KV used" },
    { use: "cached", pages: cached, name: "KV cached" },
    { use: "open", pages: pages.kv - used - cached, name: "KV free" },
    { use: "spare", pages: pages.free, name: "unassigned" },
  ];
  reconcile(
    bar,
    parts,
    (part) => part.use,
    (part) => make("span", part.use),
    (segment, part) => {
      segment.style.flexGrow = part.pages;
      setAttribute(segment, "title", `${part.name}: ${count(part.pages)} pages`);
    },
  );
  const said = parts
    .filter((part) => part.pages > 0)
    .map((part) => `${part.name} ${percent(part.pages / pages.total)}`)
    .join(", ");
  setAttribute(bar, "aria-label", `${count(pages.total)} pages: ${said}`);
  setText(text, `${count(pages.total)} pages: ${said}`);
}

function loadOf(instance) {
  if (instance.lost) return `Lost: ${instance.lost}`;
  return instance.draining ? `Draining. ${reportedLoad(instance)}` : reportedLoad(instance);
}

function reportedLoad(instance) {
  if (instance.plain) {
    const load = instance.in_flight === 1 ? "1 request" : `${count(instance.in_flight)} requests`;
    return `Plain SGLang server${instance.serving ? "" : ", takes no requests yet"}: ${load} under way`;
  }
  if (!instance.slots) return "Has not reported yet";
  const { running, waiting, demand, slots } = instance;
  const serving = instance.serving ? "" : "Takes no requests yet. ";
  return (
    `${serving}${count(running)} running, ${count(waiting)} waiting, ` +
    `demand ${count(demand)} of ${count(slots.capacity)} slots`
  );
}
