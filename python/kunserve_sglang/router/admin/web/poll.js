// Asks again and again: quickly while somebody looks and it works, slowly otherwise.

const INTERVAL_MS = 1_000;
const HIDDEN_INTERVAL_MS = 15_000;
const LONGEST_PAUSE_MS = 15_000;

/**
 * Calls `ask` until the page is closed. `succeeded` gets what it returned, `failed` the error and
 * the time of the last success, or null.
 */
export class Poller {
  constructor(ask, { succeeded, failed }) {
    this.ask = ask;
    this.succeeded = succeeded;
    this.failed = failed;
    this.failures = 0;
    this.lastSuccess = null;
    this.timer = 0;
    this.asking = false;
    this.again = false;
  }

  start() {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.now();
    });
    window.addEventListener("online", () => this.now());
    this.now();
  }

  /** Ask at once, or as soon as the question under way is answered. */
  async now() {
    if (this.asking) {
      this.again = true;
      return;
    }
    clearTimeout(this.timer);
    this.asking = true;
    this.again = false;
    try {
      await this.turn();
    } finally {
      this.asking = false;
      this.timer = setTimeout(() => this.now(), this.again ? 0 : this.pause());
    }
  }

  async turn() {
    let answer;
    try {
      answer = await this.ask();
    } catch (error) {
      this.failures += 1;
      this.failed(error, this.lastSuccess);
      return;
    }
    this.failures = 0;
    this.lastSuccess = new Date();
    this.succeeded(answer);
  }

  pause() {
    const base = document.hidden ? HIDDEN_INTERVAL_MS : INTERVAL_MS;
    return Math.min(base * 2 ** this.failures, Math.max(base, LONGEST_PAUSE_MS));
  }
}
