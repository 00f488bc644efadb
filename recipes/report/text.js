// Text: makes elements, and shows every character of a text as a character, whatever the text says.

const SVG = "http://www.w3.org/2000/svg";
// Controls, halves of surrogate pairs, and what hides or turns around its neighbours.
const UNSEEN = /[\p{Cc}\p{Cs}\u00AD\u061C\u200B\u200C\u200E\u200F\u2028-\u202E\u2060-\u2069\uFEFF]/gu;

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children); // strings become text nodes, never markup
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

// A text as nodes: as it is, with a mark in the place of what cannot be seen. A newline keeps breaking the line.
function shown(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(element("span", { class: "mark" }, markOf(match[0])));
    if (match[0] === "\n") nodes.push("\n");
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function markOf(character) {
  if (character === "\n") return "↵";
  if (character === "\t") return "⇥";
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

// A text in one line, with no more than `length` characters.
function oneLine(text, length) {
  const characters = Array.from(text.slice(0, 2 * length)).slice(0, length);
  return shown(characters.join("").replaceAll("\n", "↵") + (characters.join("").length < text.length ? "…" : ""));
}

function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return minus(value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e"));
  return minus(value.toLocaleString("en", { maximumSignificantDigits: Math.max(4, Math.ceil(Math.log10(size + 1))) }));
}

function signed(value) {
  return value > 0 ? `+${figure(value)}` : figure(value);
}

function minus(text) {
  return text.replaceAll("-", "−");
}
