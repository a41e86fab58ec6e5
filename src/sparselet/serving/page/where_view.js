// Where: a heat map of each chosen expert's change, and the overlap of each two beside chance.

import { byId, element, percent, short } from "./dom.js";
import { fetchJson, onChange, showMessage, state } from "./state.js";

const LIMIT = 16;
let drawn = "";

export function startWhere() {
  onChange(() => { if (!byId("where").hidden) showWhere(); });
}

/** Fetch and draw, unless the same experts are drawn already. */
export async function showWhere() {
  const names = state.chosen.slice(0, LIMIT);
  const digests = names.map(name => state.library.experts.find(expert => expert.name === name)?.digest);
  const key = JSON.stringify([names, digests]);
  if (key === drawn) return;
  drawn = key;
  if (!names.length) {
    byId("maps").replaceChildren(element("p", { class: "empty" }, "Choose experts in the library to see where they change the model."));
    byId("pairs").replaceChildren();
    return;
  }
  byId("where").setAttribute("aria-busy", "true");
  try {
    const found = await fetchJson(`/library/where?${names.map(name => `name=${encodeURIComponent(name)}`).join("&")}`);
    if (key !== drawn) return;
    const largest = Math.max(...found.maps.flatMap(map => map.cells.map(cell => cell.rms)));
    byId("maps").replaceChildren(...found.maps.map(map => heatMap(map, largest)), legend(largest));
    byId("pairs").replaceChildren(...(found.pairs.length ? [pairTable(found.pairs)] : []));
  } catch (error) {
    drawn = "";
    showMessage(error.message);
  } finally {
    byId("where").removeAttribute("aria-busy");
  }
}

/** Query, key and value first. */
const place = projection => projection.search(/^[^qkv]/) ? "qkv".indexOf(projection[0]) : 3;

function heatMap(map, largest) {
  const layers = [...new Set(map.cells.map(cell => cell.layer))];
  const projections = [...new Set(map.cells.map(cell => cell.projection))].sort((a, b) => place(a) - place(b));
  const at = new Map(map.cells.map(cell => [`${cell.layer} ${cell.projection}`, cell]));
  const every = Math.ceil(layers.length / 10);
  const head = layers.map((layer, i) => element("th", { scope: "col" }, i % every ? element("span", { class: "hidden" }, layer) : layer));
  const row = projection => element("tr", {}, element("th", { scope: "row" }, projection),
    ...layers.map(layer => heatCell(at.get(`${layer} ${projection}`), largest)));
  return element("figure", {},
    element("figcaption", {}, map.name),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Change of ${map.name} by layer` },
      element("table", { class: "heat" },
        element("thead", {}, element("tr", {}, element("th", { class: "name", scope: "col" }, "layer"), ...head)),
        element("tbody", {}, ...projections.map(row)))));
}

function heatCell(cell, largest) {
  if (!cell) return element("td");
  const text = `${cell.target}: rms ${short(cell.rms)}, ${percent(cell.share)} of the change, ${cell.entries.toLocaleString("en")} entries`;
  const made = element("td", { title: text }, element("span", { class: "hidden" }, short(cell.rms)));
  made.style.background = `color-mix(in oklab, var(--heat) ${Math.round(100 * cell.rms / (largest || 1))}%, var(--page))`;
  return made;
}

const legend = largest => element("p", { class: "note" }, "root mean square of ΔW: 0", element("span", { class: "scale" }), short(largest));

function pairTable(pairs) {
  const row = pair => element("tr", {}, element("th", { scope: "row" }, `${pair.first} · ${pair.second}`),
    ...(pair.overlap === null ? ["no target in common", "", "", ""] : [
      percent(pair.overlap), percent(pair.chance), pair.sign_agreement === null ? "–" : percent(pair.sign_agreement), short(pair.cosine),
    ]).map(text => element("td", {}, text)));
  const columns = ["experts", "overlap", "by chance", "same sign (chance 50 %)", "cosine (chance 0)"];
  return element("figure", {},
    element("figcaption", {}, "Entries that two experts share, of all that either has"),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Overlap of pairs" },
      element("table", { class: "pairs" },
        element("thead", {}, element("tr", {}, ...columns.map(name => element("th", { scope: "col" }, name)))),
        element("tbody", {}, ...pairs.map(row)))));
}
