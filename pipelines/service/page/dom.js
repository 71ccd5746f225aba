// Small helpers to make nodes. Text only ever becomes text nodes: nothing in this folder makes HTML from a string.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export function button(text, title, onClick, className) {
  const node = element("button", className, text);
  node.type = "button";
  node.title = title;
  node.addEventListener("click", onClick);
  return node;
}

/** A button that copies what `text()` gives at the time, and says whether it could. */
export function copyButton(title, text) {
  const node = button("Copy", title, async () => {
    const done = await copy(text());
    node.textContent = done ? "Copied" : "Not allowed";
    setTimeout(() => (node.textContent = "Copy"), 1500);
  }, "copy");
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // plain HTTP from another machine has no clipboard API
  }
}

function copyBySelection(text) {
  const box = element("textarea", "hidden");
  const focused = document.activeElement;
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}

/** Random and not a secret; crypto.randomUUID is missing on plain HTTP. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint32Array(2))].map((word) => word.toString(36)).join("");
}

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}
