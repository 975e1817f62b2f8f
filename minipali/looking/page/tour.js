// --- the lines of source behind a panel, and the recorder's names to copy -------------------------------------------------
function buildSources() {
  for (const [panel, { code, taps }] of Object.entries(texts.sources)) {
    const section = byId(panel);
    if (section.hidden) continue;
    const inside = el("div"), details = el("details", {}, el("summary", {}, "The code that computed this"), inside);
    for (const { file, line, name, code: lines } of code) inside.append(el("p", {}, el("code", {}, `${file}:${line}`), ` ${name}`), el("pre", { tabindex: 0 }, lines));
    const rows = taps.map((tap) => {
      const name = el("code"), button = el("button", { type: "button" }, "Copy the name");
      button.addEventListener("click", async () => {
        try { await navigator.clipboard.writeText(name.textContent); button.textContent = "Copied"; }
        catch { getSelection().selectAllChildren(name); button.textContent = "Selected: copy it"; }
      });
      draws.push(() => {
        const layer = tap.startsWith("vision") ? state.v : oneLayer(), wanted = `activations["${tap.replace("{}", layer)}"]`;
        if (name.textContent !== wanted) { name.textContent = wanted; button.textContent = "Copy the name"; }
      });
      return el("p", { class: "tap" }, name, button);
    });
    if (rows.length) inside.append(el("p", {}, "Recorded (with record(attention=True) as activations) under:"), ...rows);
    section.append(details);
  }
}

// --- what is left out -------------------------------------------------------------------------------------------------------
function buildLeftOut() {
  const list = body("left-out"), missing = (count, name) => Array.from({ length: count || 0 }, (_, i) => i).filter((i) => !has(`${name}.${i}`));
  const lines = Object.entries(texts.leftOut).map(([what, why]) => `${what}: ${why}`);
  for (const [count, name, what] of [[layers, "decoder.heads", "single heads of the language model"], [texts.visionLayers, "vision.heads", "single heads of the vision tower"],
    [texts.visionLayers, "vision.mean", "attention of the vision tower"], [layers, "rope.q", "queries and keys"]]) {
    const gone = missing(count, name);
    if (gone.length) lines.push(`${what}: ${gone.length === count ? "all layers" : `layers ${gone.join(", ")}`} did not fit into the page`);
  }
  lines.forEach((line) => list.append(el("li", {}, line)));
  byId("left-out").hidden = !lines.length;
}

// --- the tour -----------------------------------------------------------------------------------------------------------------
function tourStops() {
  const { step, patch, layer } = texts.tour, name = token(texts.steps[step]);
  return [
    ["answer", { t: step }, `A language model says one token at a time. This is about "${name}", token ${step + 1} of the answer: see how sure the model was, and what it would have said instead.`],
    ["picture", { t: step, p: patch, l: -1, h: -1 }, `Three maps for "${name}". They often agree on the place and never on everything: looking, mattering a little and mattering at all are three questions.`],
    ["picture", { t: step, p: patch }, "Below the maps stands what the model says when a window of 2 × 2 patches is painted over. Move the window with the arrow keys, and watch the marked tokens."],
    ["patch", { p: patch }, "How did the picture get in? As squares of pixels; every square became a token by the same kernels, and a row of the position table was added."],
    ["vision", { p: patch, v: Math.max(0, (texts.visionLayers || 1) - 1) }, "Layer by layer the patches exchange what they know. In the lower maps, things grow out of the noise."],
    ["sequence", {}, "Picture, prompt and answer are one sequence. Try the switch: a causal mask would keep the picture from looking at the question."],
    ["attention", { t: step, l: layer, h: -1 }, "From the place that predicts, how much goes to the picture, to the first token, to the prompt, to the answer so far? Change layer and head above."],
    ["lens", { t: step }, "If the model ended earlier, what would it say? At first the token that it just read, and late the next one."],
    ["next", { t: step }, "Now choose otherwise: raise the temperature until other tokens get a share, then cut them off with top-k or top-p."],
    ["cache", { t: steps - 1 }, "All this was computed once for each token and kept. The bars show what that saves. The end; every panel below has its code, and the link in the address bar keeps what you chose."],
  ].filter(([panel]) => !byId(panel).hidden);
}

function buildTour() {
  const stops = tourStops(), box = byId("tour"), start = byId("tour-start");
  let at = -1;
  const count = { 10: "ten", 9: "nine", 8: "eight", 7: "seven", 6: "six", 5: "five" }[stops.length] || stops.length;
  start.textContent = `Take the tour: ${count} steps`;
  const text = el("p"), back = el("button", { type: "button", onclick: () => show(at - 1) }, "Back"), next = el("button", { type: "button", onclick: () => show(at + 1) });
  const end = el("button", { type: "button", onclick: () => close() }, "End the tour (Esc)");
  box.append(el("div", {}, text, el("div", { class: "row tight" }, back, next, end)));
  function close() {
    document.querySelectorAll(".touring").forEach((node) => node.classList.remove("touring"));
    box.hidden = true;
    at = -1;
    start.focus();
  }
  function show(number) {
    if (number < 0) return;
    if (number >= stops.length) { close(); return; }
    at = number;
    const [panel, change, words] = stops[at];
    box.hidden = false;
    document.querySelectorAll(".touring").forEach((node) => node.classList.remove("touring"));
    byId(panel).classList.add("touring");
    go(change);
    byId(panel).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block: "start" });
    text.textContent = `${at + 1} of ${stops.length}. ${words}`;
    back.disabled = at === 0;
    next.textContent = at === stops.length - 1 ? "Finish" : "Next";
    next.focus({ preventScroll: true });
  }
  start.addEventListener("click", () => show(0));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !box.hidden) close(); });
}

// --- start --------------------------------------------------------------------------------------------------------------------
function begin() {
  byId("asked").replaceChildren("Asked: ", el("b", {}, texts.question === null ? "(token ids)" : texts.question), ". Answered: ",
    el("b", {}, texts.text.slice(texts.prompt).map(plain).join("") || "(nothing)"));
  byId("about").textContent = `${texts.family}, ${texts.parameters.toLocaleString("en")} parameters, from ${texts.model}. ` + (texts.grid ?
    `The picture was squeezed to ${texts.size} × ${texts.size} pixels and cut into ${texts.grid} × ${texts.grid} patches; ` : "No picture; ") + `the language model has ${layers} layers with ${texts.heads} heads.`;
  const panels = { answer: buildAnswer, picture: buildPicture, patch: buildPatch, vision: buildVision, sequence: buildSequence, attention: buildAttention,
    stream: buildStream, lens: buildLens, next: buildNext, cache: buildCache, rope: buildRope, norm: buildNorm, contrast: buildContrast, boxes: buildBoxes };
  for (const panel of Object.keys(panels)) byId(panel).hidden = panel in texts.leftOut;
  buildControls();
  for (const [panel, build] of Object.entries(panels)) if (!byId(panel).hidden) build();
  buildSources();
  buildLeftOut();
  buildTour();
  for (const name of Object.keys(arrays)) if (/^(contrast\.)?picture\.\d+$/.test(name)) loadImage(name);
  addEventListener("hashchange", () => go(fromLink()));
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  go({ t: texts.tour.step, p: texts.tour.patch, v: bounds.v[1], ...fromLink() });
}
begin();
