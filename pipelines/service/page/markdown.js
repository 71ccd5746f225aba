// Markdown to nodes while it is still being written: each line is read once, only the last one is ever redone.
// Paragraphs, headings, lists, quotes, fenced code, tables, rules. No HTML: a tag is text.
// Linear in the text, DEPTH containers deep, and plain text once ELEMENTS are made: no answer can freeze the page.
// Block structure after CommonMark 0.31 (https://spec.commonmark.org), without indented code and setext headings.
import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";
import { cells, isDelimiterRow, tableOf, tableRow } from "./table.js";

const LONG = 4_000; // characters laid out as one; what is longer goes on in a new block
const LINES = 200; // of code laid out as one
const ROWS = 200; // of one table
const DEPTH = 8;
const ELEMENTS = 20_000;

const FENCE = /^ *(`{3,}|~{3,}) *([^`]{0,80})$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const UNDECIDED = /^[\s>]*(?:[-*+_#`|~:=][-*+_#`|~:=\s]*|\d{1,9}[.)]?\s*)?$/; // what such a line will be shows later

export class Markdown {
  #stack = []; // open quotes and list items, outermost first
  #leaf = null; // the open paragraph, code or table
  #rest = ""; // the line that has no end yet
  #glued = false; // the last line was cut because it was long: what follows belongs to it
  #made = 0; // elements
  #preview = null; // how it was before #rest was shown

  constructor(root) {
    this.root = root;
  }

  push(text) {
    this.#takeBack();
    this.#rest += text;
    let from = 0;
    for (;;) {
      const end = this.#rest.indexOf("\n", from);
      const line = end < 0 ? this.#rest.length - from : end - from;
      if (line > LONG) {
        const cut = cutAt(this.#rest, from);
        this.#line(this.#rest.slice(from, cut), false);
        from = cut;
      } else if (end >= 0) {
        this.#line(this.#rest.slice(from, end).replace(/\r$/, ""), true);
        from = end + 1;
      } else {
        break;
      }
    }
    this.#rest = this.#rest.slice(from);
  }

  /** Shows the line that is still being written as if it were whole; the next push takes that back. */
  preview() {
    if (this.#rest && (this.#leaf?.plain || !UNDECIDED.test(this.#rest))) {
      this.#preview = {
        stack: [...this.#stack], leaf: this.#leaf && { ...this.#leaf }, glued: this.#glued, made: this.#made, undo: [],
      };
      this.#line(this.#rest, true, "");
    }
    this.#draw();
  }

  end() {
    this.push("\n");
    this.#draw();
  }

  #takeBack() {
    const before = this.#preview;
    if (!before) return;
    this.#preview = null;
    for (const undo of before.undo.reverse()) undo();
    this.#stack = before.stack;
    this.#leaf = before.leaf;
    this.#glued = before.glued;
    this.#made = before.made;
    if (this.#leaf?.kind === "text") this.#leaf.drawn = null;
  }

  #undo(action) {
    this.#preview?.undo.push(action);
  }

  #put(parent, node) {
    parent.append(node);
    this.#made += 1;
    this.#undo(() => node.remove());
    return node;
  }

  get #inside() {
    return this.#stack.at(-1)?.node ?? this.root;
  }

  #line(line, whole, end = "\n") {
    if (this.#made > ELEMENTS && !this.#leaf?.plain) this.#openPlain();
    if (this.#glued && this.#leaf) {
      this.#glued = !whole;
      this.#more(line, "", whole ? end : "");
      return;
    }
    this.#glued = !whole;
    if (this.#leaf?.kind === "code") {
      this.#codeLine(line, whole ? end : "");
      return;
    }
    const text = line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
    const [depth, rest] = this.#follow(text);
    if (!rest.trim()) {
      this.#close();
      this.#stack.length = depth;
    } else if (this.#leaf?.kind === "text" && depth < this.#stack.length && !this.#begins(rest, depth)) {
      this.#more(rest, "\n"); // a paragraph goes on without the marks of what it stands in
    } else {
      this.#block(depth, rest, whole);
    }
  }

  /** How many of the open containers the line goes on in, and what is left of it. */
  #follow(line) {
    let rest = line;
    for (const [depth, { kind, need, indent }] of this.#stack.entries()) {
      if (kind === "quote") {
        const mark = QUOTE.exec(rest);
        if (!mark) return [depth, rest];
        rest = rest.slice(mark[0].length);
      } else {
        const spaces = rest.search(/[^ ]|$/);
        if (spaces < need && spaces < rest.length) return [depth, rest];
        rest = rest.slice(Math.min(spaces, indent));
      }
    }
    return [this.#stack.length, rest];
  }

  #begins(line, depth) {
    return beginsBlock(line) || (this.#stack[depth].kind === "item" && ITEM.test(line));
  }

  #block(depth, line, whole) {
    let sibling = this.#stack[depth];
    if (sibling) {
      this.#close();
      this.#stack.length = depth;
    }
    let rest = line;
    for (let opened = true; opened && this.#stack.length < DEPTH; ) {
      [opened, rest] = this.#container(rest, sibling);
      if (opened) sibling = null;
    }
    if (!rest.trim()) return;
    if (!whole || !this.#leafOf(rest)) this.#text(rest);
  }

  /** Opens the quote or list item that the line begins with. */
  #container(rest, sibling) {
    const quote = QUOTE.exec(rest);
    if (quote) {
      this.#close();
      this.#stack.push({ kind: "quote", node: this.#put(this.#inside, element("blockquote")) });
      return [true, rest.slice(quote[0].length)];
    }
    const item = RULE.test(rest) ? null : ITEM.exec(rest);
    if (!item || (this.#leaf?.kind === "text" && !/^( *)([-*+]|1[.)]) +\S/.test(rest))) return [false, rest];
    this.#close();
    const [mark, spaces, sign] = item;
    const list = sibling?.kind === "item" && sibling.sign === sign.at(-1) ? sibling.list : this.#openList(sign);
    const node = this.#put(list, element("li"));
    node.dir = "auto";
    const need = spaces.length + 2;
    this.#stack.push({ kind: "item", node, list, sign: sign.at(-1), need, indent: Math.max(need, mark.length) });
    return [true, rest.slice(mark.length)];
  }

  #openList(sign) {
    const list = this.#put(this.#inside, element(sign.length > 1 ? "ol" : "ul"));
    if (sign.length > 1) list.start = Number.parseInt(sign, 10);
    return list;
  }

  /** Makes a heading, rule, code or table of the line; false if it is mere text. */
  #leafOf(rest) {
    const fence = FENCE.exec(rest);
    if (fence) {
      this.#openCode(fence[1], fence[2].trim().split(/\s/, 1)[0], rest.indexOf(fence[1]));
    } else if (RULE.test(rest)) {
      this.#close();
      this.#put(this.#inside, element("hr"));
    } else if (HEADING.test(rest)) {
      this.#close();
      const [mark, marks] = HEADING.exec(rest);
      const node = this.#put(this.#inside, element(`h${Math.min(6, marks.length + 2)}`));
      node.dir = "auto";
      this.#made += inline(rest.slice(mark.length).trim().replace(/ #+$/, ""), node);
    } else {
      return this.#tableOf(rest);
    }
    return true;
  }

  #tableOf(rest) {
    const leaf = this.#leaf;
    if (leaf?.kind === "table" && rest.includes("|")) {
      if (leaf.rows === ROWS) this.#leaf = { ...leaf, ...this.#openTable(leaf.columns), rows: 0 };
      this.#leaf.rows += 1;
      this.#made += tableRow(this.#leaf.columns, rest, (node) => this.#put(this.#leaf.body, node));
      return true;
    }
    if (leaf?.kind !== "text" || leaf.text.includes("\n") || leaf.target !== leaf.node) return false;
    const columns = isDelimiterRow(rest, cells(leaf.text).length);
    if (!columns) return false;
    leaf.node.remove();
    this.#undo(() => this.#inside.append(leaf.node));
    this.#leaf = { kind: "table", columns, ...this.#openTable(columns, leaf.text), rows: 0 };
    return true;
  }

  #openTable(columns, head) {
    const { frame, body, made } = tableOf(columns, head);
    this.#made += made;
    this.#put(this.#inside, frame);
    return { body };
  }

  // ---- text

  #text(rest) {
    if (this.#leaf?.kind === "text") {
      this.#more(rest, "\n");
      return;
    }
    this.#close();
    const node = this.#put(this.#inside, element("p"));
    node.dir = "auto";
    this.#leaf = { kind: "text", node, target: node, text: rest, drawn: null, made: 0 };
  }

  /** Adds to the open leaf. */
  #more(text, between, end = "") {
    const leaf = this.#leaf;
    if (leaf.kind === "code") {
      this.#code(text + end);
    } else if (leaf.kind === "text") {
      if (leaf.text.length + text.length > LONG && !this.#preview) this.#nextChunk(leaf);
      else leaf.text += between;
      leaf.text += text;
    } else {
      this.#close();
      this.#text(text);
    }
  }

  /** What stands is done; the paragraph goes on in a block of its own, so that a long one is not laid out anew. */
  #nextChunk(leaf) {
    this.#draw();
    if (leaf.target === leaf.node) {
      const first = element("span", "chunk");
      first.append(...leaf.node.childNodes);
      leaf.node.append(first);
    }
    leaf.target = this.#put(leaf.node, element("span", "chunk"));
    Object.assign(leaf, { text: "", drawn: null, made: 0 });
  }

  #draw() {
    const leaf = this.#leaf;
    if (leaf?.kind !== "text" || leaf.drawn === leaf.text) return;
    leaf.target.replaceChildren();
    const made = inline(leaf.text, leaf.target);
    this.#made += made - leaf.made;
    Object.assign(leaf, { drawn: leaf.text, made });
  }

  #close() {
    this.#draw();
    this.#leaf = null;
  }

  // ---- code

  #openCode(fence, language, indent) {
    this.#close();
    const code = element("code");
    const pre = element("pre", "", code);
    pre.tabIndex = 0; // it scrolls sideways, so the keyboard must reach it
    const copy = copyButton("Copy this code", () => code.textContent.replace(/\n$/, ""));
    const name = /^[\w+#.-]{1,24}$/.test(language) ? language : "";
    pre.setAttribute("aria-label", name ? `${name} code` : "code");
    this.#put(this.#inside, element("figure", "code", element("figcaption", "", element("span", "", name), copy), pre));
    this.#made += 5; // within that figure
    this.#leaf = { kind: "code", fence, indent, code, ...this.#openChunk(code) };
  }

  /** The rest of the answer as it stands. */
  #openPlain() {
    this.#close();
    this.#stack.length = 0;
    const code = element("code");
    this.#put(this.root, element("pre", "plain", code));
    this.#leaf = { kind: "code", plain: true, indent: 0, code, ...this.#openChunk(code) };
  }

  #openChunk(code) {
    const text = document.createTextNode("");
    this.#put(code, element("span", "chunk", text));
    return { text, lines: 0 };
  }

  #codeLine(line, end) {
    const leaf = this.#leaf;
    if (leaf.plain) {
      this.#code(line + end);
      return;
    }
    let rest = line;
    for (const { kind, indent } of this.#stack) {
      const mark = kind === "quote" ? QUOTE.exec(rest) : null;
      if (kind === "quote" && !mark) { // the quote is over, and with it the code
        this.#close();
        this.#line(line, true, end);
        return;
      }
      rest = mark ? rest.slice(mark[0].length) : unindent(rest, indent);
    }
    const fence = FENCE.exec(rest);
    if (fence && !fence[2].trim() && fence[1].startsWith(leaf.fence)) this.#close();
    else this.#code(unindent(rest, leaf.indent) + end);
  }

  #code(text) {
    const leaf = this.#leaf;
    if (leaf.lines === LINES || leaf.text.length + text.length > LONG + 1) Object.assign(leaf, this.#openChunk(leaf.code));
    const node = leaf.text;
    const length = node.length;
    node.appendData(text);
    this.#undo(() => node.deleteData(length, node.length - length));
    leaf.lines += 1;
  }
}

const beginsBlock = (line) => [QUOTE, HEADING, FENCE, RULE, /^ *([-*+]|1[.)]) +\S/].some((mark) => mark.test(line));

const unindent = (line, spaces) => line.slice(Math.min(spaces, line.search(/[^ ]|$/)));

/** After the last space of the LONG characters from `from`, if it is near their end; never inside a character. */
function cutAt(text, from) {
  const space = text.lastIndexOf(" ", from + LONG - 1);
  if (space > from + LONG - 200) return space + 1;
  const code = text.charCodeAt(from + LONG - 1);
  return code >= 0xd800 && code < 0xdc00 ? from + LONG - 1 : from + LONG;
}
