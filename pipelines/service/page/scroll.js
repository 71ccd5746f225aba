// Keeps the end of a growing answer in sight, but only for a reader who is there.

const NEAR = 48; // pixels from the end that count as being there

export class Follower {
  constructor(box, toEnd) {
    this.box = box;
    this.toEnd = toEnd; // a button
    box.addEventListener("scroll", () => this.#offer(), { passive: true });
    toEnd.addEventListener("click", () => this.end());
  }

  /** Makes a change; a reader at the end stays at the end. */
  around(change) {
    const there = this.#there();
    change();
    if (there) this.end();
    else this.#offer();
  }

  end() {
    this.box.scrollTop = this.box.scrollHeight;
    this.toEnd.hidden = true;
  }

  #there() {
    return this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < NEAR;
  }

  #offer() {
    this.toEnd.hidden = this.#there();
  }
}
