// One turn of a chat on the page: its text, what became of it, and what the reader can do with it.
import { button, copyButton, element } from "./dom.js";

const CHUNK = /.{1,8000}/gsu; // laid out as one

/** A question. does: {edit(text), version(step)}; place: [number, of how many versions]. */
export class Question {
  constructor(turn, place, does) {
    this.turn = turn;
    this.does = does;
    this.body = element("div", "body", ...plain(turn.text));
    this.body.dir = "auto";
    this.foot = element(
      "div", "foot", ...switcher(place, does),
      copyButton("Copy the question", () => turn.text),
      button("Edit", "Ask it in other words; what followed is kept as another version", () => this.#edit(), "edit"),
    );
    this.node = element("article", "user", this.body, this.foot);
    this.node.setAttribute("aria-label", "You");
  }

  #edit() {
    const box = element("textarea", "rewrite");
    box.value = this.turn.text;
    box.setAttribute("aria-label", "Your question");
    const leave = () => { form.replaceWith(this.body, this.foot); this.foot.querySelector(".edit").focus(); };
    const send = () => box.value.trim() && this.does.edit(box.value.trim()) !== false;
    const form = element("div", "form", box, element("div", "foot", button("Send", "", send, "main"), button("Cancel", "", leave)));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    this.foot.remove();
    this.body.replaceWith(form);
    box.focus();
  }
}

/** An answer. does: {again(), resume() or null, alone() or null, version(step)}. */
export class Answer {
  constructor(turn, place, does, painter) {
    this.turn = turn;
    this.place = place;
    this.does = does;
    this.painter = painter;
    this.said = element("span", "said");
    this.foot = element("div", "foot", this.said);
    this.node = element("article", "assistant", element("div", "body"), this.foot);
    this.node.setAttribute("aria-label", "Answer");
    this.begin();
  }

  get body() {
    return this.node.firstChild;
  }

  /** Shows the turn's text from its start; more may follow. */
  begin() {
    this.body.replaceWith(element("div", "body"));
    this.sheet = this.painter.open(this.body);
    if (this.turn.text) this.sheet.push(this.turn.text);
  }

  /** More of the answer. */
  push(text) {
    this.sheet.push(text);
  }

  working(words) {
    this.node.classList.add("working");
    this.said.className = "said";
    this.say(words);
    this.foot.replaceChildren(this.said);
  }

  say(words) {
    if (this.said.textContent !== words) this.said.textContent = words;
  }

  /** Nothing more comes: says how it ended and offers what can be done. */
  end() {
    const { turn, does } = this;
    this.sheet.end();
    this.node.classList.remove("working");
    this.said.className = ["broken", "failed"].includes(turn.state) ? "said wrong" : "said";
    this.say(outcome(turn));
    const offers = switcher(this.place, does);
    if (turn.text) offers.push(copyButton("Copy the answer", () => turn.text));
    if (does.resume) offers.push(button("Continue", "Go on where it broke off", does.resume, "again resume"));
    if (does.alone) offers.push(button("Ask without what stands above", "The model then sees only the last question", does.alone, "again alone"));
    const name = turn.state === "failed" ? "Try again" : "Again";
    offers.push(button(name, "Answer the same question anew", does.again, "again anew"));
    this.foot.replaceChildren(...offers, this.said);
  }
}

function outcome({ state, stats, why }) {
  const said = {
    whole: "",
    stopped: "stopped",
    length: "cut off at its longest",
    broken: why || "The answer broke off before its end.",
    failed: why || "The service did not answer.",
  };
  return [stats, said[state]].filter((part) => typeof part === "string" && part).join(" · ");
}

/** ‹ 2/3 › where there are several versions. */
function switcher([number, all], does) {
  if (all < 2) return [];
  const before = button("‹", "The version before", () => does.version(-1), "again");
  const next = button("›", "The next version", () => does.version(1), "again");
  before.disabled = number === 1;
  next.disabled = number === all;
  return [element("span", "versions", before, `${number}/${all}`, next)];
}

const plain = (text) => (text.match(CHUNK) ?? []).map((part) => element("span", "chunk", part));
