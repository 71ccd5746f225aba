// The service as the page sees it: its model, and an answer as a stream of pieces. Errors come as Trouble, in words.

const TRIES = 6;
const LONGEST_WAIT_S = 120;
const LONGEST_EVENT = 1 << 20; // characters

/** What went wrong, for people. code: "key", "long", "model" or null; broken: in the middle of an answer. */
export class Trouble extends Error {
  constructor(words, { code = null, broken = false } = {}) {
    super(words);
    this.code = code;
    this.broken = broken;
  }
}

export async function servedModel(key) {
  const response = await reach("/v1/models", { headers: headers(key) });
  if (!response.ok) throw (await refusal(response));
  const model = (await response.json()).data?.[0];
  if (!model) throw new Trouble("The service has no model. Try again in a moment.");
  return model;
}

/**
 * Streams one answer; returns {finish, tokens}. Waits and asks again where the service is busy and says for how long.
 * onText(piece); onWait(seconds left), null when it asks again. Throws Trouble, or AbortError if `signal` stopped it.
 */
export async function answer({ body, key, signal, onText, onWait }) {
  const response = await admitted(body, key, signal, onWait);
  const end = { finish: null, tokens: null };
  for await (const data of events(response)) {
    if (data === "[DONE]") return end;
    const event = parsed(data);
    if (event.error) throw new Trouble(`The answer broke off: ${event.error.message}`, { broken: true });
    if (event.usage) end.tokens = event.usage.completion_tokens;
    for (const choice of event.choices ?? []) {
      if (choice.delta?.content) onText(choice.delta.content);
      end.finish = choice.finish_reason || end.finish;
    }
  }
  throw new Trouble("The answer broke off before its end: the connection was lost.", { broken: true });
}

async function admitted(body, key, signal, onWait) {
  const asked = { method: "POST", headers: headers(key), body: JSON.stringify(body), signal };
  for (let tries = 1; ; tries += 1) {
    const response = await reach("/v1/chat/completions", asked);
    if (response.ok) return response;
    const wait = retryAfter(response);
    const trouble = await refusal(response);
    if (wait === null || wait > LONGEST_WAIT_S || tries === TRIES) throw trouble;
    for (let left = wait; left > 0; left -= 1) {
      onWait(left);
      await pause(Math.min(1, left) * 1000, signal);
    }
    onWait(null);
  }
}

function headers(key) {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The service does not answer. It may be starting, or the network is down.");
  }
}

/** Seconds to wait, if the service is busy or starting and names them; else null. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (![429, 503].includes(response.status) || value === null) return null;
  const seconds = /^\d+$/.test(value) ? Number(value) : Math.ceil((Date.parse(value) - Date.now()) / 1000);
  return Number.isFinite(seconds) ? Math.max(1, seconds) : null;
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy's page: its status says all there is to know
  }
  const said = error.message ? ` It says: ${error.message}` : "";
  const { status } = response;
  if (error.code === "context_length_exceeded") return new Trouble("This chat is longer than the model can read." + said, { code: "long" });
  if (error.code === "model_not_found") return new Trouble("The service has another model now.", { code: "model" });
  if (status === 401 || status === 403) return new Trouble("The service wants a valid key: enter it under Settings.", { code: "key" });
  if (status === 413) return new Trouble("This chat is too large to send: begin a new one.");
  if (status === 429) return new Trouble("The service is busy with the questions of others. Try again in a moment.");
  if (status === 503) return new Trouble("The service is starting or has lost the machine that answers. Try again in a moment." + said);
  if (status >= 500) return new Trouble(`The service failed (${status}).${said}`);
  return new Trouble(`The service did not take the question (${status}).${said}`);
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Trouble("The answer broke off: the service sent something that is no answer.", { broken: true });
  }
}

/** The data of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await piece(reader);
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      if (rest.length > LONGEST_EVENT) throw new Trouble("The answer broke off: a piece of it is too large.", { broken: true });
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => null); // whoever leaves early leaves the service, too
  }
}

async function piece(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The answer broke off before its end: the connection was lost.", { broken: true });
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}
