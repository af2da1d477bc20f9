/* The estimator's page: reads the form, shows what estimate.js says, keeps the address. */
"use strict";

(() => {
const $ = (id) => document.getElementById(id);
const form = $("e-form");
if (!form) return;
const data = JSON.parse($("estimator-data").textContent);
const F = everyByteFormulas(data), fit = everyByteFit(data, F), root = $("estimator");
const KINDS = Object.keys(data.kinds);
const SIZES = ["model_type", ...data.sizes, "tie_word_embeddings"];
const NUMBERS = [...data.sizes, "batch", "length", "rank", "gpus", "gib", "utilization"];
const OTHERS = [...SIZES, "model", "card", "gib", "utilization"]; // what no setup has
const LARGEST = 10n ** 12n; // of a typed number
const controls = [...form.elements].filter((control) => control.name);
const control = (name) => form.elements.namedItem(name);
const get = (c) => (c.type === "checkbox" ? (c.checked ? "1" : "") : c.value.trim());
const set = (c, value) => {
  if (c.type === "checkbox") c.checked = Boolean(value) && value !== "0";
  else c.value = value;
};
const start = Object.fromEntries(controls.map((c) => [c.name, get(c)]));

// Numbers as text

const GB = 10n ** 9n, MB = 10n ** 6n, GiB = 2 ** 30;
const grouped = (n) => n.toLocaleString("en-US");
const short = (n) => {
  const sign = n < 0n ? "−" : "", size = n < 0n ? -n : n;
  const [unit, name] = size >= GB ? [GB, "GB"] : [MB, "MB"];
  const hundredths = (size * 100n + unit / 2n) / unit;
  return `${sign}${grouped(hundredths / 100n)}.${String(hundredths % 100n).padStart(2, "0")} ${name}`;
};
const percent = (n, all) => (all ? Number((n * 1000n + all / 2n) / all) / 10 : 0);
const gib = (n) => (Number(n) / GiB).toFixed(1).replace(/\.0$/, "");
let inBytes = false;
const element = (tag, text, attributes = {}) => {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

const cell = (n) => { // in GB, or on demand in bytes
  const made = document.createElement("td");
  made.append(element("data", inBytes ? grouped(n) : short(n), { value: n, title: `${grouped(n)} B` }));
  return made;
};

// From the form to the formulas

function whole(name) {
  const text = get(control(name)).replace(/[ ,_\u202f\u00a0]/g, "");
  if (text === "" && (name === "gib" || SIZES.includes(name))) return 0n;
  if (!/^\d+$/.test(text)) {
    throw new Refusal(name, get(control(name)), "a whole number, such as 1024");
  }
  if (BigInt(text) > LARGEST) {
    throw new Refusal(name, BigInt(text), `at most ${grouped(LARGEST)}`);
  }
  return BigInt(text);
}

const usable = (nbytes) => { // the driver keeps the rest
  const [part, most] = data.kept_by_driver.map(BigInt);
  return nbytes - (nbytes / part < most ? nbytes / part : most);
};

function read() {
  const values = {}, refused = [];
  if (!isModel(get(control("model")))) {
    refused.push(new Refusal("model", get(control("model")),
      "a model of the list: type a part of its name and choose, or paste its config.json below"));
  }
  for (const c of controls) values[c.name] = c.type === "checkbox" ? c.checked : c.value || null;
  for (const name of NUMBERS) {
    try {
      values[name] = whole(name);
    } catch (error) {
      refused.push(error);
    }
  }
  if (refused.length) return { refused };
  try {
    const sizes = F.dimensions(Object.fromEntries(SIZES.map((name) => [name, values[name]])));
    const setup = Object.fromEntries(
      Object.entries(values).filter(([name]) => !OTHERS.includes(name)));
    const [capacity, ...rest] = values.gib
      ? [usable(values.gib * BigInt(GiB)), ...data.unknown_card]
      : data.cards[values.card].map(BigInt);
    const ofCard = rest.slice(0, 2);
    let limits = rest.slice(2);
    if (values.gib && capacity >= BigInt(data.large_card[0])) limits = data.large_card.slice(1);
    const card = values.gib ? `a card of ${grouped(values.gib)} GiB` : values.card;
    const held = F.memory(sizes, setup, ...ofCard);
    return { sizes, setup, card, capacity, ofCard, limits, held, refused, utilization: values.utilization };
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return { refused: [error] };
  }
}

const isModel = (name) => name === "own" || Object.hasOwn(data.models, name);

// A refusal in a reader's words.
function inPlainWords({ what, value, expected }) {
  const label = control(what) && form.ownerDocument.querySelector(`label[for=e-${what}]`);
  const said = value === null || value === "" ? "nothing" : typeof value === "string" ? `“${value}”` : String(value);
  return `${label ? label.textContent : what}: ${said} does not work here. Expected ${expected}.`;
}

function showRefusals(refused) {
  for (const c of controls) {
    const error = refused.find(({ what }) => what === c.name), at = $(`e-${c.name}-error`);
    if (error) c.setAttribute("aria-invalid", "true");
    else c.removeAttribute("aria-invalid");
    at.hidden = !error;
    at.textContent = error ? inPlainWords(error) : "";
    if (error && SIZES.includes(c.name)) $("e-sizes").open = true;
  }
}

// What a kind is, in words

const bytesOf = (dtype) => {
  const [n, d] = F.bytes(dtype);
  return `${Number(n) / Number(d)} B (${dtype})`;
};

function inWords(kind, { sizes, setup, held }) {
  const count = F.parameters(sizes), adapters = setup.rank ? F.loraParameters(sizes, setup.rank) : 0n;
  const trained = setup.rank ? adapters : count, training = setup.task === "training";
  const batch = grouped(setup.batch), length = grouped(setup.length);
  const layers = grouped(sizes.num_hidden_layers);
  const autocast = F.usesAutocast(setup), computed = autocast ? setup.amp : setup.dtype;
  const own = (setup.rank && setup.adapters) || setup.dtype, words = grouped(sizes.vocab_size);
  const { none, note } = data.kinds[kind], work = `${batch} × ${length} tokens`;
  const split = setup.gpus > 1n && F.splits(setup, kind)
    ? `; divided by ${grouped(setup.gpus)} GPUs, rounded up to a whole byte` : "";
  switch (kind) {
    case "parameters":
      return (setup.quantised
        ? `${grouped(count)} parameters: the layers' matrices in ${data.stored[setup.quantised].label} with their scales, the rest × ${bytesOf(setup.dtype)}`
        : `${grouped(count)} parameters × ${bytesOf(setup.dtype)}`)
        + (training && adapters ? `; and ${grouped(adapters)} of LoRA × ${bytesOf(own)}` : "") + split;
    case "gradients":
      return training
        ? `one for each trained parameter: ${grouped(trained)} × ${bytesOf(setup.gradients ?? own)}${split}`
        : none;
    case "optimizer_states":
      return training
        ? data.optimizers[setup.optimizer].remembers
          + (setup.optimizer === "sgd" || setup.optimizer.includes("8-bit") ? ""
            : `, ${grouped(trained)} parameters, ${bytesOf(setup.states ?? own)} each number`)
          + (setup.master_weights && F.width(setup.dtype) < 4n ? "; and an FP32 copy of each" : "") + split
        : none;
    case "activations": {
      if (!training) return none;
      const layer = F.layerActivations(sizes, setup.batch, setup.length, computed,
        { ...setup, autocast, adapters: autocast ? computed : own });
      const scores = setup.attention === "eager" ? ", a score for each pair of tokens and head included" : "";
      return (setup.checkpointing
        ? `the inputs of ${layers} layers, and one layer made again: ${grouped(layer)} B${scores}`
        : `${layers} layers × ${grouped(layer)} B for ${work}${scores}`)
        + "; and the last norm" + (autocast ? "; norms stay in FP32, and each matrix keeps its own copy of what it reads" : "");
    }
    case "logits":
      return training
        ? `a score for each of ${words} words at ${work}, ${bytesOf(computed)}; and their logarithms${autocast ? ", in FP32 as well" : ""}`
        : `a score for each of ${words} words for ${batch} next tokens, ${bytesOf(setup.dtype)}`;
    case "kv_cache":
      return training || !held.kv_cache ? none
        : `2 (key and value) × ${layers} layers × ${grouped(sizes.num_key_value_heads)} heads of ${grouped(sizes.head_dim)} numbers × ${F.isOther(sizes) ? "2 texts of " : ""}${work} × ${bytesOf(setup.cache_dtype ?? setup.dtype)}`;
    case "cast_weights":
      return held.cast_weights ? `autocast's copy of each matrix, ${bytesOf(setup.amp)} a number, until backward has used it`
        : none;
    case "rounding":
      return note + (setup.load === "to" ? none : "");
    default:
      return note;
  }
}

// Showing

let shown = null, before = null; // the result, and what its changes are told from

const moment = (held, name) => held.moments.find(([known]) => known === name)[1];
const PARTS = { held: ["held at rest", "parameters"], peak: ["at the peak, on top", "activations"],
  margin: ["fragmentation, at most", "rounding"], context: ["CUDA context", "context"] };

// A row that explains itself when pointed at or reached by the Tab key.
function explained(row, button, tell) {
  for (const event of ["focus", "click"]) button.addEventListener(event, tell);
  row.addEventListener("mouseenter", tell);
  return button;
}

function showMoments({ held }) {
  $("e-moments").replaceChildren(...held.moments.map(([name, nbytes], index) => {
    const peak = name === held.peakAt, row = element("tr", "", { class: peak ? "total" : "" });
    const button = element("button", peak ? `${name} (the peak)` : name, { type: "button" });
    const head = element("th", "", { scope: "row" });
    head.append(explained(row, button, () => explainMoment(index)));
    row.append(head, cell(nbytes));
    return row;
  }));
}

function explainMoment(index) {
  const [name, nbytes, terms] = shown.held.moments[index];
  const sum = terms.filter(([, n]) => n).map(([what, n], i) =>
    `${n < 0n ? "− " : i ? "+ " : ""}${short(n < 0n ? -n : n)} (${what})`).join(" ");
  $("e-moment").textContent = `${name}: ${sum || "nothing"}. That is ${grouped(nbytes)} B.`;
  $("e-moment").dataset.index = index;
}

function showBar({ held, card, capacity }, all) {
  const rest = moment(held, "at rest");
  const sizes = { held: rest, peak: held.peak - rest, margin: held.margin, context: held.context };
  const scale = all > capacity ? all : capacity;
  const bar = $("e-bar"), parts = Object.keys(PARTS).filter((part) => sizes[part]);
  bar.replaceChildren(...parts.map((kind) => {
    const part = element("span", "", { "data-part": kind, title: PARTS[kind][0] });
    part.style.width = `${percent(sizes[kind] * 100n, scale) / 100}%`;
    part.style.background = data.kinds[PARTS[kind][1]].color;
    return part;
  }));
  const limit = element("span", "", { class: "limit" });
  limit.style.left = `${percent(capacity * 100n, scale) / 100}%`;
  bar.append(limit);
  bar.setAttribute("aria-label", `Stacked bar of ${short(all)} on one GPU: ` + parts.map((kind) =>
    `${PARTS[kind][0]} ${short(sizes[kind])}, ${percent(sizes[kind], all)} %`).join("; ")
    + `. The card has ${gib(capacity)} GiB for programs.`);
  $("e-scale").textContent = `${card}: ${gib(capacity)} GiB`;
  $("e-scale").style.setProperty("--at", limit.style.left);
  $("e-scale").classList.toggle("left", percent(capacity, scale) < 50);
}

function showTable({ held }, all) {
  const rows = [...KINDS.map((kind) => [kind, held[kind], before && held[kind] - before[kind]]),
    [null, all, before && all - F.total(before)]];
  $("e-table").replaceChildren(...rows.map(([kind, nbytes, change]) => {
    const row = element("tr", "", kind ? { "data-kind": kind } : { class: "total" });
    row.classList.toggle("none", !nbytes);
    const name = element("th", kind ? "" : "in all", { scope: "row" });
    if (kind) {
      const button = element("button", data.kinds[kind].name, { type: "button" });
      const swatch = element("span", "", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = data.kinds[kind].color;
      button.prepend(swatch);
      name.append(explained(row, button, () => explain(kind)));
    }
    const changed = change ? (change > 0n ? "+" : "") + short(change) : "";
    row.append(name, cell(nbytes),
      element("td", `${percent(nbytes, all).toFixed(1)} %`, { class: "share" }), element("td", changed));
    return row;
  }));
}

function explain(kind) {
  $("e-formula").textContent = `${data.kinds[kind].name}: ${inWords(kind, shown)}. `
    + `That is ${grouped(shown.held[kind])} B.`;
  $("e-formula").dataset.kind = kind;
  for (const part of document.querySelectorAll("#estimator [data-kind]")) {
    part.classList.toggle("pointed", part.dataset.kind === kind);
  }
}

function showServing({ sizes, setup, card, capacity, ofCard, limits, utilization }) {
  $("e-serving").hidden = setup.task !== "inference" || F.isOther(sizes);
  if ($("e-serving").hidden) return;
  const rows = [];
  try {
    if (data.kind_of[card] === "Apple") throw new Refusal("card", "Apple's", "one that vLLM shares out: of NVIDIA or AMD");
    const served = fit.serve(sizes, { ...setup, utilization }, [capacity, ofCard[0], ...limits]);
    const each = setup.gpus > 1n ? `${grouped(setup.gpus)} GPUs, each ${card},` : card;
    $("e-users").textContent = served.users
      ? `vLLM on ${each} serves ${grouped(served.users)} users of ${grouped(setup.length)} tokens at a time, estimated: its cache holds ${grouped(served.tokens)} tokens of ${grouped(served.token)} B.`
      : `vLLM on ${each} serves nobody at this length: ${served.tokens ? `its cache holds only ${grouped(served.tokens)} tokens` : "nothing is left for its cache"}.`;
    rows.push(["weights", served.weights], ["a step, at its peak", served.activations],
      ["outside PyTorch", served.non_torch], ["CUDA graphs, at most", served.graphs],
      ["KV cache", served.kv_cache], [`${grouped(utilization)} % of the card`, served.allowed]);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("e-users").textContent = inPlainWords(error);
  }
  $("e-served").replaceChildren(...rows.map(([name, nbytes]) => {
    const row = document.createElement("tr");
    row.append(element("th", name, { scope: "row" }), cell(nbytes));
    return row;
  }));
}

function showCards({ sizes, setup }) {
  $("e-cards").replaceChildren(...Object.entries(data.cards).map(([name, [capacity, ...ofCard]]) => {
    const row = document.createElement("tr");
    const says = F.verdict(F.memory(sizes, setup, ...ofCard), BigInt(capacity));
    const kind = data.kind_of[name], alone = kind && kind !== "AMD"; // no ZeRO over those
    const needed = alone ? undefined : fit.gpusNeeded(sizes, setup, capacity, ofCard);
    row.append(element("th", kind ? `${name} (estimated)` : name, { scope: "row" }), element("td", gib(capacity)),
      element("td", says, { class: says === "fits" ? "fits" : "" }),
      element("td", alone ? "–" : needed === null ? `over ${grouped(data.most_gpus)}` : grouped(needed)));
    return row;
  }));
}

// A button that changes fields of the form, and keeps the focus near.
function lever(list, name, change, after) {
  const item = document.createElement("li"), button = element("button", name, { type: "button" });
  button.addEventListener("click", () => {
    for (const [what, value] of Object.entries(change)) set(control(what), value === null ? "" : String(value === true ? 1 : value || ""));
    update(true);
    ($(list).querySelector("button") ?? $("e-single")).focus();
  });
  item.append(button, after);
  return item;
}

function showLevers({ sizes, setup, card, capacity, ofCard, held }, all) {
  const found = fit.levers(sizes, setup, ofCard), fits = all <= capacity;
  const ways = fits ? [] : fit.shortest(sizes, setup, capacity, ofCard);
  const most = grouped(BigInt(fit.mostSequences(sizes, setup, capacity, ofCard)));
  const batch = `The largest batch at this length that fits: ${most}.`;
  if (fits) $("e-ways-note").textContent = `It fits on ${card} with ${short(capacity - all)} to spare. ${batch}`;
  else {
    const may = held.least <= capacity;
    $("e-ways-note").textContent = (may
      ? `The peak fits, but with ${short(all - capacity)} more it fits for certain, however memory is cut up. `
      : `${short(held.least - capacity)} too much for ${card}. `) + (ways.length ? "As few changes as there can be:" : `No ${data.most_changes} changes together are enough.`);
  }
  $("e-ways").replaceChildren(...ways.slice(0, 6).map(({ names, change, needed }) =>
    lever("e-ways", names.join(" + "), change, ` needs ${short(needed)}: fits`)));
  $("e-levers-note").textContent = found.length ? "The one that saves most first:" : "Nothing is left to change.";
  $("e-levers").replaceChildren(...found.map(({ name, change, saved }) =>
    lever("e-levers", name, change, ` saves ${short(saved)}, leaves ${short(all - saved)}`
      + (!fits && all - saved <= capacity ? ": fits" : ""))));
}

function showPresets({ setup }) { // which of them this is, whatever the batch, length and GPUs
  const apart = ["batch", "length", "gpus", "sharding", "load"];
  let pressed = false;
  for (const button of root.querySelectorAll("[data-preset]")) {
    const preset = data.presets[button.dataset.preset];
    const many = (batch) => preset.task === "inference" && Number(batch) > 1;
    const is = !pressed && many(preset.batch) === many(setup.batch) && Object.entries(preset).every(([name, value]) =>
      apart.includes(name) || String(value ?? "") === String(setup[name] ?? ""));
    button.setAttribute("aria-pressed", String(is));
    pressed ||= is;
  }
}

function summary({ setup, card, capacity, held }) {
  const all = held.needed;
  const model = control("model").value === "own" ? "your model" : control("model").value;
  const gpus = setup.gpus > 1n ? ` on each of ${grouped(setup.gpus)} GPUs` : "";
  const says = F.verdict(held, capacity), size = says === "fits" ? all : held.least;
  return `It ${says} on ${card}: ${says === "fits" ? "" : "at least "}${short(size)}${gpus}, estimated, `
    + `for ${setup.task} with ${model}, of ${short(capacity)} (${gib(capacity)} GiB) that programs can have.`;
}

let speaking;
function say(text) { // to screen readers, once typing has paused
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("e-status").textContent = text; }, 600);
}

// The form, from one state to the next

function fillSizes() {
  const model = data.models[control("model").value];
  if (model) for (const name of SIZES) set(control(name), String(model[name] || ""));
}

// Some models have learned so many positions and no more: the length becomes them, and says so.
function clampLength() {
  const traits = data.traits[get(control("model_type"))], length = Number(get(control("length")));
  const most = traits.includes("learned positions") ? Number(get(control("max_position_embeddings"))) || Infinity : Infinity;
  if (!(length > most || traits.includes("images"))) return;
  set(control("length"), String(most));
  $("e-note").textContent = `The length is ${grouped(most)} tokens now, as many positions as the model has learned.`;
}

function update(remember, typing = false) {
  const task = control("task").value;
  for (const part of form.querySelectorAll("[data-task]")) part.hidden = part.dataset.task !== task;
  const now = read();
  showRefusals(now.refused);
  $("estimator").classList.toggle("stale", now.refused.length > 0);
  if (remember !== undefined) keepAddress(remember);
  if (now.refused.length) {
    $("e-rest").textContent = "";
    $("e-headline").textContent = "Fix the marked field"
      + (shown ? ". The result below is still for your last valid choice." : ".");
    say(inPlainWords(now.refused[0]));
    return;
  }
  if (!typing) before = shown?.held;
  shown = now;
  const all = now.held.needed;
  for (const name of data.sizes) { // what follows from the others
    control(name).placeholder = now.sizes[name] ? String(now.sizes[name]) : "none";
  }
  $("e-headline").textContent = summary(now);
  $("e-headline").classList.toggle("fits", all <= now.capacity);
  $("e-headline").classList.toggle("may", F.verdict(now.held, now.capacity) === "may fit");
  $("e-rest").textContent = `${short(moment(now.held, "at rest"))} stay from step to step; `
    + `the peak is ${short(now.held.peak)} (${now.held.peakAt}).`
    + (now.held.host ? ` On the host lie ${short(now.held.host)} for each GPU.` : "");
  const kind = data.kind_of[now.card];
  $("e-rule").textContent = kind ? `Estimated by a rule, not measured: ${data.rules[kind]}` : "";
  showPresets(now);
  say(summary(now));
  showBar(now, all);
  showMoments(now);
  showTable(now, F.total(now.held));
  showLevers(now, all);
  showServing(now);
  showCards(now);
  $("e-embed").textContent = `<iframe src="${location.href}" title="Every Byte: the estimator" width="100%" height="800"></iframe>`;
  if ($("e-formula").dataset.kind) explain($("e-formula").dataset.kind);
  if ($("e-moment").dataset.index in now.held.moments) explainMoment($("e-moment").dataset.index);
}

function keepAddress(remember) {
  const state = new URLSearchParams();
  const own = control("model").value === "own";
  for (const c of controls) {
    if (SIZES.includes(c.name) ? own && get(c) : get(c) !== start[c.name]) state.set(c.name, get(c));
  }
  const hash = String(state) && `#${state}`;
  if (hash !== location.hash) {
    history[remember ? "pushState" : "replaceState"](null, "", hash || location.pathname);
  }
}

function restore(text) {
  const state = new URLSearchParams(text), unknown = [];
  for (const c of controls) set(c, start[c.name]);
  const own = state.get("model") === "own";
  if (own) for (const name of SIZES) set(control(name), "");
  if (own) control("model_type").selectedIndex = 0;
  for (const [name, value] of state) {
    const c = control(name);
    if (!c || (c.tagName === "SELECT" && ![...c.options].some((option) => option.value === value))
      || (name === "model" && !isModel(value))) {
      unknown.push(`${name}=${value}`);
    } else set(c, value);
  }
  fillSizes();
  if (own) $("e-sizes").open = true;
  $("e-look").textContent = "";
  $("e-note").textContent = "";
  if (!state.has("length")) clampLength();
  if (unknown.length) $("e-note").textContent = `The address asks for what this page does not know: ${unknown.join(", ")}.`;
}

let typed = null; // the field whose keystrokes make one change
root.addEventListener("focusin", () => { typed = null; });
root.addEventListener("input", ({ target }) => {
  if (target.form !== form || !target.name) return;
  if (target.name === "model") {
    const typing = target.value.trim().toLowerCase();
    const found = [...Object.keys(data.models), "own"].find((name) => name.toLowerCase() === typing);
    if (!found) return; // a part of a name: the browser lists what has it
    target.value = found;
    $("e-note").textContent = "";
    fillSizes();
    clampLength();
  } else if (SIZES.includes(target.name)) control("model").value = "own";
  update(false, target === typed);
  typed = target.type === "text" ? target : null;
});
const model = control("model");
model.addEventListener("focus", () => model.select()); // so that typing searches anew
model.addEventListener("change", () => {
  if (!isModel(get(model))) update(false);
});
form.addEventListener("submit", (event) => event.preventDefault());
for (const button of document.querySelectorAll("#estimator .tasks button")) {
  button.addEventListener("click", () => {
    restore(button.dataset.state);
    update(true);
    $("e-look").textContent = button.dataset.look;
  });
}
for (const button of root.querySelectorAll("[data-preset]")) {
  button.addEventListener("click", () => {
    for (const [name, value] of Object.entries(data.presets[button.dataset.preset])) {
      if (!["gpus", "sharding", "load"].includes(name)) set(control(name), value === true ? "1" : String(value || (value === 0 ? 0 : "")));
    }
    $("e-note").textContent = "";
    clampLength();
    update(true);
  });
}
$("e-bytes").addEventListener("click", ({ target }) => {
  inBytes = !inBytes;
  target.setAttribute("aria-pressed", String(inBytes));
  if (shown) {
    showMoments(shown);
    showTable(shown, F.total(shown.held));
    showServing(shown);
  }
});

// A config.json, pasted, chosen or dropped

function take(text) {
  const at = $("e-config-error");
  at.textContent = "";
  try {
    const sizes = text.trim() ? fit.fromConfig(text) : null;
    if (sizes) {
      control("model").value = "own";
      for (const name of SIZES) set(control(name), String(sizes[name] || ""));
      $("e-sizes").open = true;
      $("e-note").textContent = "";
      if (F.isOther(sizes)) set(control("task"), "inference");
      clampLength();
      update(true);
    }
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    at.textContent = error.message;
  }
  at.hidden = !at.textContent;
}
const takeFile = (file) => file?.text().then(take);
$("e-config").addEventListener("input", ({ target }) => take(target.value));
$("e-file").addEventListener("change", ({ target }) => takeFile(target.files[0]));
root.addEventListener("dragover", (event) => event.preventDefault());
root.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  takeFile(event.dataTransfer.files[0]);
});
$("e-reset").addEventListener("click", () => {
  restore("");
  update(true);
});
const fromAddress = () => { // leaves the addresses of headings alone
  if (!location.hash || location.hash.includes("=")) {
    restore(location.hash.slice(1));
    update();
  }
};
window.addEventListener("popstate", fromAddress);
restore(location.hash.includes("=") ? location.hash.slice(1) : "");
update();
})();
