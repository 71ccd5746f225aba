// What is known of the model that answers: where it came from, and how good it is.
import { element } from "./dom.js";

/** Fills the list `shown` from what /v1/models says. */
export function describe(model, shown) {
  const lineage = model.lineage ?? {};
  const commit = lineage.commit ? lineage.commit.slice(0, 12) + (lineage.dirty ? " with local changes" : "") : "unknown";
  const rows = [
    ["model", model.id],
    ["bundle", lineage.address ?? lineage.key],
    ["key", lineage.key],
    ["commit", commit],
    ["made", model.created && new Date(model.created * 1000).toLocaleString()],
    ["context", model.context_length && `${model.context_length} tokens`],
    ["longest answer", model.max_reply_tokens && `${model.max_reply_tokens} tokens`],
    ...Object.entries(lineage.inputs ?? {}).map(([name, address]) => [`input: ${name}`, address]),
    ...Object.entries(lineage.scores ?? {}).map(([stage, scores]) => [`score: ${stage}`, scores]),
  ];
  const known = rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  shown.replaceChildren(...known.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", inWords(value))]));
}

function inWords(value) {
  if (typeof value === "number") return String(Number(value.toPrecision(4)));
  if (value === null || typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, part]) => `${name} ${inWords(part)}`).join(", ");
}
