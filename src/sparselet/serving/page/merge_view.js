// Merge: a method, a weight an expert, parameters; the command that does the same; save and serve.

import { byId, element, shellWord } from "./dom.js";
import { changed, fetchJson, loadLibrary, mergeFields, onChange, state, weightOf } from "./state.js";

let paths = {};  // of experts by name, which the server tells those with the key for changes
let drawn = "";

export function startMerge() {
  byId("method").addEventListener("change", event => {
    state.method = event.target.value;
    state.parameters = {};
    changed();
  });
  byId("merge-name").addEventListener("input", drawCommand);
  byId("copy").addEventListener("click", copy);
  byId("save").addEventListener("click", save);
  byId("admin-key").addEventListener("change", loadPaths);
  onChange(draw);
}

/** Methods that the chosen experts can be merged by. */
function methods() {
  const profiled = state.chosen.every(name => state.library.experts.find(expert => expert.name === name)?.profile);
  return state.library.methods.filter(({ needs_profiles }) => profiled || !needs_profiles);
}

const method = () => methods().find(each => each.name === state.method);

function draw() {
  if (state.library.methods.length && method() === undefined) {
    state.method = "overlap";
    state.parameters = {};
  }
  const enough = state.chosen.length > 1 && method() !== undefined;
  byId("merging").hidden = !enough;
  byId("no-merge").hidden = enough;
  if (!enough) return;
  const key = JSON.stringify([state.chosen, state.method, methods().length]);
  if (key !== drawn) {
    drawn = key;
    byId("method").replaceChildren(...methods().map(({ name }) =>
      element("option", { value: name, ...(name === state.method && { selected: true }) }, name)));
    byId("formula").textContent = `${method().formula}. ${method().source}`;
    byId("weights").replaceChildren(element("legend", {}, "Weights"), ...state.chosen.map(slider));
    const fields = Object.entries(method().parameters).map(parameter);
    byId("parameters").replaceChildren(element("legend", {}, "Parameters"), element("div", {}, ...fields));
    byId("parameters").hidden = !fields.length;
  }
  drawCommand();
}

function slider(name) {
  const set = (value, other) => {
    state.weights[name] = value;
    other.value = value;
    changed();
  };
  const properties = { min: -1, max: 2, step: 0.05, value: weightOf(name) };
  const number = element("input", { ...properties, type: "number", "aria-label": `Weight of ${name}`,
    input: event => { if (Number.isFinite(event.target.valueAsNumber)) set(event.target.valueAsNumber, range); } });
  const range = element("input", { ...properties, type: "range", "aria-label": `Weight of ${name}`,
    input: event => set(event.target.valueAsNumber, number) });
  return element("div", { class: "slider" }, element("span", {}, name), range, number);
}

/** A field for a parameter, of the kind of its default. */
function parameter([name, standard]) {
  const set = value => {
    if (value === standard) delete state.parameters[name];
    else state.parameters[name] = value;
    changed();
  };
  if (typeof standard === "boolean")
    return element("label", { class: "inline" },
      element("input", { type: "checkbox", ...(standard && { checked: true }), change: event => set(event.target.checked) }), name);
  const numeric = typeof standard === "number";
  const read = event => {
    const value = numeric ? event.target.valueAsNumber : event.target.value;
    if (!numeric || Number.isFinite(value)) set(value);
  };
  return element("label", {}, name,
    element("input", { type: numeric ? "number" : "text", step: "any", value: standard, input: read }));
}

const exact = () => state.chosen.every(name => paths[name]);

function drawCommand() {
  const settings = Object.entries(state.parameters).map(([name, value]) => shellWord(`${name}=${value}`));
  const weights = state.chosen.map(weightOf);
  const words = ["sparselet merge", ...state.chosen.map(name => shellWord(paths[name] ?? name)), `--method ${state.method}`];
  if (weights.some(weight => weight !== 1)) words.push(`--weights ${weights.join(" ")}`);
  if (settings.length) words.push(`--set ${settings.join(" ")}`);
  words.push(`--out ${shellWord(byId("merge-name").value || "merged")}`);
  byId("command").textContent = words.join(" ");
  byId("command-note").textContent = exact() ? ""
    : "Run it in the directory of the experts; with the key for changes (Keys, above) it has their paths.";
}

async function loadPaths() {
  paths = {};
  try {
    const experts = byId("admin-key").value ? await fetchJson("/admin/experts", { admin: true }) : [];
    paths = Object.fromEntries(experts.map(expert => [expert.name, expert.path]));
  } catch (error) {
    byId("saved").textContent = error.message;
  }
  changed();
}

async function copy() {
  try {
    await navigator.clipboard.writeText(byId("command").textContent);
    byId("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("command"));
    byId("copy").textContent = "Press Ctrl-C";
  }
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
}

async function save() {
  const name = byId("merge-name").value.trim();
  byId("save").disabled = true;
  byId("saved").textContent = "Merging…";
  try {
    const saved = await fetchJson("/admin/merge", { admin: true, body: { name, ...mergeFields() } });
    byId("saved").textContent = `Saved and served as ${saved.name}, ${saved.digest.slice(0, 8)}.`;
    await loadLibrary();
  } catch (error) {
    byId("saved").textContent = error.message;
  } finally {
    byId("save").disabled = false;
  }
}
