// What all views share: the library, the chosen experts, the keys, and how the chosen experts are merged.

import { byId } from "./dom.js";

export const state = {
  library: { base: { name: "", digest: "" }, experts: [], refused: [], methods: [], tasks: [], can_route: false },
  chosen: [],  // names, in the order in which they were chosen
  method: "overlap",
  weights: {},  // by name; 1 where absent
  parameters: {},  // of the method, those that differ from their defaults
};

const listeners = [];
/** Call a function after each change of the state. */
export const onChange = listener => listeners.push(listener);
export const changed = () => listeners.forEach(listener => listener());

export function choose(name, chosen) {
  state.chosen = state.chosen.filter(other => other !== name);
  if (chosen) state.chosen.push(name);
  changed();
}

export const weightOf = name => state.weights[name] ?? 1;

/** The fields of a request that is answered by the merge of the chosen experts. */
export const mergeFields = () => ({
  experts: state.chosen.map(name => ({ name, weight: weightOf(name) })),
  method: state.method,
  parameters: state.parameters,
});

export function showMessage(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

/** A request of the server with the key for requests, or for changes. */
export function request(path, { body, admin = false, signal } = {}) {
  const key = byId(admin ? "admin-key" : "api-key").value;
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  return fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
}

/** The message of a response that is an error. */
export async function errorOf(response) {
  const content = await response.json().catch(() => null);
  const hint = response.status === 401 || response.status === 403 ? " (Keys, above)" : "";
  return `${content?.error?.message ?? `The server answered with status ${response.status}.`}${hint}`;
}

/** A request's JSON. Throws an Error with the server's message. */
export async function fetchJson(path, options) {
  const response = await request(path, options);
  if (!response.ok) throw new Error(await errorOf(response));
  return response.json();
}

let loads = 0;
export async function loadLibrary() {
  const load = ++loads;
  let library = state.library, message = "";
  try {
    library = await fetchJson("/library");
  } catch (error) {
    message = error.message;
  }
  if (load !== loads) return;  // another one began meanwhile, with another key
  state.library = library;
  showMessage(message);
  const names = state.library.experts.map(expert => expert.name);
  state.chosen = state.chosen.filter(name => names.includes(name));
  changed();
}
