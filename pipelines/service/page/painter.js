// Shows texts as they come: once a frame, a bounded piece at a time, so that the page answers while it paints.
import { Markdown } from "./markdown.js";

const FRAME_MS = 8; // of reading; laying out comes on top
const FRAME_CHARACTERS = 16_000;
const PIECE = 4_000;

export class Painter {
  #waiting = new Set();
  #asked = false;

  /** around(paint) calls paint() once, between whatever must be done before and after a change. */
  constructor(around) {
    this.around = around;
  }

  /** A sheet shows one text in `node`. */
  open(node) {
    return new Sheet(new Markdown(node), (sheet) => this.#want(sheet));
  }

  #want(sheet) {
    this.#waiting.add(sheet);
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => this.#frame());
  }

  #frame() {
    this.#asked = false;
    const end = performance.now() + FRAME_MS;
    let left = FRAME_CHARACTERS;
    this.around(() => {
      for (const sheet of this.#waiting) {
        left = sheet.paint(left, end);
        if (!sheet.unpainted) this.#waiting.delete(sheet);
        if (left <= 0 || performance.now() > end) break;
      }
    });
    for (const sheet of this.#waiting) this.#want(sheet);
  }
}

class Sheet {
  #queue = [];
  #next = 0; // of #queue
  #from = 0; // in that text
  #ended = false;

  constructor(markdown, want) {
    this.markdown = markdown;
    this.want = want;
  }

  get unpainted() {
    return this.#next < this.#queue.length || this.#ended;
  }

  push(text) {
    this.#queue.push(text);
    this.want(this);
  }

  end() {
    this.#ended = true;
    this.want(this);
  }

  /** Paints up to `most` characters, until `end`; returns how many more it could have painted. */
  paint(most, end) {
    let left = most;
    while (this.#next < this.#queue.length && left > 0 && performance.now() < end) {
      const text = this.#queue[this.#next];
      const piece = text.slice(this.#from, this.#from + PIECE);
      this.markdown.push(piece);
      left -= piece.length;
      this.#from += piece.length;
      if (this.#from < text.length) continue;
      this.#queue[this.#next] = "";
      this.#next += 1;
      this.#from = 0;
    }
    if (this.#next < this.#queue.length || !this.#ended) {
      this.markdown.preview();
    } else {
      this.markdown.end();
      this.#ended = false;
    }
    return left;
  }
}
