// The data: one safetensors file in base64. Eight bytes give the header's length, the header is JSON, arrays follow.
function readSafetensors(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const types = { U8: Uint8Array, I8: Int8Array, F16: Uint16Array, U16: Uint16Array, I32: Int32Array, F32: Float32Array };
  const arrays = {}, { texts } = header.__metadata__;
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const data = new types[dtype](bytes.slice(8 + length + begin, 8 + length + end).buffer);
    arrays[name] = { shape, data: dtype === "F16" ? Float32Array.from(data, fromHalf) : data };
  }
  return [arrays, JSON.parse(texts)];
}

// float16: a sign, five bits of exponent, ten of fraction.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

const [arrays, texts] = readSafetensors(document.getElementById("data").textContent);
const has = (name) => name in arrays;
const tokenText = (index) => texts.tokens[index];
const steps = texts.steps.length, layers = texts.layers, picturePatches = texts.grid ? texts.grid ** 2 : 0;
const sequence = texts.patches + texts.text.length;

// A part of an array by its first indices: part("decoder.heads.2", head, step) is a row.
function part(name, ...indices) {
  const { shape, data } = arrays[name];
  const size = shape.slice(indices.length).reduce((a, b) => a * b, 1);
  const start = indices.reduce((at, index, axis) => at * shape[axis] + index, 0) * size;
  return data.subarray(start, start + size);
}

// Probabilities are kept as round(255 sqrt(p)).
const asShare = (byte) => (byte / 255) ** 2;
const bit = (name, row, column) => (arrays[name].data[row * arrays[name].shape[1] + (column >> 3)] >> (7 - (column & 7))) & 1;

// --- the state: token, layer (-1: mean of all), head (-1: mean), patch, layer of the vision tower ------------------------
const state = { t: 0, l: -1, h: -1, p: 0, v: 0 };
const bounds = { t: [0, steps - 1], l: [-1, layers - 1], h: [-1, texts.heads - 1], p: [0, Math.max(0, texts.patches - 1)],
  v: [0, Math.max(0, (texts.visionLayers || 1) - 1)] };
const oneLayer = () => (state.l < 0 ? layers - 1 : state.l);
const draws = [];

function fromLink() {
  const found = {};
  for (const pair of location.hash.slice(1).split("&")) {
    const [name, value] = pair.split("=");
    if (name in state && /^-?\d+$/.test(value)) found[name] = Number(value);
  }
  return found;
}

function go(change) {
  for (const [name, value] of Object.entries(change)) {
    state[name] = Math.min(Math.max(value, bounds[name][0]), bounds[name][1]);
  }
  const link = "#" + Object.entries(state).map(([name, value]) => `${name}=${value}`).join("&");
  if (location.hash !== link) {
    try { history.replaceState(null, "", link); } catch { location.hash = link; }
  }
  redraw();
}

function redraw() { for (const draw of draws) draw(); }

// How the step's token looks at every place of the sequence, and whether the chosen head is in the page.
function decoderRow(step = state.t) {
  if (state.l < 0) return { row: Array.from(part("decoder.all", step), asShare), note: state.h < 0 ? "" : "one head needs one layer: the mean is shown" };
  if (state.h >= 0 && has(`decoder.heads.${state.l}`)) {
    return { row: Array.from(part(`decoder.heads.${state.l}`, state.h, step), asShare), note: "" };
  }
  if (!has(`decoder.mean.${state.l}`)) return { row: Array.from(part("decoder.all", step), asShare), note: "this layer did not fit into the page: the mean of all is shown" };
  return { row: Array.from(part(`decoder.mean.${state.l}`, step), asShare),
    note: state.h >= 0 ? "the heads of this layer did not fit into the page: their mean is shown" : "" };
}
