// The chat that is shown: asks, shows the answer as it comes, stops, asks again, branches. One answer at a time.
import { Trouble, answer } from "./api.js";
import { element, randomSeed } from "./dom.js";
import { add, messages, path, show, versions } from "./tree.js";
import { Answer, Question } from "./turns.js";

const TEXT = 4_000_000; // characters of one answer; more is stopped
const ANNOUNCED = 2_000; // characters read out at the end

export class Chat {
  #running = null; // {chat, turn, stop: AbortController} of the answer that is being made
  #views = new Map(); // number of a turn -> what shows it

  /** page: {log, announcer}; model(): the card of the served model, may ask for it; changed(chat): keep it. */
  constructor({ page, settings, painter, follower, model, changed, busy }) {
    Object.assign(this, { page, settings, painter, follower, model, changed, busy });
  }

  open(chat) {
    this.stop();
    this.chat = chat;
    this.#render();
    this.follower.end();
  }

  stop() {
    this.#running?.stop.abort();
  }

  /** What there is of the answer, for a page that is about to be closed. */
  keep() {
    if (this.#running) this.changed(this.#running.chat);
  }

  get running() {
    return this.#running !== null;
  }

  ask(text) {
    const { chat } = this;
    const last = chat.turns[chat.tip];
    this.#question(last?.role === "user" ? last.parent : chat.tip, { role: "user", text });
  }

  #question(parent, turn) {
    const at = add(this.chat, parent, turn);
    this.#render();
    return this.#answer(at);
  }

  #answer(question) {
    const asked = { seed: randomSeed(), ...this.settings.sampling() };
    const turn = { role: "assistant", text: "", state: "broken", stats: "", why: "", asked, system: this.settings.system };
    const at = add(this.chat, question, turn);
    this.#render();
    this.follower.end();
    return this.#run(at);
  }

  // ---- what a reader can do with a turn

  #does(at) {
    const { chat } = this;
    const turn = chat.turns[at];
    const idle = (action) => () => (this.running || !this.settings.check() ? false : action());
    const version = (step) => {
      if (this.running) return;
      const all = versions(chat, at);
      show(chat, all[all.indexOf(at) + step]);
      this.changed(chat);
      this.#render();
    };
    if (turn.role === "user") {
      return { version, edit: (text) => idle(() => this.#question(turn.parent, { role: "user", text }))() };
    }
    const more = ["stopped", "broken", "failed"].includes(turn.state) || (turn.state === "length" && turn.asked?.max_tokens);
    const question = chat.turns[turn.parent];
    const alone = () => this.#question(question.parent, { ...question, alone: true });
    return {
      version,
      again: idle(() => this.#answer(turn.parent)),
      resume: more && turn.text ? idle(() => this.#run(at)) : null,
      alone: turn.long ? idle(alone) : null,
    };
  }

  #render() {
    const { chat } = this;
    const wanted = path(chat);
    for (const at of this.#views.keys()) if (this.#views.get(at).turn !== chat.turns[at]) this.#views.delete(at);
    const nodes = wanted.flatMap((at) => {
      const view = this.#view(at, versions(chat, at));
      const cut = chat.turns[at].alone ? [element("p", "cut", "The model does not see what stands above.")] : [];
      return [...cut, view.node];
    });
    this.page.log.replaceChildren(...nodes);
    this.page.log.classList.toggle("blank", nodes.length === 0);
  }

  /** Made anew only where something changed, so that a long chat is not painted again for each question. */
  #view(at, all) {
    const known = this.#views.get(at);
    const place = [all.indexOf(at) + 1, all.length];
    if (known && known.place?.join() === place.join()) return known;
    const turn = this.chat.turns[at];
    const user = turn.role === "user";
    const view = user ? new Question(turn, place, this.#does(at)) : new Answer(turn, place, this.#does(at), this.painter);
    view.place = place;
    if (!user) view.end();
    this.#views.set(at, view);
    return view;
  }

  // ---- the answer

  async #run(at) {
    const { chat } = this;
    const turn = chat.turns[at];
    const view = this.#views.get(at);
    const run = { chat, turn, stop: new AbortController() };
    this.#running = run;
    this.busy(true);
    this.changed(chat);
    const clock = new Clock();
    view.begin();
    view.working("waiting");
    const ticking = setInterval(() => view.say(clock.words()), 1000);
    try {
      const end = await this.#stream(run, view, clock);
      Object.assign(turn, { state: end.finish === "length" ? "length" : "whole", why: "", stats: clock.stats(end.tokens) });
    } catch (error) {
      this.#failed(run, error, clock);
    } finally {
      clearInterval(ticking);
      this.#running = null;
      if (this.chat === chat) view.does = this.#does(at);
      this.follower.around(() => view.end());
      this.busy(false);
      this.changed(chat);
      this.#announce(turn);
    }
  }

  async #stream({ chat, turn, stop }, view, clock) {
    const model = await this.model();
    if (turn.state === "length") delete turn.asked.max_tokens; // continued: up to what the service allows
    const body = {
      model: model.id,
      messages: messages(chat, turn.parent, turn.system),
      stream: true,
      stream_options: { include_usage: true },
      ...turn.asked,
    };
    const joined = new Joined(turn, view);
    return answer({
      body,
      key: this.settings.key,
      signal: stop.signal,
      onWait: (left) => clock.wait(left, (words) => view.say(words)),
      onText: (text) => {
        clock.text();
        joined.push(text);
        if (turn.text.length > TEXT) throw new Trouble("The answer is longer than this page can show.", { broken: true });
      },
    });
  }

  #failed({ chat, turn }, error, clock) {
    const stopped = error.name === "AbortError";
    turn.stats = turn.text ? clock.stats(null) : "";
    turn.state = stopped ? "stopped" : error.broken ? "broken" : "failed";
    turn.why = stopped ? "" : error.message;
    const question = chat.turns[turn.parent];
    turn.long = error.code === "long" && question.parent !== null && !question.alone;
    if (error.code === "key") this.settings.askKey();
    if (error.code === "model") this.model(true).catch(() => null); // the page says why by itself
    if (!stopped && !(error instanceof Trouble)) throw error;
  }

  #announce(turn) {
    const text = turn.text.slice(0, ANNOUNCED);
    this.page.announcer.textContent = [text, turn.state === "whole" ? "" : turn.why || turn.state].join(" ");
  }
}

/** Adds what comes to a turn. A turn that is continued is asked for again with its seed: what stands is passed over. */
class Joined {
  constructor(turn, view) {
    Object.assign(this, { turn, view, passed: 0, old: turn.text });
  }

  push(text) {
    const { turn, view, old } = this;
    const left = old.length - this.passed;
    const known = text.slice(0, left);
    if (left > 0 && !old.startsWith(known, this.passed)) { // another machine or model: the answer begins anew
      turn.text = old.slice(0, this.passed) + text;
      this.old = "";
      view.begin();
      return;
    }
    this.passed += known.length;
    const fresh = text.slice(known.length);
    turn.text += fresh;
    if (fresh) view.push(fresh);
  }
}

/** Times of one answer, in words. */
class Clock {
  #began = performance.now();
  #first = null;
  #last = null;
  #waiting = null; // seconds until it is asked again

  text() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  wait(left, say) {
    this.#waiting = left;
    say(this.words());
  }

  words() {
    if (this.#waiting) return `the service is busy; asking again in ${this.#waiting} s`;
    if (this.#first) return "answering";
    return `waiting ${Math.round((performance.now() - this.#began) / 1000)} s`;
  }

  stats(tokens) {
    if (!this.#first) return "";
    const seconds = (this.#last - this.#began) / 1000; // the wait included: a short answer comes in one piece
    const first = `first after ${((this.#first - this.#began) / 1000).toFixed(2)} s`;
    if (!tokens) return first;
    return [`${tokens} ${tokens === 1 ? "token" : "tokens"}`, `${rounded(tokens / seconds)} tokens/s`, first].join(", ");
  }
}

const rounded = (number) => number.toFixed(number < 10 ? 1 : 0);
