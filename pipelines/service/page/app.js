// The chat page begins here: joins its parts, and the controls that belong to none of them.
import { describe } from "./about.js";
import { servedModel } from "./api.js";
import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { showChats } from "./list.js";
import { Painter } from "./painter.js";
import { Follower } from "./scroll.js";
import { Settings } from "./settings.js";
import { Store, browserStorage } from "./store.js";
import { newChat } from "./tree.js";

class App {
  constructor() {
    this.store = new Store(browserStorage("localStorage"), browserStorage("sessionStorage"));
    this.deleted = new Set(); // ids; an answer that ends later must not bring its chat back
    this.settings = new Settings(this.store, () => this.served(true).catch(() => null)); // served() says it
    const follower = new Follower($("scroller"), $("to-end"));
    this.chat = new Chat({
      page: { log: $("chat"), announcer: $("announcer") },
      settings: this.settings,
      painter: new Painter((paint) => follower.around(paint)),
      follower,
      model: (anew) => this.served(anew),
      changed: (chat) => this.keep(chat),
      busy: (busy) => this.busy(busy),
    });
  }

  async start() {
    this.controls();
    this.keys();
    this.list();
    this.chat.open(this.chats[0] ?? newChat());
    this.list();
    const question = new URLSearchParams(location.search).get("ask"); // only filled in: a link must not ask for its reader
    if (question) $("question").value = question;
    try {
      await this.served();
    } catch {
      // said by served(); the first question tries again
    }
  }

  /** The card of the served model; asked for once, and again after it was replaced. */
  async served(anew = false) {
    if (this.model && !anew) return this.model;
    try {
      this.model = await servedModel(this.settings.key);
    } catch (error) {
      document.body.dataset.state = "down";
      this.say(error.message, true);
      if (error.code === "key") this.settings.askKey();
      throw error;
    }
    this.say("");
    $("name").textContent = document.title = this.model.id;
    this.settings.describe(this.model);
    describe(this.model, $("lineage"));
    if (!this.chat.running) document.body.dataset.state = "ready";
    return this.model;
  }

  keep(chat) {
    if (this.deleted.has(chat.id)) return;
    if (chat.turns.length && !this.store.keep(chat)) {
      this.say("This browser has no room for this chat: it is gone when the page closes. Delete old chats.", true);
    }
    this.list();
  }

  list() {
    const { chats, damaged } = this.store.chats();
    this.chats = chats;
    $("damaged").hidden = damaged === 0;
    $("damaged").textContent = `${damaged} damaged ${damaged === 1 ? "chat is" : "chats are"} not shown.`;
    if ($("chats").querySelector("input")) return; // a name is being written
    showChats($("chats"), chats, this.chat.chat?.id, {
      open: (chat) => this.open(chat),
      rename: (chat, title) => { chat.title = title; this.rename(chat); },
      remove: (chat) => this.remove(chat),
    });
  }

  open(chat) {
    const same = chat.id === this.chat.chat.id;
    if (!same) this.chat.open(chat);
    this.list();
    this.drawer(false);
    $("question").focus();
  }

  /** Another tab has written `key`. */
  elsewhere(key) {
    if (!this.store.isChat(key)) return;
    this.list();
    const other = this.chats.find(({ id }) => id === this.chat.chat.id);
    if (other && !this.chat.running && other.changed > this.chat.chat.changed) this.chat.open(other);
  }

  rename(chat) {
    const shown = this.chat.chat;
    if (shown.id === chat.id) shown.title = chat.title;
    this.keep(shown.id === chat.id ? shown : chat);
  }

  remove(chat) {
    if (chat.id === this.chat.chat.id) this.chat.open(newChat());
    this.deleted.add(chat.id);
    this.store.forget(chat);
    this.list();
    $("new").focus();
  }

  busy(busy) {
    const had = document.activeElement === $("stop");
    document.body.dataset.state = busy ? "busy" : this.model ? "ready" : "down";
    $("chat").setAttribute("aria-busy", String(busy));
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    if (had) $("question").focus();
  }

  say(words, wrong = false) {
    $("status").textContent = words;
    $("status").className = wrong ? "wrong" : "";
  }

  drawer(open) {
    document.body.classList.toggle("drawer", open);
    $("chats-button").setAttribute("aria-expanded", String(open));
  }

  send() {
    const text = $("question").value.trim();
    if (!text || this.chat.running || !this.settings.check()) return;
    $("question").value = "";
    this.chat.ask(text);
  }

  controls() {
    $("chats-button").addEventListener("click", () => this.drawer(!document.body.classList.contains("drawer")));
    $("shade").addEventListener("click", () => this.drawer(false));
    $("new").addEventListener("click", () => this.open(newChat()));
    $("stop").addEventListener("click", () => this.chat.stop());
    for (const name of ["about", "settings"]) $(`${name}-button`).addEventListener("click", () => $(name).showModal());
    $("form").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    for (const idea of document.querySelectorAll(".idea")) {
      idea.addEventListener("click", () => { $("question").value = idea.textContent; $("question").focus(); });
    }
    window.addEventListener("pagehide", () => this.chat.keep());
    window.addEventListener("storage", (event) => this.elsewhere(event.key));
  }

  keys() {
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (document.body.classList.contains("drawer")) { this.drawer(false); $("chats-button").focus(); }
      else this.chat.stop();
    });
  }
}

new App().start();
