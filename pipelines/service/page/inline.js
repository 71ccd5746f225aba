// A paragraph's text to nodes: `code`, **bold**, *italic*, ~~struck~~, [links](https://...) and bare addresses.
// Linear in the text and at most five elements deep, whatever a model writes; a link is http(s) or it stays text.
// Rules after CommonMark 0.31 (https://spec.commonmark.org), less those that need a second look at the text.
import { element } from "./dom.js";

const TOKEN = /\\[!-/:-@[-`{-~]|`+|\*+|_+|~~+|!?\[|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\\n]|\\.){1,500})\]\( ?(https?:\/\/(?:[^\s()<>]|\([^\s()<>]*\)){1,2000})(?: +"[^"\n]{0,200}")? ?\)/iy;
const BARE = /https?:\/\/[^\s<>"'`*[\]()]{1,2000}/iy;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const WORD = /[\p{L}\p{N}]/u;

/** Appends `text` to `parent`; returns how many elements that took. */
export function inline(text, parent, links = true) {
  const items = pair(split(text, links));
  const open = [parent];
  let plain = "";
  let made = 0;
  const put = (node) => {
    if (plain) open.at(-1).append(plain);
    plain = "";
    if (node) open.at(-1).append(node);
  };
  for (const item of items) {
    if (item.tag) {
      const node = element(item.tag);
      put(node);
      open.push(node);
    } else if (item.ends) {
      put(null);
      open.pop();
    } else if (item.code !== undefined) {
      put(element("code", "", item.code));
    } else if (item.address) {
      put(link(item));
    } else {
      plain += item.text;
      continue;
    }
    made += 1;
  }
  put(null);
  return made;
}

/** Text, code, links, and runs of * _ ~ in order. */
function split(text, links) {
  const found = [];
  const scan = new RegExp(TOKEN);
  const closing = backticks(text);
  let from = 0;
  for (let hit = scan.exec(text); hit; hit = scan.exec(text)) {
    const mark = hit[0];
    const [item, end] = read(text, hit.index, mark, closing, links);
    if (!item) continue;
    if (hit.index > from) found.push({ text: text.slice(from, hit.index) });
    found.push(item);
    from = scan.lastIndex = end;
  }
  if (from < text.length) found.push({ text: text.slice(from) });
  return found;
}

/** The item that begins at `start`, and where it ends; [null] if the mark is mere text. */
function read(text, start, mark, closing, links) {
  const end = start + mark.length;
  if (mark[0] === "\\") return [{ text: mark[1] }, end];
  if (mark[0] === "`") {
    const close = closing(mark.length, end);
    return close < 0 ? [null] : [{ code: unpad(text.slice(end, close)) }, close + mark.length];
  }
  if ("*_~".includes(mark[0])) return [run(text, start, end, mark), end];
  const pattern = mark.endsWith("[") ? LINK : BARE;
  pattern.lastIndex = start;
  const hit = links ? pattern.exec(text) : null;
  if (!hit) return [null];
  const [label, address] = hit.length > 1 ? [hit[1], hit[2]] : [null, hit[0].replace(/[.,:;!?]{1,9}$/, "")];
  return URL.canParse(address) ? [{ label, address }, start + (label === null ? address.length : hit[0].length)] : [null];
}

function run(text, start, end, mark) {
  if (mark.length > 3 || (mark[0] === "~" && mark.length !== 2)) return { text: mark };
  const before = text[start - 1] ?? " ";
  const after = text[end] ?? " ";
  const inWord = mark[0] === "_" && WORD.test(before) && WORD.test(after); // snake_case_name
  return { run: mark, opens: !inWord && !/\s/.test(after), closes: !inWord && !/\s/.test(before) };
}

/** Finds a run of exactly `size` backticks at or after a place; asked in order, so each place is passed once. */
function backticks(text) {
  const places = new Map();
  for (const hit of text.matchAll(/`+/g)) {
    if (!places.has(hit[0].length)) places.set(hit[0].length, { all: [], next: 0 });
    places.get(hit[0].length).all.push(hit.index);
  }
  return (size, from) => {
    const known = places.get(size);
    while (known && known.all[known.next] < from) known.next += 1;
    return known?.all[known.next] ?? -1;
  };
}

const unpad = (code) => (code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code);

/** Gives a tag to each run that is closed later, and an end to the one that closes it. The others stay text. */
function pair(found) {
  const items = [];
  const open = new Map(); // "**" -> its place in items; one of a kind is enough
  for (const item of found) {
    if (!item.run) {
      items.push(item);
      continue;
    }
    for (const kind of kinds(item, open)) {
      const start = item.closes ? open.get(kind) : undefined;
      if (start !== undefined && start < items.length - 1) {
        items[start] = { tag: TAGS[kind] };
        items.push({ ends: true });
        for (const [other, place] of open) if (place >= start) open.delete(other);
      } else {
        if (item.opens) open.set(kind, items.length);
        items.push({ text: kind });
      }
    }
  }
  return items;
}

/** Three marks are two and one; where they close, what was opened last is closed first. */
function kinds({ run: mark, closes }, open) {
  if (mark.length < 3) return [mark];
  const both = [mark.slice(2), mark.slice(1)];
  return closes && (open.get(both[0]) ?? -1) < (open.get(both[1]) ?? -1) ? both.reverse() : both;
}

/** Opens elsewhere and cannot reach back; says which machine it leads to where its words do not. */
function link({ label, address }) {
  const node = element("a");
  const { host } = new URL(address);
  node.href = node.title = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.referrerPolicy = "no-referrer";
  if (label === null) node.append(address);
  else inline(label, node, false);
  if (!node.textContent.includes(host)) node.append(element("span", "host", ` (${host})`));
  return node;
}
