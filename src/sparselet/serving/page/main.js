// The tabs, and the start of all views.

import { byId } from "./dom.js";
import { startLibrary } from "./library_view.js";
import { startMeasure } from "./measure_view.js";
import { startMerge } from "./merge_view.js";
import { loadLibrary } from "./state.js";
import { startTry } from "./try_view.js";
import { showWhere, startWhere } from "./where_view.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];

function select(tab, focus = false) {
  for (const each of tabs) {
    const selected = each === tab;
    each.setAttribute("aria-selected", selected);
    each.tabIndex = selected ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !selected;
  }
  if (focus) tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (tab.id === "tab-where") showWhere();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(tabs[(i + step + tabs.length) % tabs.length], true);
  });
}

startLibrary();
startWhere();
startMerge();
startMeasure();
startTry();
byId("api-key").addEventListener("change", loadLibrary);
await loadLibrary();
const wanted = byId(`tab-${location.hash.slice(1)}`);
if (wanted) select(wanted);
