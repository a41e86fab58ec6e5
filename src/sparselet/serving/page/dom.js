// Elements from texts, never from HTML; numbers as texts.

/** An element. properties: attributes by name, or functions that listen to events. children: elements and texts. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null));
  return made;
}

/** An element of a drawing. */
export function svgElement(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const byId = id => document.getElementById(id);

/** A number with three significant digits. */
export function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

export const percent = value => `${short(100 * value)}\u00a0%`;

/** Bytes in the unit that leaves one to four digits. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const unit = Math.min(3, Math.floor(Math.log2(Math.max(1, count)) / 10));
  return `${short(count / 1024 ** unit)}\u00a0${units[unit]}`;
}

/** A word for a POSIX shell. */
export const shellWord = text => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
