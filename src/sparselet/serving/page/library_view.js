// Library: a card an expert, filtered and sorted, chosen into the tray.

import { byId, bytes, element, percent, short } from "./dom.js";
import { choose, changed, onChange, state } from "./state.js";

const first = metrics => Object.values(metrics)[0] ?? -Infinity;
const ORDERS = {
  name: (a, b) => a.name.localeCompare(b.name),
  task: (a, b) => (a.task ?? "").localeCompare(b.task ?? ""),
  score: (a, b) => first(b.metrics) - first(a.metrics),
  density: (a, b) => a.density - b.density,
  bytes: (a, b) => a.bytes - b.bytes,
  written: (a, b) => (b.written ?? 0) - (a.written ?? 0),
};

export function startLibrary() {
  byId("filter").addEventListener("input", draw);
  byId("sort").addEventListener("change", draw);
  onChange(draw);
  onChange(drawTray);
}

function draw() {
  const { base, experts, refused } = state.library;
  byId("base").textContent = base.name && `base model ${base.name} · ${base.digest.slice(0, 8)}`;
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  const fits = (...texts) => words.every(word => texts.join(" ").toLowerCase().includes(word));
  const shown = experts.filter(e => fits(e.name, e.task, e.method, ...e.members)).sort(ORDERS[byId("sort").value]);
  const failed = refused.filter(e => fits(e.name));
  byId("count").textContent = `${shown.length} of ${experts.length} experts`
    + (refused.length ? `, ${refused.length} not served` : "");
  const focused = document.activeElement?.dataset?.expert;
  byId("cards").replaceChildren(...shown.map(card), ...failed.map(refusedCard));
  if (focused) document.querySelector(`[data-expert="${CSS.escape(focused)}"]`)?.focus();
}

function card(expert) {
  const chosen = state.chosen.includes(expert.name);
  const facts = Object.entries({
    task: expert.task,
    ...Object.fromEntries(Object.entries(expert.metrics).map(([name, value]) => [name.replaceAll("_", " "), short(value)])),
    changes: `${expert.entries.toLocaleString("en")} entries, ${percent(expert.density)} of ${expert.targets} targets`,
    mask: expert.block,
    size: bytes(expert.bytes),
    base: expert.base,
    written: expert.written && new Date(1000 * expert.written).toISOString().slice(0, 16).replace("T", " "),
    "merged by": expert.method && `${expert.method} of ${expert.members.join(", ")}`,
    routing: expert.profile ? "has a profile" : null,
  }).filter(([, value]) => value);
  return element("li", { class: chosen ? "card chosen" : "card" },
    element("label", {},
      element("input", { type: "checkbox", "data-expert": expert.name, ...(chosen && { checked: true }),
        change: event => choose(expert.name, event.target.checked) }),
      element("h3", {}, expert.name)),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    fingerprint(expert));
}

/** An expert of other base weights is never served, so all that is left to say is whether this could be checked. */
function fingerprint(expert) {
  if (expert.fingerprints === expert.targets) return element("p", { class: "muted" }, "base weights checked");
  return element("p", { class: "bad" }, `base weights unchecked: ${expert.targets - expert.fingerprints} of `
    + `${expert.targets} targets have no fingerprint`);
}

function refusedCard(expert) {
  return element("li", { class: "card refused" },
    element("h3", {}, expert.name),
    element("p", { class: "bad" }, expert.other_base ? "of another base model, not served" : "not served"),
    element("p", {}, expert.reason));
}

function drawTray() {
  const chips = state.chosen.map(name => element("span", { class: "chip" }, name,
    element("button", { "aria-label": `Leave out ${name}`, click: () => choose(name, false) }, "×")));
  const clear = element("button", { click: () => { state.chosen = []; changed(); } }, "Clear");
  byId("tray").replaceChildren(
    ...(chips.length ? [element("span", { class: "muted" }, "Chosen"), ...chips, clear]
      : [element("span", { class: "muted" }, "No experts chosen yet: mark some in the library.")]));
}
