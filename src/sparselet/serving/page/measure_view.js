// Measure: Rouge-L of the merge, and of each task's own expert, on validation rows, with intervals.

import { byId, element, short, svgElement } from "./dom.js";
import { fetchJson, mergeFields, onChange, state } from "./state.js";

let running = null;

export function startMeasure() {
  byId("measure").addEventListener("click", () => running ? running.abort() : measure());
  onChange(() => { byId("measuring").hidden = !state.library.tasks.length; });
}

/** The tasks of the chosen experts that the server has rows of; if there are none, all tasks. */
function tasksToMeasure() {
  const own = state.chosen.map(name => state.library.experts.find(expert => expert.name === name)?.task);
  const shared = state.library.tasks.filter(task => own.includes(task));
  return shared.length ? shared : state.library.tasks;
}

const ownExpert = task => state.chosen.find(name => state.library.experts.find(expert => expert.name === name)?.task === task);

async function measure() {
  const rows = byId("rows").valueAsNumber, merged = mergeFields(), tasks = tasksToMeasure();
  const body = element("tbody");
  byId("scores").replaceChildren(element("table", {},
    element("caption", {}, `Rouge-L, with 95 % intervals; ${merged.method}`),
    element("thead", {}, element("tr", {}, ...["task", "who", "score", "0 to 100"].map(text => element("th", { scope: "col" }, text)))),
    body));
  running = new AbortController();
  byId("measure").textContent = "Stop";
  try {
    for (const task of tasks)
      for (const [who, fields] of [[ownExpert(task), { model: ownExpert(task) }], ["merged", merged]]) {
        if (!who) continue;
        byId("measured").textContent = `${task}: ${who}…`;
        body.append(row(who, await fetchJson("/library/measure", { body: { ...fields, task, rows }, signal: running.signal })));
      }
    byId("measured").textContent = "";
  } catch (error) {
    byId("measured").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    running = null;
    byId("measure").textContent = "Measure";
  }
}

function row(who, { task, rows, mean, low, high }) {
  const text = `${short(mean)} (${short(low)} to ${short(high)}), ${rows} rows`;
  const line = (x1, x2, y, width, className) => svgElement("line", { x1, x2, y1: y, y2: y, "stroke-width": width, class: className });
  return element("tr", {}, element("td", {}, task), element("td", {}, who), element("td", { class: "number" }, text),
    element("td", {}, svgElement("svg", { viewBox: "0 0 100 10", class: "score", role: "img", "aria-label": text },
      line(0, mean, 5, 8, "mean"), line(low, high, 5, 1.5, "interval"))));
}
