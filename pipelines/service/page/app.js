// The chat page: asks /v1/chat/completions as a stream and shows the answer as it comes.
// What a model writes is never HTML here: it only ever becomes text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, content}, as the service wants them
let model = null; // what /v1/models says of the model that is served
let running = null; // AbortController of the answer that is being made
let chats = 0; // begun so far; an answer to an earlier chat is not kept

// ---- text to nodes: paragraphs, ``` blocks and `code`, nothing else

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function paragraph(text) {
  const node = element("p");
  text.split(/`([^`\n]+)`/).forEach((part, index) => {
    if (part) node.append(index % 2 ? element("code", part) : part);
  });
  return node;
}

function render(text) {
  const nodes = [];
  text.split(/^```[^\n]*\n?/m).forEach((part, index) => {
    if (index % 2) {
      const block = element("pre");
      block.append(element("code", part.replace(/\n$/, "")));
      nodes.push(block);
    } else {
      for (const piece of part.split(/\n{2,}/)) if (piece.trim()) nodes.push(paragraph(piece.trim()));
    }
  });
  return nodes.length ? nodes : [element("p", "")];
}

// ---- the service

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function answer(signal, onText) {
  const body = {
    model: model.id,
    messages: turns,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const end = { finish: null, tokens: 0 };
  for await (const data of events(response)) {
    if (data === "[DONE]") return end;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    if (event.usage) end.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      end.finish = choice.finish_reason || end.finish;
    }
  }
  throw new Error("the service broke off in the middle of the answer");
}

// ---- the conversation

function show(role, text) {
  $("empty").hidden = true;
  const node = element("article", undefined, role);
  node.append(...render(text));
  $("chat").append(node);
  $("chat").scrollTop = $("chat").scrollHeight;
  return node;
}

function setBusy(busy) {
  $("chat").setAttribute("aria-busy", String(busy));
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.querySelectorAll(".again").forEach((button) => (button.disabled = busy));
}

function note(node, text, wrong) {
  document.querySelectorAll(".again").forEach((button) => button.remove()); // only the last answer can be made anew
  const line = element("div", undefined, "note");
  line.append(element("span", text, wrong ? "wrong" : ""));
  const again = element("button", "Again", "again");
  again.type = "button";
  again.title = "Ask the same again";
  again.addEventListener("click", () => regenerate(node));
  line.append(again);
  node.append(line);
}

async function reply() {
  const chat = $("chat");
  const node = show("assistant", "");
  node.classList.add("working");
  running = new AbortController();
  setBusy(true);
  const mine = chats;
  let text = "";
  const began = performance.now();
  const onText = (piece) => {
    const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    text += piece;
    node.replaceChildren(...render(text));
    if (atEnd) chat.scrollTop = chat.scrollHeight;
  };
  try {
    const end = await answer(running.signal, onText);
    const speed = end.tokens / ((performance.now() - began) / 1000);
    const cut = end.finish === "length" ? ", cut off at its longest" : "";
    note(node, `${end.tokens} tokens, ${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s${cut}`, false);
  } catch (error) {
    const stopped = error.name === "AbortError";
    note(node, stopped ? "stopped" : error.message, !stopped);
  }
  if (text && mine === chats) turns.push({ role: "assistant", content: text });
  node.classList.remove("working");
  running = null;
  setBusy(false);
  chat.scrollTop = chat.scrollHeight;
  $("question").focus();
}

function ask(question) {
  if (turns.length && turns[turns.length - 1].role === "user") turns.pop(); // its answer never came
  turns.push({ role: "user", content: question });
  show("user", question);
  return reply();
}

function regenerate(node) {
  if (running) return;
  if (turns[turns.length - 1].role === "assistant") turns.pop();
  node.remove();
  reply();
}

function newChat() {
  if (running) running.abort();
  turns.length = 0;
  chats += 1;
  document.querySelectorAll("article").forEach((node) => node.remove());
  $("empty").hidden = false;
  $("question").focus();
}

// ---- the model, and the page's controls

function describe(card) {
  $("name").textContent = document.title = card.id;
  $("temperature").value = card.temperature;
  $("max-tokens").max = card.max_reply_tokens;
  $("max-tokens").value = card.max_reply_tokens;
  const lineage = card.lineage;
  const commit = lineage.commit ? lineage.commit.slice(0, 12) + (lineage.dirty ? " with local changes" : "") : "unknown";
  const rows = [["bundle", lineage.address], ["commit", commit], ["context", `${card.context_length} tokens`]];
  for (const [stage, address] of Object.entries(lineage.inputs)) rows.push([stage, address]);
  for (const [stage, metrics] of Object.entries(lineage.scores)) {
    rows.push([stage, Object.entries(metrics).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`).join(", ")]);
  }
  for (const [name, value] of rows) $("lineage").append(element("dt", name), element("dd", value));
}

function toggle(button, panel) {
  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
  });
}

function showTemperature() {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(2);
}

function send() {
  const question = $("question").value.trim();
  const settings = [...$("settings").querySelectorAll("input")];
  const wrong = settings.find((input) => !input.checkValidity());
  if (wrong) {
    if ($("settings").hidden) $("settings-button").click();
    wrong.reportValidity();
    return;
  }
  if (!question || running || !model) return;
  $("question").value = "";
  ask(question);
}

async function start() {
  toggle($("about-button"), $("about"));
  toggle($("settings-button"), $("settings"));
  $("temperature").addEventListener("input", showTemperature);
  $("new").addEventListener("click", newChat);
  $("stop").addEventListener("click", () => running?.abort());
  $("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  try {
    model = (await (await fetch("/v1/models")).json()).data[0];
  } catch (error) {
    $("status").textContent = "the service does not answer; reload the page when it is up";
    $("status").className = "wrong";
    return;
  }
  describe(model);
  showTemperature();
  const first = new URLSearchParams(location.search).get("ask"); // ?ask=... sends a first question
  if (first) ask(first);
}

start();
