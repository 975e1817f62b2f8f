// --- rotary positions -----------------------------------------------------------------------------------------------------
function buildRope() {
  const kept = Array.from({ length: layers }, (_, l) => l).filter((l) => has(`rope.q.${l}`) && has(`rope.k.${l}`));
  if (!kept.length) { body("rope").append(el("p", { class: "note" }, "Queries and keys did not fit into this page.")); return; }
  const half = texts.headDim / 2, chosen = { pair: 0, key: 0, shift: 0 };
  const dial = el("svg", { viewBox: "-12 0 264 240", class: "dial", role: "img", "aria-label": "query and key as clock hands" }), note = el("p", { class: "note" }), list = el("div");
  const sliders = [
    slider("Pair of features", 0, half - 1, 1, 0, (x) => { chosen.pair = x; redraw(); }),
    slider("Key of the text token", 0, texts.text.length - 1, 1, 0, (x) => { chosen.key = x; redraw(); }),
    slider("Move both tokens by", 0, 40, 1, 0, (x) => { chosen.shift = x; redraw(); })];
  body("rope").append(el("div", { class: "sliders" }, ...sliders.map((s) => s.node)), el("div", { class: "row" }, dial, el("div", { class: "grow" }, list, note)));
  draws.push(() => {
    const wanted = oneLayer(), layer = kept.includes(wanted) ? wanted : kept[kept.length - 1], head = Math.max(0, state.h);
    const query = texts.prompt - 1 + state.t, key = Math.min(chosen.key, query), H = texts.headDim;
    const q = part(`rope.q.${layer}`, query, head), k = part(`rope.k.${layer}`, key, Math.floor((head * texts.kvHeads) / texts.heads));
    const speed = (i) => texts.thetas[layer] ** (-i / half) / texts.factors[layer];
    const m = texts.patches + query + chosen.shift, n = texts.patches + key + chosen.shift;
    const turned = (x, i, at) => {
      const c = Math.cos(at * speed(i)), s = Math.sin(at * speed(i));
      return [x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s];
    };
    const product = (i) => { const [a, b] = turned(q, i, m), [c, d] = turned(k, i, n); return a * c + b * d; };
    const hand = (x, i, at) => { const [a, b] = turned(x, i, at), length = Math.hypot(a, b) || 1; return [a / length, b / length]; };
    const draw = [el("circle", { cx: 120, cy: 120, r: 100, fill: "none", stroke: color("--line") })];
    for (const [name, x, at, dashed] of [["query", q, m, false], ["key", k, n, true]]) {
      const [a, b] = hand(x, chosen.pair, at);
      draw.push(el("line", { x1: 120, y1: 120, x2: 120 + 92 * a, y2: 120 - 92 * b, stroke: color("--accent"), "stroke-width": 4, "stroke-dasharray": dashed ? "7 6" : null, "stroke-linecap": "round" }));
      draw.push(el("text", { x: 120 + 108 * a, y: 124 - 108 * b, "text-anchor": "middle" }, name));
    }
    dial.replaceChildren(...draw);
    let sum = 0;
    for (let i = 0; i < half; i++) sum += product(i);
    const pairs = Array.from({ length: half }, (_, i) => i), top = Math.max(...pairs.map((i) => Math.abs(product(i))), 1e-9);
    const best = largest(pairs.map(product), 4).sort((a, b) => a - b);
    sliders[0].show(`${chosen.pair}: features ${chosen.pair} and ${chosen.pair + half}`);
    sliders[1].show(`${token(texts.text[key])} (place ${texts.patches + key})`);
    sliders[2].show(String(chosen.shift));
    sliders[1].input.max = query;
    list.replaceChildren(el("p", {}, "The pairs that count most for this query and key:"),
      bars(best.map((i) => ({ name: `pair ${i}`, value: Math.abs(product(i)) / top, text: round(product(i)), words: true, chosen: i === chosen.pair }))));
    note.textContent = `Layer ${layer}${layer === wanted ? "" : " (others did not fit into this page)"}, head ${head}. Query of ${token(texts.text[query])} at place ${m}, key at ${n}: ` +
      `pair ${chosen.pair} turns by ${round(speed(chosen.pair), 4)} radians a place; over ${m - n} places that adds ${round((m - n) * speed(chosen.pair))} to the angle between the hands. ` +
      `This pair gives ${round(product(chosen.pair), 3)} of q·k = ${round(sum, 3)}; times ${round(texts.scale, 3)} that is the score ${round(sum * texts.scale, 3)}` +
      `${texts.softcap ? `, before the soft cap of ${texts.softcap}` : ""}. Both places moved by ${chosen.shift}: the same numbers.`;
  });
}

// --- norm -------------------------------------------------------------------------------------------------------------------
function buildNorm() {
  if (!has(`norm.before.${layers - 1}`)) { body("norm").append(el("p", { class: "note" }, "The vectors did not fit into this page.")); return; }
  const before = canvas(640, 90, "before the norm"), after = canvas(640, 90, "after the norm"), beforeText = el("figcaption", { class: "wide" }), afterText = el("figcaption", { class: "wide" });
  body("norm").append(el("figure", { class: "block" }, el("b", {}, "The stream, as it comes"), el("div", { class: "scroll" }, before), beforeText),
    el("figure", { class: "block" }, el("b", {}, "What the block reads"), el("div", { class: "scroll" }, after), afterText));
  const kept = Array.from({ length: layers }, (_, l) => l).filter((l) => has(`norm.before.${l}`));
  draws.push(() => {
    const l = kept.includes(oneLayer()) ? oneLayer() : kept[kept.length - 1], unit = part("norm.scale", l, state.t)[0];
    const x = Array.from(part(`norm.before.${l}`, state.t), (byte) => byte * unit), rms = arrays["norm.rms"].data[l * steps + state.t], factor = part("norm.factor", l);
    const y = x.map((value, i) => (value / Math.sqrt(rms * rms + texts.eps)) * factor[i]);
    const top = Math.max(...x.map(Math.abs), ...y.map(Math.abs), 1e-9), sizeOf = (v) => Math.sqrt(v.reduce((a, b) => a + b * b, 0) / v.length);
    drawStrip(before, x, top);
    drawStrip(after, y, top);
    beforeText.textContent = `${texts.width} features of the token that predicts, before layer ${l}${l === oneLayer() ? "" : " (others did not fit into this page)"}: root mean square ${round(rms)}.`;
    afterText.textContent = `Divided by it (size 1), then times the learned factors 1 + weight (${round(Math.min(...factor))} to ${round(Math.max(...factor))}): root mean square ${round(sizeOf(y))}. Same scale in both.`;
  });
}

// --- contrastive table --------------------------------------------------------------------------------------------------
function buildContrast() {
  const { captions, pictures } = texts.contrast, moved = {}, holder = el("div", { class: "scroll" }), note = el("p", { class: "note" });
  const start = { scale: Math.exp(texts.contrast.scale), bias: texts.contrast.bias }, chosen = { ...start, softmax: false };
  const sliders = [slider("Scale (1 / temperature)", 1, 60, 0.1, start.scale, (x) => { chosen.scale = x; redraw(); }),
    slider("Bias (sigmoid only)", -20, 5, 0.1, start.bias, (x) => { chosen.bias = x; redraw(); })];
  const softmax = el("input", { type: "checkbox", onchange: () => { chosen.softmax = softmax.checked; redraw(); } });
  const nudge = el("input", { type: "checkbox", onchange: () => { if (nudge.checked) moved["0,1"] = 0.8; else delete moved["0,1"]; redraw(); } });
  body("contrast").append(el("div", { class: "sliders" }, ...sliders.map((s) => s.node)),
    el("label", { class: "check" }, softmax, "softmax over a picture's captions (CLIP) in place of the sigmoid (SigLIP)"), el("br"),
    el("label", { class: "check" }, nudge, "pretend that the second caption fits this picture better: which cells move?"), holder, note);
  const cosine = (i, j) => part("contrast.cosines", i)[j] + (moved[`${i},${j}`] || 0);
  const before = (i, j) => part("contrast.cosines", i)[j];
  const table = (value) => Array.from({ length: pictures }, (_, i) => {
    const scores = captions.map((_, j) => value(i, j) * chosen.scale), top = Math.max(...scores);
    const sum = scores.reduce((a, x) => a + Math.exp(x - top), 0);
    return scores.map((x) => (chosen.softmax ? Math.exp(x - top) / sum : 1 / (1 + Math.exp(-(x + chosen.bias)))));
  });
  draws.push(() => {
    const now = table(cosine), then = table(before), node = el("table"), head = el("tr", {}, el("th", {}, "caption"));
    for (let i = 0; i < pictures; i++) {
      const image = images[i ? `contrast.picture.${i}` : "picture.0"], small = canvas(64, 64, i ? `another picture, ${i}` : "this picture");
      if (image) small.getContext("2d").drawImage(image, 0, 0, 64, 64);
      head.append(el("th", {}, small, i ? `another, ${i}` : "this picture"));
    }
    node.append(head);
    captions.forEach((caption, j) => {
      const line = el("tr", {}, el("td", {}, caption, j >= pictures ? el("small", {}, "made wrong") : null));
      for (let i = 0; i < pictures; i++) {
        const changed = Math.abs(now[i][j] - then[i][j]) > 5e-4;
        line.append(el("td", { class: `${i === j ? "here" : ""} ${changed ? "settled" : ""}` }, percent(now[i][j]), el("small", {}, `cosine ${round(cosine(i, j))}${changed ? ", moved" : ""}`)));
      }
      node.append(line);
    });
    holder.replaceChildren(node);
    sliders[0].show(round(chosen.scale, 1) + (Math.abs(chosen.scale - start.scale) < 0.06 ? " (as learned)" : ""));
    sliders[1].show(round(chosen.bias, 1) + (Math.abs(chosen.bias - start.bias) < 0.06 ? " (as learned)" : ""));
    const rivals = captions.map((_, j) => j).filter((j) => j >= pictures && cosine(0, j) > cosine(0, 0) - 0.02).length;
    note.textContent = `Framed: the caption that the language model wrote for the picture. ${rivals ? `${rivals} of the captions that were made wrong fit as well as the true one, as far as the pair can tell: ` +
      "it never had to tell such pairs apart. Hard negatives are what such training lacks." : "The true caption leads those that were made wrong."} ` +
      (chosen.softmax ? "Under the softmax each column sums to 1 over the captions: moving one cell moves them all." : "Under the sigmoid each cell is a question of its own: moving one leaves the others where they are, and none need fit.");
  });
}
