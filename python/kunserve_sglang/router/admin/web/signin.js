// Asks for a key where the router wants one even from those who only look.

import { setReadKey } from "./api.js";
import { byId, setText } from "./dom.js";

export class SignIn {
  /** `entered` is called when there is a key to try. */
  constructor(entered) {
    this.form = byId("sign-in");
    this.key = byId("read-key");
    this.tried = false;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      setReadKey(this.key.value);
      this.tried = true;
      entered();
    });
  }

  /** Called after every refusal, so it leaves alone what somebody is typing. */
  ask() {
    if (this.tried) {
      setText(byId("sign-in-error"), "The router does not accept this key.");
      byId("sign-in-error").hidden = false;
      this.key.select();
    }
    this.tried = false;
    if (!this.form.hidden) return;
    this.form.hidden = false;
    this.key.focus();
  }

  /** The key has been accepted, or none is needed. */
  done() {
    this.tried = false;
    this.form.hidden = true;
    this.key.value = "";
    byId("sign-in-error").hidden = true;
  }
}
