// Puts the page together: asks the router once a second and hands the answers to the parts.

import { read, Refused } from "./api.js";
import { Confirmation } from "./confirm.js";
import { byId, setText } from "./dom.js";
import { showEvents } from "./events.js";
import { showFigures } from "./figures.js";
import { duration, percent, timeOfDay } from "./format.js";
import { History } from "./history.js";
import { showMap } from "./map.js";
import { Poller } from "./poll.js";
import { SignIn } from "./signin.js";
import { showTenants } from "./tenants.js";

const EVENTS_SHOWN = 50;

const history = new History();
const actions = { drop: byId("drop"), restore: byId("restore") };
const poller = new Poller(ask, { succeeded: show, failed: showFailure });
const signIn = new SignIn(() => poller.now());
const confirmation = new Confirmation(() => poller.now());

async function ask() {
  const [status, { events }, { tenants }, past] = await Promise.all([
    read("kunserve/status"),
    read(`kunserve/events?limit=${EVENTS_SHOWN}`),
    read("kunserve/tenants"),
    history.complete ? null : read("kunserve/history"),
  ]);
  return { status, events, tenants, past };
}

function show({ status, events, tenants, past }) {
  byId("unreachable").hidden = true;
  signIn.done();
  byId("main").removeAttribute("aria-busy");
  byId("main").classList.remove("stale");
  const running = status.transition;
  setConnection(running ? `${running.kind} in progress` : "live", running ? "busy" : "good");
  showPolicy(status.policy, status.service);
  showFigures(status);
  if (past) history.begin(past);
  history.add(status, events);
  history.show();
  showMap(status.instances);
  showTenants(tenants);
  showEvents(running ? [...events, running] : events);
  setActions(status.instances.some((instance) => instance.group));
}

function showFailure(error, lastSuccess) {
  byId("main").classList.add("stale");
  history.complete = false;
  setActions(false);
  if (error instanceof Refused && error.wantsKey) {
    byId("unreachable").hidden = true;
    setConnection("key needed", "bad");
    signIn.ask();
  } else {
    showUnreachable(error, lastSuccess);
  }
}

function showUnreachable(error, lastSuccess) {
  setConnection("unreachable", "bad");
  const notice = byId("unreachable");
  const since = lastSuccess
    ? `What you see is from ${timeOfDay(lastSuccess)}.`
    : "There is nothing to show yet.";
  const text = `The router cannot be reached: ${error.message}. ${since} It is asked again by itself.`;
  setText(notice, text);
  notice.hidden = false;
}

function setConnection(text, tone) {
  const badge = byId("connection");
  setText(badge, text);
  badge.dataset.tone = tone;
}

function setActions(possible) {
  for (const button of Object.values(actions)) button.disabled = !possible;
}

function showPolicy(policy, service) {
  const drops = `drops when demand exceeds ${percent(policy.drop)} of the capacity`;
  const weighed = service?.weighed
    ? ` and more requests keep their limits that way (${duration(service.ttft_ms)} to the first ` +
      `token, ${duration(service.tpot_ms)} for each after it)`
    : "";
  const text = policy.auto
    ? `Automatic: ${drops}${weighed}, restores below ${percent(policy.restore)}.`
    : "Automatic drops and restores are off.";
  setText(byId("policy"), text);
}

for (const [kind, button] of Object.entries(actions)) {
  button.addEventListener("click", () => confirmation.open(kind));
}
poller.start();
