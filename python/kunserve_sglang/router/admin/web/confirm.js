// Asks before a drop or restore: shows what the router's plan would do, and runs just that.

import { plan, Refused, setAdminKey, transition } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { bytes, count, instances, layers } from "./format.js";

const VERBS = { drop: "Drop parameters", restore: "Restore parameters" };

export class Confirmation {
  /** `changed` is called when a transition has ended. */
  constructor(changed) {
    this.changed = changed;
    this.dialog = byId("confirm");
    this.go = byId("confirm-go");
    this.key = byId("admin-key");
    this.running = false;
    /** Counts openings and closings: answers to an earlier one are of no interest any more. */
    this.turn = 0;
    byId("confirm-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.next();
    });
    byId("confirm-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.closed());
  }

  open(kind) {
    this.kind = kind;
    this.plan = null;
    this.turn += 1;
    setText(byId("confirm-title"), `${VERBS[kind]}?`);
    setText(this.go, VERBS[kind]);
    byId("confirm-key").hidden = true;
    byId("confirm-plan").replaceChildren();
    this.showError("");
    this.dialog.showModal();
    byId("confirm-cancel").focus();
    this.next();
  }

  /** A transition that has begun goes on: the event line will say how it ended. */
  closed() {
    this.turn += 1;
    this.key.value = "";
    this.setRunning(false);
  }

  /** The plan first; once it is shown, the transition. */
  async next() {
    if (this.running) return;
    const turn = this.turn;
    if (!byId("confirm-key").hidden) setAdminKey(this.key.value);
    this.setRunning(true);
    this.showError("");
    try {
      await (this.plan ? this.run(turn) : this.ask(turn));
    } catch (error) {
      if (turn === this.turn) this.refused(error);
    } finally {
      if (turn === this.turn) this.setRunning(false);
    }
  }

  async ask(turn) {
    setText(byId("confirm-progress"), "Asking for the plan");
    const answer = await plan(this.kind);
    if (turn !== this.turn) return;
    this.plan = answer;
    byId("confirm-plan").replaceChildren(...describe(answer));
  }

  async run(turn) {
    setText(byId("confirm-progress"), `The ${this.kind} is under way`);
    const event = await transition(this.kind, bodyFor(this.plan));
    this.changed();
    if (turn !== this.turn) return;
    if (event.status === "committed") {
      this.dialog.close();
    } else {
      this.showError(`The ${this.kind} was ${event.status}: ${event.error}`);
    }
  }

  refused(error) {
    if (error instanceof Refused && error.wantsKey) {
      const again = !byId("confirm-key").hidden;
      byId("confirm-key").hidden = false;
      this.key.select();
      this.key.focus();
      this.showError(again ? "The router does not accept this key." : "The admin key is needed.");
    } else {
      this.showError(error.message);
    }
  }

  setRunning(running) {
    this.running = running;
    this.go.disabled = running || (!this.plan && byId("confirm-key").hidden);
    if (!running) setText(byId("confirm-progress"), "");
  }

  showError(text) {
    const place = byId("confirm-error");
    setText(place, text);
    place.hidden = !text;
  }
}

/**
 * Names the instances of the plan, so that what was confirmed is what happens, or nothing. A plan
 * for a drop without a number of tokens is one merge, so its instances are one group.
 */
function bodyFor(shown) {
  return { instances: shown.instances };
}

function describe(shown) {
  const freed = shown.kind === "drop" ? `${bytes(shown.freed_bytes)} of parameters are freed.` : "";
  const change = `${count(shown.capacity_before)} → ${count(shown.capacity_after)} token slots.`;
  const effect = make("p", "effect", `Capacity of ${instances(shown.instances)}: ${change} ${freed}`);
  return [effect, make("ul", "", ...shown.groups.flatMap(describeGroup))];
}

function describeGroup(group) {
  const total = Math.max(...group.layers.map(([, hi]) => hi));
  const shared = group.instances.length > 1 ? ` in a group of ${group.instances.length}` : "";
  return group.instances.map((id, position) => {
    const held = layers(group.layers[position], total);
    return make("li", "", `Instance ${id} will hold ${held}${shared}`);
  });
}
