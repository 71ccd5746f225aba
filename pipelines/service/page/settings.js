// The settings: read from their form, remembered, and put into the body of a request. An empty field is left to the service.
// The key is remembered by this tab alone, and its field shown once the service has asked for one.
import { $ } from "./dom.js";

const NUMBERS = { temperature: "temperature", "top-p": "top_p", "top-k": "top_k", "max-tokens": "max_tokens", seed: "seed" };
const FIELDS = [...Object.keys(NUMBERS), "system"];

export class Settings {
  constructor(store, onKey) {
    this.store = store;
    $("key").value = store.key();
    $("key-label").hidden = !this.key;
    $("key").addEventListener("change", () => { store.keepKey(this.key); onKey(); });
    const kept = store.settings();
    for (const id of FIELDS) if (typeof kept[id] === "string") $(id).value = kept[id];
    $("theme").value = ["light", "dark"].includes(kept.theme) ? kept.theme : "";
    $("settings-form").addEventListener("input", () => this.#changed());
    $("reset").addEventListener("click", () => this.#reset());
    this.#changed();
  }

  /** What a field means if it is empty, and what the service allows. */
  describe(model) {
    $("temperature").placeholder = model.temperature ?? 1;
    $("max-tokens").placeholder = model.max_reply_tokens ?? "";
    if (model.max_reply_tokens) $("max-tokens").max = model.max_reply_tokens;
  }

  get system() {
    return $("system").value.trim();
  }

  get key() {
    return $("key").value.trim();
  }

  /** The service wants a key that it knows. */
  askKey() {
    $("key-label").hidden = false;
    this.show();
    $("key").select();
  }

  /** Sampling as the service wants it. */
  sampling() {
    const filled = Object.entries(NUMBERS).filter(([id]) => $(id).value !== "");
    return Object.fromEntries(filled.map(([id, name]) => [name, Number($(id).value)]));
  }

  /** True if every field holds what the service can take; else shows the one that does not. */
  check() {
    const wrong = Object.keys(NUMBERS).map($).find((input) => !input.checkValidity());
    if (!wrong) return true;
    this.show();
    wrong.reportValidity();
    return false;
  }

  show() {
    if (!$("settings").open) $("settings").showModal();
  }

  #reset() {
    for (const id of FIELDS) $(id).value = "";
    this.#changed();
  }

  #changed() {
    const theme = $("theme").value;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    this.store.keepSettings({ ...Object.fromEntries(FIELDS.map((id) => [id, $(id).value])), theme });
  }
}
