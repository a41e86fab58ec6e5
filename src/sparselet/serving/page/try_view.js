// Try: one prompt, several answers side by side as they are decoded; who answered and why; tokens that differ.

import { byId, element, percent } from "./dom.js";
import { errorOf, mergeFields, onChange, request, state } from "./state.js";

let running = null;  // the AbortController of the answers that are being decoded
const left_out = new Set();  // answerers that the user has unmarked

export function startTry() {
  byId("ask").addEventListener("click", ask);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  onChange(draw);
}

/** Who can answer: a label, and the fields of the request. */
function answerers() {
  const single = name => ({ label: name, fields: { model: name } });
  return [
    single("base"),
    ...state.chosen.map(single),
    ...(state.chosen.length > 1 ? [{ label: `merge by ${state.method}`, key: "merge", fields: { model: "merge", ...mergeFields() } }] : []),
    ...(state.library.can_route ? [{ label: "route", fields: { model: "route" } }] : []),
  ];
}

const keyOf = answerer => answerer.key ?? answerer.label;

function draw() {
  const box = answerer => element("label", { class: "inline" },
    element("input", { type: "checkbox", "data-answerer": keyOf(answerer), ...(!left_out.has(keyOf(answerer)) && { checked: true }),
      change: event => left_out[event.target.checked ? "delete" : "add"](keyOf(answerer)) }), answerer.label);
  byId("answerers").replaceChildren(element("legend", {}, "Who answers"), element("div", {}, ...answerers().map(box)));
}

async function ask() {
  const asked = answerers().filter(answerer => !left_out.has(keyOf(answerer)));
  const content = byId("prompt").value;
  if (running || !asked.length || !content.trim()) return;
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  const columns = asked.map(answerer => column(answerer.label));
  byId("answers").replaceChildren(...columns.map(each => each.root));
  const before = await swaps();
  const tokens = Math.max(1, Math.floor(byId("tokens").valueAsNumber || 64));
  const body = { messages: [{ role: "user", content }], max_tokens: tokens, stream: true, stream_options: { include_usage: true } };
  const parts = await Promise.all(asked.map((answerer, i) =>
    stream({ ...body, ...answerer.fields }, columns[i], running.signal).catch(error => {
      columns[i].why.textContent = error.name === "AbortError" ? "stopped" : error.message;
      columns[i].why.classList.toggle("bad", error.name !== "AbortError");
      return null;
    })));
  markDifferences(columns, parts);
  showSwaps(before, await swaps());
  running = null;
  byId("ask").disabled = false;
  byId("stop").disabled = true;
}

function column(label) {
  const text = element("div", { class: "text" }), why = element("p", { class: "why" }, "waiting");
  return { root: element("article", { class: "answer", "aria-label": label }, element("h3", {}, label), text, why), text, why };
}

/** The parts of an answer's text, shown as they come. Throws an Error with the server's message. */
async function stream(body, column, signal) {
  const began = performance.now();
  const response = await request("/v1/chat/completions", { body, signal });
  if (!response.ok) throw new Error(await errorOf(response));
  const parts = [], about = {};
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices?.[0]?.delta?.content;
    if (text) {
      about.first ??= performance.now() - began;
      parts.push(text);
      column.text.append(text);
    }
    Object.assign(about, { model: event.model, digest: event.system_fingerprint });
    if (event.route) about.route = event.route;
    if (event.usage) about.tokens = event.usage.completion_tokens;
  }
  if (!parts.length) column.text.append(element("span", { class: "muted" }, "an empty answer"));
  column.why.textContent = describe(about, performance.now() - began);
  return parts;
}

function describe({ model, digest, route, tokens, first }, total) {
  const chosen = route && `chosen ${route.expert} by a margin of ${percent(route.margin)}${route.unsure ? ", unsure" : ""}`;
  const speed = tokens > 1 && first && total > first ? `${((tokens - 1) / (total - first) * 1000).toFixed(1)} tokens/s` : null;
  return [chosen ?? `answered by ${model}`, digest?.slice(0, 8), `${tokens} token${tokens === 1 ? "" : "s"}`,
    first && `first after ${Math.round(first)} ms`, speed]
    .filter(Boolean).join(" · ");
}

/** The JSON of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks)
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
  }
}

/** Mark the tokens of each answer that are not in the longest common subsequence with the first answer's. */
function markDifferences(columns, parts) {
  const reference = parts.find(Boolean);
  if (!reference) return;
  columns.forEach(({ text }, i) => {
    if (!parts[i] || parts[i] === reference) return;
    const kept = inCommon(reference, parts[i]);
    text.replaceChildren(...parts[i].map((part, j) => kept.has(j) ? part : element("mark", {}, part)));
  });
}

/** An answer may begin with a space, by how its expert was trained. */
const same = (a, b) => a.trim() === b.trim();

/** The places in `second` of a longest common subsequence of two lists. */
function inCommon(first, second) {
  const lengths = Array.from({ length: first.length + 1 }, () => new Uint16Array(second.length + 1));
  for (let i = first.length - 1; i >= 0; i--)
    for (let j = second.length - 1; j >= 0; j--)
      lengths[i][j] = same(first[i], second[j]) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const places = new Set();
  for (let i = 0, j = 0; i < first.length && j < second.length;) {
    if (same(first[i], second[j])) { places.add(j); i++; j++; }
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return places;
}

/** The engine's swaps so far, their seconds, and its mixed steps; null where the server does not say. */
async function swaps() {
  const response = await request("/metrics").catch(() => null);
  if (!response?.ok) return null;
  const text = await response.text();
  const value = name => Number(text.match(new RegExp(`^${name} (\\S+)$`, "m"))?.[1]);
  return { count: value("sparselet_swaps_total"), seconds: value("sparselet_swap_seconds_total"),
    mixed: value("sparselet_mixed_steps_total") };
}

function showSwaps(before, after) {
  if (!before || !after) return;
  const count = after.count - before.count;
  const each = count && 1000 * (after.seconds - before.seconds) / count;
  const mixed = after.mixed - before.mixed;
  byId("swaps").textContent = [
    count ? `The engine changed experts ${count} time${count === 1 ? "" : "s"}, ${each.toFixed(1)} ms each.` : "No change of experts was needed.",
    mixed ? `${mixed} steps were of several experts in one batch.` : null,
    "Marked: what the first answer does not have.",
  ].filter(Boolean).join(" ");
}
