// --- the bar that all panels follow --------------------------------------------------------------------------------------
function chosenLogprob(step) {
  const logits = part("next.logits", step), rest = part("next.rest", step)[9];  // the tenth stop is temperature 1
  const top = logits[0], sum = logits.reduce((total, x) => total + Math.exp(x - top), 0) + Math.exp(rest - top);
  const at = part("next.tokens", step).indexOf(texts.steps[step]);
  return at < 0 ? NaN : logits[at] - top - Math.log(sum);
}
function probabilityText(step) {
  const logprob = chosenLogprob(step);
  return Number.isNaN(logprob) ? "unlikely" : percent(Math.exp(logprob));
}

function buildControls() {
  const bar = byId("tokens");
  texts.steps.forEach((index, step) => {
    bar.append(el("button", { type: "button", role: "radio", onclick: () => go({ t: step }) }, token(index), el("small", {}, probabilityText(step))));
  });
  bar.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.t - 1, ArrowRight: state.t + 1, Home: 0, End: steps - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go({ t: to });
    bar.children[state.t].focus();
  });
  const select = (label, options, name) => {
    const node = el("select", { "aria-label": label, onchange: () => go({ [name]: Number(node.value) }) },
      ...options.map(([value, text]) => el("option", { value }, text)));
    return [el("label", {}, el("span", {}, label), node), node];
  };
  const numbers = (count, name) => Array.from({ length: count }, (_, i) => [i, `${name} ${i}`]);
  const [layerLabel, layer] = select("Layer", [[-1, "all layers"], ...numbers(layers, "layer")], "l");
  const [headLabel, head] = select("Head", [[-1, "all heads"], ...numbers(texts.heads, "head")], "h");
  const play = el("button", { type: "button", "aria-pressed": "false" }, "▶ Play");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.setAttribute("aria-pressed", "false"); play.textContent = "▶ Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.setAttribute("aria-pressed", "true");
    play.textContent = "■ Stop";
    if (state.t === steps - 1) go({ t: 0 });
    timer = setInterval(() => (state.t < steps - 1 ? go({ t: state.t + 1 }) : stop()), 900);
  });
  byId("choices").append(play, layerLabel, headLabel);
  // The patch: its picture, where there are several, its row and its column.
  const coordinates = () => [Math.floor(state.p / picturePatches), Math.floor((state.p % picturePatches) / texts.grid), state.p % texts.grid];
  const patch = !texts.grid ? [] : [["Picture", texts.pictures], ["Row", texts.grid], ["Column", texts.grid]].map(([name, count], axis) => {
    const node = el("select", { "aria-label": `${name} of the patch`, onchange: () => {
      const at = coordinates();
      at[axis] = Number(node.value);
      go({ p: at[0] * picturePatches + at[1] * texts.grid + at[2] });
    } }, ...Array.from({ length: count }, (_, i) => el("option", { value: i }, `${name.toLowerCase()} ${i + 1}`)));
    if (count > 1) byId("choices").append(axis ? node : el("label", {}, el("span", {}, "Patch"), node));
    return node;
  });
  draws.push(() => {
    [...bar.children].forEach((button, step) => {
      button.setAttribute("aria-checked", String(step === state.t));
      button.tabIndex = step === state.t ? 0 : -1;
    });
    const here = bar.children[state.t];
    if (here) bar.scrollLeft = here.offsetLeft - bar.offsetLeft - bar.clientWidth / 2 + here.clientWidth / 2;
    layer.value = state.l;
    head.value = state.h;
    patch.forEach((node, axis) => { node.value = coordinates()[axis]; });
  });
}

// --- the answer -----------------------------------------------------------------------------------------------------------
function buildAnswer() {
  const sentence = el("p", { class: "sentence" }), runnersUp = el("div");
  body("answer").append(sentence, runnersUp);
  draws.push(() => {
    sentence.replaceChildren(...texts.steps.map((index, step) => (step === state.t ? el("mark", {}, plain(index)) : plain(index))));
    const tokens = part("next.tokens", state.t), logits = part("next.logits", state.t), rest = part("next.rest", state.t)[9];
    const sum = logits.reduce((total, x) => total + Math.exp(x - logits[0]), 0) + Math.exp(rest - logits[0]);
    const rows = Array.from(logits.subarray(0, 5), (x, i) => {
      const p = Math.exp(x - logits[0]) / sum;
      return { name: token(tokens[i]), value: p, text: percent(p), chosen: tokens[i] === texts.steps[state.t] };
    });
    runnersUp.replaceChildren(el("p", { class: "note" }, `Token ${state.t + 1} of ${steps}, number ${texts.ids[state.t]} of the vocabulary. ` +
      "The likeliest five (the chosen one underlined):"), bars(rows));
  });
}

// --- three maps over the picture ----------------------------------------------------------------------------------------
const shares = (values) => {
  const sum = values.reduce((total, x) => total + Math.abs(x), 0) || 1;
  return values.map((x) => x / sum);
};
function methods(step) {
  const found = [["Attention", shares(decoderRow(step).row.slice(0, texts.patches))]];
  if (has("gradient")) found.push(["Gradient × input", shares(Array.from(part("gradient", step)))]);
  if (has("erase.map")) found.push(["Erasing 2×2 patches", shares(Array.from(part("erase.map", step), (x) => Math.max(x, 0)))]);
  return found;
}
const windowOf = (patch) => {
  const inside = patch % picturePatches;
  return [Math.min(Math.floor(inside / texts.grid), texts.grid - 2), Math.min(inside % texts.grid, texts.grid - 2)];
};

// The longest common subsequence of two answers; what is new in the second is marked.
function marked(before, after) {
  const length = before.map(() => []).concat([[]]).map(() => new Array(after.length + 1).fill(0));
  for (let i = before.length - 1; i >= 0; i--) {
    for (let j = after.length - 1; j >= 0; j--) {
      length[i][j] = before[i] === after[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const parts = [];
  for (let i = 0, j = 0; j < after.length;) {
    if (i < before.length && before[i] === after[j]) { parts.push(plain(after[j])); i++; j++; }
    else if (i < before.length && length[i + 1][j] >= length[i][j + 1]) i++;
    else { parts.push(el("mark", {}, plain(after[j]))); j++; }
  }
  return parts.length ? parts : ["(no answer)"];
}

function buildPicture() {
  const figures = el("div", { class: "row" }), agreement = el("p", { class: "note" }), note = el("p", { class: "note" });
  const everyStep = el("input", { type: "checkbox", onchange: () => redraw() });
  body("picture").append(el("label", { class: "check" }, everyStep, "one scale for all tokens of the answer"), figures, note, agreement);
  const nodes = methods(0).map(([name]) => {
    const row = el("div", { class: "row tight" }), caption = el("figcaption");
    const maps = Array.from({ length: texts.pictures }, (_, i) => pickable(canvas(308, 308, name), i * picturePatches));
    row.append(...(name.startsWith("Erasing") ? maps.slice(0, 1) : maps));
    figures.append(el("figure", {}, el("b", {}, name), row, caption));
    return { maps, caption };
  });
  const sentence = el("p", { class: "sentence" }), erased = el("p", { class: "note" });
  if (has("erase.map")) body("picture").append(erased, sentence);
  const highest = (step) => Math.max(...methods(step).map(([, values]) => Math.max(...values.map(Math.abs))));
  draws.push(() => {
    const found = methods(state.t), { note: why } = decoderRow();
    const tops = everyStep.checked ? texts.steps.map((_, step) => highest(step)) : [highest(state.t)];
    const top = Math.max(...tops, 1e-9), [row, column] = texts.grid > 1 ? windowOf(state.p) : [0, 0];
    found.forEach(([name, values], i) => {
      const erasing = name.startsWith("Erasing");
      nodes[i].maps.forEach((node, picture) => {
        const image = images[`picture.${picture}`];
        if (!image || (erasing && picture)) return;
        const inside = state.p - picture * picturePatches, here = inside >= 0 && inside < picturePatches;
        drawVeiled(node, image, values.slice(picture * picturePatches, (picture + 1) * picturePatches),
          { top, chosen: here && !erasing ? inside : -1, frame: erasing ? [row, column, 2] : null });
        node.setAttribute("aria-label", `${name} over the picture; chosen is ${placeName(state.p)}`);
      });
      const best = largest(values, 3).map((p) => `${placeName(p)}: ${percent(values[p])}`).join("; ");
      nodes[i].caption.textContent = values.some((x) => x) ? `Most: ${best}.` : "Nothing: no erased window made this token less likely.";
    });
    note.textContent = `Seen quite clearly: ${percent(top)} of a map's sum, or more. A dash marks patches that spoke against the token. ${why}`;
    const four = found.map(([, values]) => new Set(largest(values, 4)));
    const both = (a, b) => [...four[a]].filter((p) => four[b].has(p)).length;
    const pairs = found.length === 3 ? [[0, 1], [0, 2], [1, 2]] : found.length === 2 ? [[0, 1]] : [];
    agreement.textContent = pairs.length ? "Of the four patches with the largest shares are in common: " +
      pairs.map(([a, b]) => `${found[a][0]} and ${found[b][0]}: ${both(a, b)}`).join("; ") + "." : "";
    if (has("erase.map")) {
      const changed = texts.changed;
      const now = row * (texts.grid - 1) + column, ids = texts.answers[texts.erased[now]];
      erased.textContent = `Erased: rows ${row + 1} and ${row + 2}, columns ${column + 1} and ${column + 2} (the dashed frame${texts.pictures > 1 ? " in the first picture" : ""}). ` +
        `${changed} of ${texts.erased.length} such windows change the answer; single patches hardly ever do. The answer then:`;
      sentence.replaceChildren(...marked(texts.text.slice(texts.prompt), ids));
    }
  });
}

// --- patch to token -------------------------------------------------------------------------------------------------------
function buildPatch() {
  const pixels = canvas(168, 168, "the pixels of the patch"), kernels = el("div", { class: "row tight small" }), count = texts.kernelRows.length;
  const response = canvas(196, 196, "the kernel's response at every patch"), responseText = el("figcaption");
  const strip = canvas(560, 60, "the numbers of the token"), stripText = el("figcaption", { class: "wide" }), pixelText = el("figcaption");
  const neighbors = has("patch.neighbors") ? canvas(196, 196, "how alike the rows of the position table are") : null, neighborText = el("figcaption");
  let kernel = 0;
  const buttons = texts.kernelRows.map((row, i) => {
    const size = texts.patch, node = canvas(size, size, `kernel ${row}`), data = new ImageData(size, size), values = part("patch.kernels", i);
    for (let k = 0; k < size * size; k++) data.data.set([values[k], values[size * size + k], values[2 * size * size + k], 255], 4 * k);
    node.getContext("2d").putImageData(data, 0, 0);
    const button = el("button", { type: "button", class: "kernel", "aria-label": `kernel ${row}`, onclick: () => { kernel = i; redraw(); } }, node);
    kernels.append(button);
    return button;
  });
  pickable(response);
  body("patch").append(el("div", { class: "row" },
    el("figure", {}, el("b", {}, "Its pixels"), pixels, pixelText),
    el("figure", {}, el("b", {}, `One kernel at every patch`), response, responseText),
    neighbors ? el("figure", {}, el("b", {}, "Its row of the position table"), pickable(neighbors), neighborText) : null),
  el("p", {}, `The ${count} of ${texts.visionWidth} kernels that tell most of this picture apart; choose one:`), kernels,
  el("figure", { class: "block" }, el("b", {}, "The token that it becomes"), el("div", { class: "scroll" }, strip), stripText));
  strip.hidden = !has("patch.tokens");
  draws.push(() => {
    const patch = state.p % picturePatches, row = Math.floor(patch / texts.grid), column = patch % texts.grid, image = images["picture.0"];
    if (image) {
      const pen = pixels.getContext("2d"), share = (texts.patch / texts.size) * image.width;
      pen.imageSmoothingEnabled = false;
      pen.drawImage(image, column * share, row * share, share, share, 0, 0, 168, 168);
    }
    pixelText.textContent = `${texts.patch} × ${texts.patch} pixels of 3 colors: ${3 * texts.patch ** 2} numbers. ${placeName(patch)}.`;
    const values = Array.from({ length: picturePatches }, (_, p) => part("patch.responses", p)[kernel]);
    drawGrid(response, values, texts.grid, { chosen: patch });
    responseText.textContent = `Kernel ${texts.kernelRows[kernel]} gives ${round(values[patch])} here: one number of the token. A dash marks negative numbers.`;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === kernel)));
    const scale = part("patch.scale", patch)[0];
    if (has("patch.tokens")) drawStrip(strip, Array.from(part("patch.tokens", patch)), 127);
    stripText.textContent = `${texts.visionWidth} numbers, the kernels' sums plus the position's row; the largest is ${round(127 * scale)} in size.`;
    if (neighbors) {
      const alike = Array.from(part("patch.neighbors", patch), (x) => Math.max(0, x / 127.5 - 1));
      drawGrid(neighbors, alike, texts.grid, { top: 1, chosen: patch });
      neighborText.textContent = `Most like it: ${largest(alike, 4).filter((p) => p !== patch).slice(0, 3).map((p) => `${placeName(p)} (${round(alike[p])})`).join("; ")}.`;
    }
  });
}

// --- vision layers --------------------------------------------------------------------------------------------------------
function buildVision() {
  const rows = el("div", { class: "row tight small" }), heads = el("div", { class: "row tight small" });
  const note = el("p", { class: "note" }), side = texts.grid, cell = Math.max(1, Math.floor(98 / side)), width = cell * side, maps = [];
  for (let v = 0; v < texts.visionLayers; v++) {
    const button = el("button", { type: "button", onclick: () => go({ v }) }, `layer ${v}`), attention = has(`vision.mean.${v}`) ? pickable(canvas(width, width, `attention of vision layer ${v}`)) : null;
    maps.push({ v, node: attention, button });
    const data = part("vision.colors", v + 1), node = canvas(side, side, `tokens after vision layer ${v} as colors`), image = new ImageData(side, side);
    for (let k = 0; k < side * side; k++) image.data.set([data[3 * k], data[3 * k + 1], data[3 * k + 2], 255], 4 * k);
    node.getContext("2d").putImageData(image, 0, 0);
    node.classList.add("wide");
    rows.append(el("figure", {}, attention, button, node));
  }
  const headMaps = Array.from({ length: texts.visionHeads }, (_, h) => {
    const node = pickable(canvas(width, width, `head ${h}`));
    heads.append(el("figure", {}, node, el("figcaption", {}, `head ${h}`)));
    return node;
  });
  body("vision").append(rows, note, heads);
  draws.push(() => {
    const patch = state.p % picturePatches;
    for (const { v, node, button } of maps) {
      if (node) drawGrid(node, Array.from(part(`vision.mean.${v}`, patch), asShare), side, { chosen: patch });
      button.setAttribute("aria-pressed", String(v === state.v));
    }
    const there = has(`vision.heads.${state.v}`);
    heads.hidden = !there;
    note.textContent = there ? `The ${texts.visionHeads} heads of vision layer ${state.v}, for the patch in ${placeName(patch)}:` :
      `The single heads of vision layer ${state.v} did not fit into this page: above is the mean of all heads, where it did.`;
    if (there) headMaps.forEach((node, h) => drawGrid(node, Array.from(part(`vision.heads.${state.v}`, h, patch), asShare), side, { chosen: patch }));
  });
}

// --- boxes ----------------------------------------------------------------------------------------------------------------
function buildBoxes() {
  const node = canvas(448, 448, "the picture with its boxes and shapes"), list = el("ol");
  body("boxes").append(el("div", { class: "row" }, node, list));
  texts.boxes.forEach(({ label, box, mask }) => list.append(el("li", {}, `${label || "(no label)"}: x ${box.filter((_, i) => i % 2 === 0).map((x) => percent(x)).join(" to ")}, ` +
    `y ${box.filter((_, i) => i % 2).map((x) => percent(x)).join(" to ")} of the picture${mask ? ", with a shape" : ""}`)));
  draws.push(() => {
    const pen = node.getContext("2d"), side = texts.maskSide;
    if (images["picture.0"]) pen.drawImage(images["picture.0"], 0, 0, 448, 448);
    texts.boxes.forEach(({ box: [x0, y0, x1, y1], mask }, i) => {
      if (mask) {
        const shape = canvas(side, side, ""), ink = rgb(color("--accent")), data = new ImageData(side, side);
        for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) if (bit(`boxes.mask.${i}`, y, x)) data.data.set([...ink, 150], 4 * (y * side + x));
        shape.getContext("2d").putImageData(data, 0, 0);
        pen.imageSmoothingEnabled = false;
        pen.drawImage(shape, 0, 0, 448, 448);
        pen.imageSmoothingEnabled = true;
      }
      outline(pen, x0 * 448, y0 * 448, (x1 - x0) * 448, (y1 - y0) * 448);
      pen.fillStyle = color("--paper");
      pen.fillRect(x0 * 448 + 4, y0 * 448 + 4, 20, 22);
      pen.fillStyle = color("--ink");
      pen.font = "bold 16px system-ui, sans-serif";
      pen.fillText(String(i + 1), x0 * 448 + 9, y0 * 448 + 21);
    });
  });
}
