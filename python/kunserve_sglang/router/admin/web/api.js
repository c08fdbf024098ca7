// The router's admin API. Addresses are relative, so that the page works below any prefix.

const READ_TIMEOUT_MS = 5_000;
/** Above what the router allows a vote and an exchange together. */
const TRANSITION_TIMEOUT_MS = 180_000;

/** The router gave an answer, and it was no. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get wantsKey() {
    return this.status === 401;
  }
}

/** There was no answer, or none of the router. */
export class Unreachable extends Error {}

/** What went wrong, by the name of the browser's error. */
const REASONS = {
  TimeoutError: "no answer in time",
  SyntaxError: "something else answers at this address",
};

/** In these variables and nowhere else: they are gone with the page. */
let adminKey = "";
let readKey = "";

export function setAdminKey(key) {
  adminKey = key;
}

/** What opens the calls that only look: the read key, or the admin key. */
export function setReadKey(key) {
  readKey = key;
}

export function read(path) {
  return call(path, { key: readKey || adminKey, timeoutMs: READ_TIMEOUT_MS });
}

export function plan(kind) {
  const key = readKey || adminKey;
  return call("kunserve/plan", { body: { kind }, key, timeoutMs: READ_TIMEOUT_MS });
}

/** Runs a drop or restore to its end; returns its event. */
export function transition(kind, body) {
  const key = adminKey || readKey;
  return call(`kunserve/${kind}`, { body, key, timeoutMs: TRANSITION_TIMEOUT_MS });
}

async function call(path, { body, key, timeoutMs }) {
  let response;
  let answer;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers: headers(body, key),
      cache: "no-store",
      signal: AbortSignal.timeout(timeoutMs),
    });
    answer = await response.json();
  } catch (error) {
    throw new Unreachable(REASONS[error.name] ?? "no connection");
  }
  if (!response.ok) {
    throw new Refused(response.status, answer.error?.message ?? `HTTP ${response.status}`);
  }
  return answer;
}

function headers(body, key) {
  const all = { Accept: "application/json" };
  if (body) all["Content-Type"] = "application/json";
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}
