// --- the sequence and its mask ------------------------------------------------------------------------------------------
function buildSequence() {
  const chips = el("div", { class: "chips" }), causal = el("input", { type: "checkbox", onchange: () => redraw() }), note = el("p", { class: "note" });
  const cell = Math.max(1, Math.floor(560 / sequence)), node = canvas(cell * sequence, cell * sequence, "who may look at whom");
  body("sequence").append(chips);
  if (!has("mask.0")) { body("sequence").append(el("p", { class: "note" }, "The mask did not fit into this page.")); }
  else body("sequence").append(el("label", { class: "check" }, causal, "if it were causal: what would be lost"), el("div", { class: "scroll" }, node), note);
  draws.push(() => {
    const reader = texts.patches + texts.prompt - 1 + state.t;
    chips.replaceChildren();
    if (texts.patches) chips.append(el("span", { class: "prefix" }, `${texts.patches} picture tokens`));
    texts.text.forEach((index, i) => chips.append(el("span",
      { class: `${texts.patches + i < texts.prefix ? "prefix" : ""} ${texts.patches + i === reader ? "chosen" : ""}` }, token(index))));
    const mask = `mask.${texts.maskOfLayer[oneLayer()]}`, window = texts.windows[oneLayer()];
    if (!has(mask)) return;
    const pen = node.getContext("2d"), mix = mixer();
    let seen = 0, lost = 0;
    for (let q = 0; q < sequence; q++) {
      for (let k = 0; k < sequence; k++) {
        const may = bit(mask, q, k), ahead = may && k > q;
        seen += may;
        lost += ahead ? 1 : 0;
        pen.fillStyle = mix(!may ? 0.06 : ahead && causal.checked ? 0.3 : q === reader ? 1 : 0.75);
        pen.fillRect(k * cell, q * cell, cell, cell);
        if (ahead && causal.checked && cell > 3) { pen.fillStyle = color("--paper"); pen.fillRect(k * cell + cell / 3, q * cell + cell / 3, cell / 3, cell / 3); }
      }
    }
    pen.fillStyle = color("--focus");
    for (const edge of [texts.patches, texts.patches + texts.prompt]) {
      pen.fillRect(edge * cell - 1, 0, 1, node.height);
      pen.fillRect(0, edge * cell - 1, node.width, 1);
    }
    note.textContent = `Filled: may look (${seen} of ${sequence ** 2} pairs); the lines part picture, prompt and answer. ` +
      (lost ? `${lost} of the pairs look ahead, inside the prefix: with a causal mask the picture could not look at the question.` : "No token looks ahead here: this model reads its prompt from left to right.") +
      (window ? ` Layer ${oneLayer()} has a sliding window: a token forgets what is ${window} or more places behind it.` : "");
  });
}

// --- attention of the decoder ---------------------------------------------------------------------------------------------
function buildAttention() {
  const sums = el("div"), list = el("div"), note = el("p", { class: "note" });
  body("attention").append(note, sums, el("p", {}, "Token by token:"), el("div", { class: "scroll" }, list));
  draws.push(() => {
    const { row, note: why } = decoderRow(), P = texts.patches, answerStart = P + texts.prompt;
    const total = (a, b) => row.slice(a, b).reduce((x, y) => x + y, 0), all = total(0, sequence) || 1;
    const rows = [];
    if (P) rows.push({ name: `the picture, ${P} tokens`, value: total(0, P) / all, words: true });
    if (texts.bos) rows.push({ name: "the first token, BOS", value: row[P] / all, words: true });
    rows.push({ name: "the rest of the prompt", value: total(P + texts.bos, answerStart) / all, words: true });
    rows.push({ name: "the answer so far", value: total(answerStart, sequence) / all, words: true });
    rows.forEach((r) => { r.text = percent(r.value); });
    note.textContent = `${state.l < 0 ? "Mean of all layers" : `Layer ${state.l}`}, ${state.h < 0 || why ? "mean of all heads" : `head ${state.h}`}. ${why}`;
    sums.replaceChildren(bars(rows));
    const until = texts.prompt + state.t;
    list.replaceChildren(bars(texts.text.slice(0, until).map((index, i) => ({ name: token(index), value: row[P + i] / all, text: percent(row[P + i] / all), chosen: i === until - 1 }))));
  });
}

// --- residual stream ------------------------------------------------------------------------------------------------------
function buildStream() {
  const list = el("div");
  body("stream").append(list);
  draws.push(() => {
    const at = texts.prompt - 1 + state.t, T = texts.text.length, size = arrays["stream.size"].data, added = arrays["stream.added"].data;
    const top = Math.max(...texts.rows.map((_, r) => size[r * T + at]));
    list.replaceChildren(el("p", { class: "note" }, `At ${token(texts.text[at])}, the token that predicts. First part of a bar: what the block added; second part: the rest of the stream's size.`),
      bars(texts.rows.map((name, r) => {
        const now = size[r * T + at], more = r ? Math.min(added[(r - 1) * T + at], now) : now;
        const all = r ? added[(r - 1) * T + at] : now;
        return { name, words: true, value: more / top, more: [Math.max(0, now - more) / top],
          text: r ? `${round(all)} added, stream ${round(now)}` : `${round(now)}`, chosen: Math.ceil(r / 2) - 1 === oneLayer() && r > 0 };
      })));
  });
}

// --- logit lens -------------------------------------------------------------------------------------------------------------
function buildLens() {
  const holder = el("div", { class: "scroll" }), note = el("p", { class: "note" });
  body("lens").append(holder, note);
  draws.push(() => {
    const T = texts.text.length, at = texts.prompt - 1 + state.t, wide = window.innerWidth > 900 && layers < 16 ? 3 : window.innerWidth > 600 ? 2 : 1;
    const from = Math.max(0, Math.min(at - wide, T - 2 * wide - 1)), until = Math.min(T, from + 2 * wide + 1), columns = [];
    for (let i = from; i < until; i++) columns.push(i);
    const table = el("table"), head = el("tr", {}, el("th", {}, "reads"));
    columns.forEach((i) => head.append(el("th", { class: i === at ? "here" : null }, el("span", { class: "token" }, token(texts.text[i])))));
    table.append(head);
    texts.rows.forEach((name, r) => {
      const line = el("tr", {}, el("th", {}, name));
      columns.forEach((i) => {
        const k = r * T + i, rank = arrays["lens.rank"].data[k];
        line.append(el("td", { class: `token ${i === at ? "here" : ""} ${rank === 0 ? "settled" : ""}` }, token(arrays["lens.top"].data[k]),
          el("small", {}, `${percent(arrays["lens.probability"].data[k])} · #${rank + 1}`)));
      });
      table.append(line);
    });
    holder.replaceChildren(table);
    const places = columns.filter((i) => arrays["lens.top"].data[i] === texts.text[i]).length;
    note.textContent = `Tinted and #1: the final choice is already the likeliest. In the first row the lens names the token that was read in ${places} of ${columns.length} columns` +
      (texts.tied ? ": the table that embeds tokens also scores them." : "; this model has a table of its own for scoring.") +
      (has("lens.picture") ? ` On picture tokens it names no sensible words (${Array.from(arrays["lens.picture"].data.slice(0, 5), token).join(", ")}): none was ever looked up in the table for them.` : "");
  });
}

// --- next token -------------------------------------------------------------------------------------------------------------
function buildNext() {
  const chosen = { temperature: 9, k: 50, p: 1 }, list = el("div"), note = el("p", { class: "note" });
  const many = arrays["next.logits"].shape[1], last = texts.temperatures.length - 1;
  const sliders = [
    slider("Temperature", 0, last, 1, 9, (x) => { chosen.temperature = x; redraw(); }),
    slider("Top-k", 1, many, 1, many, (x) => { chosen.k = x; redraw(); }),
    slider("Top-p", 0.05, 1, 0.05, 1, (x) => { chosen.p = x; redraw(); })];
  chosen.k = many;
  body("next").append(el("div", { class: "sliders" }, ...sliders.map((s) => s.node)), list, note);
  draws.push(() => {
    const temperature = texts.temperatures[chosen.temperature], tokens = part("next.tokens", state.t), all = chosen.k === many;
    const logits = Array.from(part("next.logits", state.t)), shift = logits[0] / temperature;
    const weights = logits.map((x) => Math.exp(x / temperature - shift));
    const tail = all ? Math.exp(part("next.rest", state.t)[chosen.temperature] - shift) : 0;
    const kept = weights.slice(0, chosen.k), total = kept.reduce((a, b) => a + b, 0) + tail;
    let sum = 0, count = 0;  // up to and with the token at which the sum reaches p
    while (count < kept.length && (count === 0 || sum / total < chosen.p)) sum += kept[count++];
    const whole = chosen.p >= 1 || sum / total < chosen.p, scale = whole ? total : sum;
    if (whole) count = kept.length;
    sliders[0].show(round(temperature, 1));
    sliders[1].show(all ? "off" : String(chosen.k));
    sliders[2].show(chosen.p >= 1 ? "off" : round(chosen.p));
    list.replaceChildren(bars(logits.slice(0, 10).map((x, i) => {
      const p = i < count ? weights[i] / scale : 0;
      return { name: token(tokens[i]), value: p, text: i < count ? `${percent(p)}, logit ${round(x, 1)}` : `cut off, logit ${round(x, 1)}`, chosen: tokens[i] === texts.steps[state.t] };
    })));
    const rest = 1 - logits.slice(0, 10).reduce((a, _, i) => a + (i < count ? weights[i] / scale : 0), 0);
    note.textContent = `All other tokens together: ${percent(Math.max(0, rest))}. Softmax first subtracts the largest, ${round(shift, 1)}, from all: the same shares, and no exp can overflow. ` +
      (chosen.p < 1 && whole && tail ? "The likeliest 50 hold less than p: the nucleus reaches into tokens that are not in this page." : `${whole && tail ? "All tokens" : count} can be drawn.`);
  });
}

// --- cache ------------------------------------------------------------------------------------------------------------------
function buildCache() {
  const cell = Math.max(2, Math.floor(700 / sequence)), height = Math.max(6, Math.min(14, Math.floor(320 / (2 * layers))));
  const node = canvas(cell * sequence, height * 2 * layers, "the cache"), list = el("div"), note = el("p", { class: "note" });
  body("cache").append(el("div", { class: "scroll" }, node), note, list);
  draws.push(() => {
    const filled = texts.patches + texts.prompt + state.t, pen = node.getContext("2d"), mix = mixer();
    pen.fillStyle = color("--paper");
    pen.fillRect(0, 0, node.width, node.height);
    for (let r = 0; r < 2 * layers; r++) {
      const row = part("cache.content", r), top = Math.max(...row, 1e-9);
      for (let s = 0; s < Math.min(filled, sequence); s++) {
        pen.fillStyle = mix(0.15 + 0.85 * (row[s] / top));
        pen.fillRect(s * cell, r * height, cell, height - 1);
      }
    }
    pen.fillStyle = color("--focus");
    pen.fillRect((texts.patches + texts.prompt) * cell - 1, 0, 1, node.height);
    const bytes = texts.bytesPerToken, start = texts.patches + texts.prompt, computed = start + state.t;
    let without = 0;
    for (let t = 0; t <= state.t; t++) without += start + t;
    note.textContent = `Lines: keys, then values, of each layer (layer 0 at the top). Columns: ${filled} tokens so far, ${bytes.toLocaleString("en")} bytes each ` +
      `(${layers} layers × 2 × ${texts.kvHeads} key/value heads × ${texts.headDim} numbers): ${(filled * bytes).toLocaleString("en")} bytes. ` +
      `With a key/value head for each of the ${texts.heads} query heads it would be ${((filled * bytes * texts.heads) / texts.kvHeads).toLocaleString("en")}.`;
    list.replaceChildren(el("p", {}, "Tokens sent through the layers up to this step:"), bars([
      { name: "with the cache", value: computed / without, text: `${computed}`, words: true },
      { name: "without it", value: 1, text: `${without}, all of them again at each step`, words: true }]));
  });
}
