// Tables of Markdown: | a | b | under a row of dashes. After GitHub's rules (https://github.github.com/gfm/#tables-extension-).
import { element } from "./dom.js";
import { inline } from "./inline.js";

const COLUMNS = 30;

/** The texts between the bars of one line. */
export function cells(line) {
  const all = line.trim().split(/(?<!\\)\|/);
  if (all[0] === "") all.shift();
  if (all.length && !all.at(-1).trim()) all.pop();
  return all.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** How each column is aligned, if `line` is the row of dashes under a head of `width` cells; else null. */
export function isDelimiterRow(line, width) {
  const columns = cells(line);
  const fits = line.includes("|") && columns.length === width && width <= COLUMNS;
  if (!fits || !columns.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return columns.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
}

/** An empty table in a frame that scrolls sideways. */
export function tableOf(columns, head) {
  const body = element("tbody");
  const table = element("table");
  let made = 3;
  if (head !== undefined) {
    const thead = element("thead");
    made += tableRow(columns, head, (node) => thead.append(node), "th");
    table.append(thead);
  }
  table.append(body);
  const frame = element("div", "table", table);
  frame.tabIndex = 0;
  return { frame, body, made };
}

/** Hands `put` a row; returns how many elements are in it. */
export function tableRow(columns, line, put, tag = "td") {
  const row = element("tr");
  const texts = cells(line);
  let made = columns.length;
  columns.forEach((alignment, index) => {
    const cell = element(tag, alignment);
    made += inline(texts[index] ?? "", cell);
    row.append(cell);
  });
  put(row);
  return made;
}
