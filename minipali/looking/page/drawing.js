// --- elements, tokens, numbers -------------------------------------------------------------------------------------------
// Texts go in as text nodes: a token is never markup.
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "circle", "text", "path", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const byId = (id) => document.getElementById(id);
const body = (id) => byId(id).querySelector(".body");
function percent(x) {
  const size = Math.abs(x);
  if (size > 0 && size < 5e-4) return "< 0.1 %";
  if (size < 1 && size > 0.9995) return "> 99.9 %";
  return `${(100 * x).toFixed(size && size < 0.0995 || size > 0.9895 && size < 1 ? 1 : 0)} %`;
}
const round = (x, digits = 2) => (Math.abs(x) < 10 ** -digits / 2 ? 0 : x).toFixed(digits);
// Spaces and control characters made visible; what a token is stays readable in any script.
const unseen = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/g;
const escaped = (text) => text.replace(unseen, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
const token = (index) => escaped(tokenText(index).replace(/^ | $/g, "␣").replace(/\n/g, "⏎")) || "(empty)";
const plain = (index) => escaped(tokenText(index));
const placeName = (patch) => {
  const inside = patch % picturePatches, where = `row ${Math.floor(inside / texts.grid) + 1}, column ${inside % texts.grid + 1}`;
  return texts.pictures > 1 ? `picture ${Math.floor(patch / picturePatches) + 1}, ${where}` : where;
};
// A place of the sequence in words.
const place = (i) => (i < texts.patches ? `patch ${placeName(i)}` : token(texts.text[i - texts.patches]));
const largest = (values, count) => Array.from(values.keys ? values.keys() : values, (i) => i)
  .sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b).slice(0, count);

// --- colors: one hue from paper to ink, so that the order survives gray print; taken from the style sheet --------------
function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function rgb(hex) { return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)); }
function mixer() {
  const [low, high] = [rgb(color("--paper")), rgb(color("--accent"))];
  return (share) => {
    const s = Math.min(Math.max(share, 0), 1);
    return `rgb(${low.map((x, i) => Math.round(x + (high[i] - x) * s)).join(",")})`;
  };
}

// --- canvases ------------------------------------------------------------------------------------------------------------
function canvas(width, height, label, attributes = {}) {
  return el("canvas", { width, height, role: "img", "aria-label": label, ...attributes });
}

// Numbers as squares. `top` is the value of full ink; a square whose number is negative gets a dash.
function drawGrid(node, values, columns, { top, chosen = -1, frame = null } = {}) {
  const rows = Math.ceil(values.length / columns), cell = Math.max(1, Math.floor(node.width / columns));
  const pen = node.getContext("2d"), mix = mixer(), most = top || Math.max(...Array.from(values, Math.abs), 1e-12);
  node.height = cell * rows;
  pen.fillStyle = color("--paper");
  pen.fillRect(0, 0, node.width, node.height);
  values.forEach((value, i) => {
    const x = (i % columns) * cell, y = Math.floor(i / columns) * cell;
    pen.fillStyle = mix(Math.sqrt(Math.abs(value) / most));
    pen.fillRect(x, y, cell, cell);
    if (value < -0.1 * most && cell >= 8) dash(pen, x, y, cell);
  });
  if (chosen >= 0) outline(pen, (chosen % columns) * cell, Math.floor(chosen / columns) * cell, cell, cell);
  if (frame) outline(pen, frame[1] * cell, frame[0] * cell, frame[2] * cell, frame[2] * cell, true);
}
function dash(pen, x, y, cell) {
  pen.fillStyle = color("--focus");
  pen.fillRect(x + cell * 0.25, y + cell * 0.44, cell * 0.5, Math.max(2, cell * 0.12));
}
function outline(pen, x, y, width, height, dashed = false) {
  for (const [style, line] of [[color("--paper"), 5], [color("--focus"), 2.5]]) {
    pen.strokeStyle = style;
    pen.lineWidth = line;
    pen.setLineDash(dashed ? [8, 6] : []);
    pen.strokeRect(x + 2, y + 2, width - 4, height - 4);
  }
  pen.setLineDash([]);
}

// The picture under a veil that is thin where the value is large: what counts is seen clearly, in its own colors.
function drawVeiled(node, image, values, { top, chosen = -1, frame = null } = {}) {
  const columns = texts.grid, cell = node.width / columns, pen = node.getContext("2d");
  pen.globalAlpha = 1;
  pen.drawImage(image, 0, 0, node.width, node.height);
  values.forEach((value, i) => {
    const x = Math.round((i % columns) * cell), y = Math.round(Math.floor(i / columns) * cell);
    const right = Math.round((i % columns + 1) * cell), bottom = Math.round((Math.floor(i / columns) + 1) * cell);
    pen.globalAlpha = 0.9 * (1 - Math.min(1, Math.sqrt(Math.abs(value) / top)));
    pen.fillStyle = color("--paper");
    pen.fillRect(x, y, right - x, bottom - y);
    pen.globalAlpha = 1;
    if (value < -0.1 * top) dash(pen, x, y, cell);
  });
  if (chosen >= 0) outline(pen, (chosen % columns) * cell, Math.floor(chosen / columns) * cell, cell, cell);
  if (frame) outline(pen, frame[1] * cell, frame[0] * cell, frame[2] * cell, frame[2] * cell, true);
}

// A signed vector as thin bars up and down from the middle: no color needed.
function drawStrip(node, values, top) {
  const pen = node.getContext("2d"), middle = node.height / 2, width = node.width / values.length;
  pen.fillStyle = color("--paper");
  pen.fillRect(0, 0, node.width, node.height);
  pen.fillStyle = color("--accent");
  values.forEach((value, i) => {
    const height = Math.min(middle, (Math.abs(value) / top) * middle);
    pen.fillRect(i * width, value > 0 ? middle - height : middle, Math.max(1, width - 0.5), height);
  });
  pen.fillStyle = color("--quiet");
  pen.fillRect(0, middle, node.width, 1);
}

// A map in which the patch is chosen: by a click, or with the arrow keys. `first` is the number of its first patch.
function pickable(node, first = 0) {
  node.classList.add("pick");
  node.tabIndex = 0;
  node.setAttribute("role", "application");
  node.setAttribute("aria-roledescription", "map of patches; the arrow keys choose one");
  node.addEventListener("click", (event) => {
    const box = node.getBoundingClientRect(), at = (x, size) => Math.min(texts.grid - 1, Math.floor((x / size) * texts.grid));
    go({ p: first + at(event.clientY - box.top, box.height) * texts.grid + at(event.clientX - box.left, box.width) });
  });
  node.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const inside = Math.floor(state.p / picturePatches) * picturePatches === first ? state.p - first : 0, side = texts.grid;
    const row = Math.floor(inside / side) + moves[event.key][0], column = inside % side + moves[event.key][1];
    if (row >= 0 && row < side && column >= 0 && column < side) go({ p: first + row * side + column });
  });
  return node;
}

// Rows of name, bar and value. Each row: {name, value, text, chosen, words}; `value` is a share of the width.
function bars(rows) {
  const grid = el("div", { class: "bars" });
  for (const row of rows) {
    const name = el("span", { class: `name${row.chosen ? " chosen" : ""}${row.words ? " words" : ""}` }, row.name);
    const bar = el("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    let x = 0;
    for (const [i, value] of [row.value, ...(row.more || [])].entries()) {
      const width = Math.min(100, Math.max(0, 100 * value));
      bar.append(el("rect", { x, y: 0, width, height: 10, class: i ? "second" : null }));
      x += width;
    }
    grid.append(name, bar, el("span", { class: "value" }, row.text));
  }
  return grid;
}

function slider(label, min, max, step, value, onInput) {
  const input = el("input", { type: "range", min, max, step, value, "aria-label": label });
  const output = el("output", {}, "");
  input.addEventListener("input", () => onInput(Number(input.value)));
  return { node: el("label", {}, `${label}: `, output, input), input, show: (text) => { output.textContent = text; input.setAttribute("aria-valuetext", text); } };
}

// --- the pictures that the page carries; drawn again when they have been decoded ----------------------------------------
const images = {};
function loadImage(name) {
  if (!has(name)) return;
  const data = arrays[name].data, type = data[0] === 0xff ? "image/jpeg" : "image/png", image = new Image();
  image.addEventListener("load", () => { images[name] = image; redraw(); });
  image.src = URL.createObjectURL(new Blob([data], { type }));
}
