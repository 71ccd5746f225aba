// A chat as a tree: each turn knows the one it follows, so an edited question or a second answer is a branch.
// `tip` is the last turn of the branch that is shown. Turns are only ever added. Knows no page and no service.
import { randomId } from "./dom.js";

const TITLE = 60; // characters
const STATES = ["whole", "stopped", "broken", "length", "failed"];

export function newChat() {
  return { id: randomId(), title: "", changed: Date.now(), turns: [], tip: null };
}

/** Adds a turn {role, text, ...} behind `parent` and shows it; returns its number. */
export function add(chat, parent, turn) {
  chat.turns.push({ ...turn, parent });
  chat.tip = chat.turns.length - 1;
  chat.changed = Date.now();
  if (!chat.title) chat.title = titleOf(turn.text);
  return chat.tip;
}

/** The numbers of the turns that are shown, first to last; with `tip`, of those up to it. */
export function path(chat, tip = chat.tip) {
  const numbers = [];
  for (let at = tip; at !== null; at = chat.turns[at].parent) numbers.push(at);
  return numbers.reverse();
}

/** All turns in the same place as `at`, oldest first. */
export function versions(chat, at) {
  const { parent } = chat.turns[at];
  return chat.turns.flatMap((turn, number) => (turn.parent === parent ? [number] : []));
}

/** Shows the branch of `at` that was added to last. */
export function show(chat, at) {
  const below = new Set([at]);
  chat.turns.forEach(({ parent }, number) => parent !== null && below.has(parent) && below.add(number));
  chat.tip = Math.max(...below);
}

/** What the model is asked for an answer to turn `at`; a question whose answer never began is left out. */
export function messages(chat, at, system) {
  const turns = path(chat, at).map((number) => chat.turns[number]);
  const first = Math.max(0, turns.findLastIndex((turn) => turn.alone)); // what stands above was too long
  const said = system ? [{ role: "system", content: system }] : [];
  for (let number = first; number < turns.length; number += 1) {
    const answer = turns[number + 1];
    if (answer && answer.state !== "whole" && !answer.text) number += 1;
    else said.push({ role: turns[number].role, content: turns[number].text });
  }
  return said;
}

/** `value` as a chat, or null if it is none: storage is the reader's, and any script of this address could write it. */
export function checkedChat(value) {
  const { id, title, changed, turns, tip } = value ?? {};
  if (typeof id !== "string" || typeof title !== "string" || !Number.isFinite(changed) || !Array.isArray(turns)) return null;
  const fits = (at, before) => at === null || (Number.isInteger(at) && at >= 0 && at < before);
  if (!turns.every((turn, number) => isTurn(turn, turns) && fits(turn.parent, number))) return null;
  return fits(tip, turns.length) && (turns.length === 0) === (tip === null) ? value : null;
}

/** A user's turn follows an answer or nothing, an answer follows a user's. */
function isTurn(turn, turns) {
  if (typeof turn?.text !== "string") return false;
  const before = turns[turn.parent]?.role ?? null;
  if (turn.role === "user") return before !== "user";
  return turn.role === "assistant" && before === "user" && STATES.includes(turn.state);
}

export function titleOf(text) {
  const line = text.trim().split(/\s+/, 20).join(" ");
  return line.length > TITLE ? `${line.slice(0, TITLE - 1).toWellFormed()}…` : line;
}
