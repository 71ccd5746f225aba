// Keeps chats and settings in this browser: one entry a chat, so that a damaged one spoils no other.
// Never throws: what cannot be kept or read is told by the value that comes back.
import { checkedChat } from "./tree.js";

const CHAT = "nanochat.chat.";
const SETTINGS = "nanochat.settings";
const KEY = "nanochat.key";

export class Store {
  /** storage: kept for good; session: until the tab closes. null where the browser keeps nothing. */
  constructor(storage, session) {
    this.storage = storage;
    this.session = session;
  }

  /** {chats: newest first, damaged: how many entries are no chat}. */
  chats() {
    const found = this.#names().filter((name) => name.startsWith(CHAT)).map((name) => checkedChat(this.#read(name)));
    const chats = found.filter((chat) => chat).sort((a, b) => b.changed - a.changed);
    return { chats, damaged: found.length - chats.length };
  }

  /** False if this browser has no room for it. */
  keep(chat) {
    return this.#write(CHAT + chat.id, chat);
  }

  forget(chat) {
    this.storage?.removeItem(CHAT + chat.id);
  }

  settings() {
    const kept = this.#read(SETTINGS);
    return kept && typeof kept === "object" && !Array.isArray(kept) ? kept : {};
  }

  keepSettings(settings) {
    return this.#write(SETTINGS, settings);
  }

  key() {
    return this.session?.getItem(KEY) ?? "";
  }

  keepKey(key) {
    try {
      this.session?.setItem(KEY, key);
    } catch {
      // full: it is asked for again
    }
  }

  isChat(name) {
    return name === null || name.startsWith(CHAT); // null: all of it was cleared
  }

  #names() {
    return Array.from({ length: this.storage?.length ?? 0 }, (_, index) => this.storage.key(index));
  }

  #read(name) {
    try {
      return JSON.parse(this.storage?.getItem(name) ?? "null");
    } catch {
      return null; // damaged: counted by chats(), and left as it is
    }
  }

  #write(name, value) {
    try {
      this.storage?.setItem(name, JSON.stringify(value));
      return this.storage !== null;
    } catch {
      return false; // full
    }
  }
}

/** localStorage or sessionStorage, or null where the browser forbids it. */
export function browserStorage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}
