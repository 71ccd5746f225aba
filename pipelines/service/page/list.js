// The list of chats: open, rename, delete.
import { button, element } from "./dom.js";

const SURE_MS = 4000; // a second press within it deletes

/** Fills `list` with `chats`. does: {open(chat), rename(chat, title), remove(chat)}. */
export function showChats(list, chats, openId, does) {
  list.replaceChildren(...chats.map((chat) => row(chat, chat.id === openId, does)));
}

function row(chat, isOpen, does) {
  const title = chat.title || "New chat";
  const open = button(title, title, () => does.open(chat), "title");
  open.dir = "auto";
  if (isOpen) open.setAttribute("aria-current", "true");
  const rename = button("Rename", `Rename ${title}`, () => edit(item, chat, does), "small");
  const remove = button("Delete", `Delete ${title}`, () => {
    if (remove.textContent === "Sure?") { does.remove(chat); return; }
    remove.textContent = "Sure?";
    setTimeout(() => (remove.textContent = "Delete"), SURE_MS);
  }, "small delete");
  const item = element("li", "", open, element("span", "tools", rename, remove));
  return item;
}

function edit(item, chat, does) {
  const box = element("input");
  box.value = chat.title;
  box.maxLength = 60;
  box.setAttribute("aria-label", "Name of the chat");
  let over = false;
  const leave = (title) => {
    if (over) return;
    over = true;
    item.replaceChildren();
    does.rename(chat, title.trim() || chat.title);
  };
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") leave(box.value);
    if (event.key === "Escape") leave(chat.title);
  });
  box.addEventListener("blur", () => leave(box.value));
  item.replaceChildren(box);
  box.select();
}
