/* What would make it fit, and what a config.json says: ports of every_byte/estimate/fit.py,
   config.py and serving.py. F are the formulas of estimate.js. */
"use strict";

function everyByteFit(data, F) {
const { refuse, ceil, most: max } = F;
const needed = (sizes, setup, card) => {
  try {
    return F.memory(sizes, setup, ...card).needed;
  } catch (error) { // this model cannot do it
    if (!(error instanceof Refusal)) throw error;
    return null;
  }
};

function changes(setup) {
  const training = setup.task === "training", all = { ...data.levers };
  for (const [name, what] of Object.entries(data.halves)) {
    all[name] = { [what]: (BigInt(setup[what]) + 1n) / 2n };
  }
  all[data.more_gpus] = { gpus: 2n * BigInt(setup.gpus), sharding: "ZeRO 3" };
  const rank = BigInt(setup.rank);
  return Object.fromEntries(Object.entries(all).filter(([, change]) => {
    if ("rank" in change && (!training || rank)) return false;
    if ("attention" in change && setup.attention !== "eager") return false;
    if ("offload" in change && (!training || setup.offload)) return false;
    return !(training && "quantised" in change && !BigInt(change.rank ?? rank));
  }));
}

function levers(sizes, setup, card = []) {
  const now = F.memory(sizes, setup, ...card).needed;
  return Object.entries(changes(setup)).map(([name, change]) => {
    const bytes = needed(sizes, { ...setup, ...change }, card);
    return { name, change, saved: bytes === null ? 0n : now - bytes };
  }).filter(({ saved }) => saved > 0n).sort((a, b) => (a.saved < b.saved ? 1 : a.saved > b.saved ? -1 : 0));
}

function* combinations(names, length, from = 0) {
  if (!length) yield [];
  else {
    for (let i = from; i <= names.length - length; i++) {
      for (const rest of combinations(names, length - 1, i + 1)) yield [names[i], ...rest];
    }
  }
}

function shortest(sizes, setup, capacity, card = []) {
  if (F.memory(sizes, setup, ...card).needed <= BigInt(capacity)) return [];
  const possible = changes(setup), names = data.order.filter((name) => name in possible);
  for (let length = 1; length <= data.most_changes; length++) {
    const found = [];
    for (const chosen of combinations(names, length)) {
      const change = Object.assign({}, ...chosen.map((name) => possible[name]));
      const fields = chosen.reduce((n, name) => n + Object.keys(possible[name]).length, 0);
      if (Object.keys(change).length < fields) continue; // two of them set the same field
      const bytes = needed(sizes, { ...setup, ...change }, card);
      if (bytes !== null && bytes <= BigInt(capacity)) found.push({ names: chosen, change, needed: bytes });
    }
    if (found.length) return found;
  }
  return [];
}

// The last number before `high` for which it holds, as it does for `low`.
function last(low, high, holds) {
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (holds(middle)) low = middle;
    else high = middle;
  }
  return low;
}

// `card`: the bytes of its workspace and of its context.
const fitting = (sizes, setup, capacity, card) => (change) =>
  F.memory(sizes, { ...setup, ...change }, ...card).needed <= BigInt(capacity);

function gpusNeeded(sizes, setup, capacity, card = []) {
  const few = fitting(sizes, setup, capacity, card), fits = (gpus) => few({ gpus, sharding: "ZeRO 3" });
  if (fits(1)) return 1;
  return fits(data.most_gpus) ? last(1, data.most_gpus, (gpus) => !fits(gpus)) + 1 : null;
}

function mostSequences(sizes, setup, capacity, card = []) {
  const few = fitting(sizes, setup, capacity, card), fits = (batch) => few({ batch }), end = data.most_sequences;
  if (!fits(1)) return 0;
  let many = 2;
  while (many < end && fits(many)) many *= 2;
  return many >= end && fits(end) ? end : last(many / 2, many, fits);
}

// The sizes in the text of a config.json

function fromConfig(text) {
  const known = data.config;
  let config;
  try {
    config = JSON.parse(text);
  } catch (_) {
    refuse("config", "what is here", "JSON, as config.json holds it");
  }
  if (config === null || typeof config !== "object" || Array.isArray(config)) {
    refuse("config", "what is here", "an object, as config.json holds one");
  }
  if ("text_config" in config) refuse("text_config", "there", "a language model alone: give what it holds");
  const kind = config.model_type ?? null, lacks = "the model's, as its config.json has it";
  const shown = (value) => (["boolean", "string"].includes(typeof value) || value === null ? value
    : { toString: () => JSON.stringify(value) });
  if (typeof kind !== "string" || !Object.hasOwn(known.required, kind)) {
    refuse("model_type", shown(kind), `one that the formulas describe: ${Object.keys(known.required).join(", ")}`);
  }
  const of = (name) => (Object.hasOwn(config, name) ? config[name] : null);
  const empty = (value) => !value || (typeof value === "object" && !Object.keys(value).length);
  const latent = (data.traits[kind] ?? []).includes("latent") ? known.latent : [];
  for (const name of [...known.required[kind], ...latent]) if (of(name) === null) refuse(name, null, lacks);
  for (const name of known.without) {
    const usual = known.biased.includes(kind) && name === "attention_bias";
    if (!empty(of(name)) && !usual) refuse(name, shown(of(name)), "none, for the formulas do not describe it");
  }
  if ((of("decoder_sparse_step") ?? 1) !== 1) {
    refuse("decoder_sparse_step", shown(of("decoder_sparse_step")), "1, experts in every layer");
  }
  const acts = known.activations[kind] ?? known.gated;
  const act = of(known.names[kind] ?? "hidden_act") ?? acts[0];
  if (!acts.includes(act)) refuse("hidden_act", shown(act), `${acts[0]}, which the formulas describe`);
  const given = { ...config };
  if (kind === "qwen3_moe") {
    given.num_local_experts = of("num_local_experts") ?? of("num_experts");
    given.intermediate_size = config.moe_intermediate_size;
  } else if (latent.length) {
    Object.assign(given, { num_local_experts: of("n_routed_experts"), q_lora_rank: of("q_lora_rank") || 0, head_dim: null });
  } else if (!["mixtral", "gpt_oss"].includes(kind)) given.num_local_experts = given.num_experts_per_tok = 0;
  for (const [name, expected] of Object.entries(known.narrow)) {
    if ((of(name) ?? expected) !== expected) refuse(name, shown(of(name)), `${expected}, which the formulas describe`);
  }
  const same = known.same[kind] ?? kind, names = known.other_names[same];
  let model_type = same;
  if (names) {
    for (const [name, other] of Object.entries(names)) given[name] = of(other);
    given.num_hidden_layers ??= given.encoder_layers;
    if (act === "gated-gelu") model_type = "t5_gated";
    for (const name of kind === "bart" ? known.same_in_both : []) {
      const [one, other] = [`encoder_${name}`, `decoder_${name}`];
      if ((of(other) ?? of(one)) !== of(one)) refuse(other, shown(of(other)), `${shown(of(one))}, as ${one}`);
    }
  } else if (kind === "vit") Object.assign(given, imageSizes(of, shown));
  given.sliding_layers = slidingLayers(of, kind);
  if (!given.sliding_layers) given.sliding_window = 0;
  const tied = given.tie_word_embeddings ?? known.tied.includes(kind);
  if (typeof tied !== "boolean") refuse("tie_word_embeddings", shown(tied), "True or False");
  const sizes = { model_type, tie_word_embeddings: tied };
  for (const name of data.sizes) {
    const value = given[name] ?? given[known.aliases[name]] ?? null;
    if (value === null && known.needed.includes(name)) refuse(name, null, lacks);
    if (value !== null && (!Number.isSafeInteger(value) || value < 0)) {
      refuse(name, shown(value), "a whole number from 0 up");
    }
    sizes[name] = value ?? 0;
  }
  return F.dimensions(sizes);
}

function imageSizes(of, shown) { // a vision transformer's positions and labels
  const [image, patch] = ["image_size", "patch_size"].map((name) => {
    if (!Number.isSafeInteger(of(name)) || of(name) < 1) refuse(name, shown(of(name)), "a whole number from 1 up, of a square");
    return of(name);
  });
  if (!(of("qkv_bias") ?? true)) refuse("qkv_bias", shown(of("qkv_bias")), "True, which the formulas describe");
  const named = of("id2label"), count = named && !Array.isArray(named) && typeof named === "object" ? Object.keys(named).length : 0;
  return { max_position_embeddings: Math.floor(image / patch) ** 2 + 1, tie_word_embeddings: false,
    vocab_size: count || of("num_labels") || data.config.labels };
}

function slidingLayers(of, kind) {
  const types = of("layer_types"), layers = of("num_hidden_layers"), [full, sliding] = data.config.layers;
  if (Array.isArray(types) && types.length) {
    const other = types.find((one) => one !== full && one !== sliding);
    if (other !== undefined) refuse("layer_types", String(other), `${full} or ${sliding}`);
    return of("sliding_window") ? types.filter((one) => one === sliding).length : 0;
  }
  if (!(kind in data.config.sliding) || !of("sliding_window") || !Number.isSafeInteger(layers)) return 0;
  const pattern = of("sliding_window_pattern") || data.config.sliding[kind];
  return layers - (pattern ? Math.floor(layers / pattern) : 0);
}

// Serving: a port of every_byte/estimate/serving.py

function keyValueHeads(s, gpus) {
  const heads = s.num_attention_heads, keys = s.num_key_value_heads;
  if (heads % gpus) refuse("gpus", gpus, `a divisor of the ${heads} attention heads`);
  if (keys % gpus && gpus % keys && !F.has(s, "latent")) {
    refuse("gpus", gpus, `a divisor or a multiple of the ${keys} key-value heads`);
  }
  return max(1n, keys / gpus);
}

// One GPU's part of a parameter.
function partOf(gpus, s, shape, part) {
  if (part === "norm" || part === "router" || part === "latent" || gpus === 1n) return shape;
  if (part === "embedding" || part === "head") {
    const multiple = BigInt(data.serving.multiple);
    const padded = ceil(s.vocab_size, multiple) * multiple;
    return shape.map((n) => (n === s.vocab_size ? ceil(padded, gpus) : n));
  }
  if (F.has(s, "biases") && shape.length === 1 && shape[0] === s.hidden_size) return shape;
  return [...shape.slice(0, -1), ceil(shape[shape.length - 1], gpus)];
}

function servedWeights(s, asked, gpus) {
  const [n, d] = F.bytes(asked.dtype), keys = s.num_key_value_heads * s.head_dim;
  const square = s.num_attention_heads === s.num_key_value_heads;
  let all = F.has(s, "learned positions") ? 0n : ceil(s.max_position_embeddings * s.head_dim * n, d);
  for (const [part, shape, count] of F.tensors(s)) {
    let own = partOf(gpus, s, shape, part);
    const separate = s.model_type !== "gpt2" && !F.has(s, "joined") && !F.has(s, "latent");
    if (part === "attention" && shape[shape.length - 1] === keys && separate && !square) {
      own = [...shape.slice(0, -1), keyValueHeads(s, gpus) * s.head_dim];
    }
    const matrix = shape.length === 2 && part === "mlp";
    const fewer = asked.quantised && (matrix || F.isStored(s, part, shape, asked.quantised));
    const stored = fewer ? F.quantised(own, asked.quantised)
      : [ceil(own.reduce((a, b) => a * b, 1n) * n, d)];
    for (const nbytes of stored) all += count * nbytes;
  }
  return all;
}

// `card`: what programs can have, the workspace, and vLLM's sequences and tokens.
function serve(s, asked, card) {
  const [usable, workspace, sequences, batched] = card.map(BigInt), known = data.serving;
  const gpus = BigInt(asked.gpus), length = BigInt(asked.length), utilization = BigInt(asked.utilization);
  F.width(asked.dtype);
  const [n, d] = F.cacheBytes(asked.cache_dtype ?? asked.dtype);
  for (const what of ["length", "gpus", "utilization"]) F.atLeast({ length, gpus, utilization }, what, 1n);
  if (utilization > 100n) refuse("utilization", utilization, "at most 100, in percent");
  if (F.isOther(s)) refuse("model_type", s.model_type, "a decoder-only one, for vLLM");
  F.checkLength(s, length);
  const heads = keyValueHeads(s, gpus), b = F.width(asked.dtype), h = s.hidden_size;
  const weights = servedWeights(s, asked, gpus);
  const inner = ceil(F.innerNumbers(s), gpus);
  const sampling = sequences * s.vocab_size * BigInt(known.logit_bytes) + (batched + sequences) * h * b;
  const activations = max(batched * b * (4n * h + 3n * inner), sampling) + workspace;
  const outside = BigInt(known.non_torch[gpus > 1n ? 1 : 0]), graphs = BigInt(known.graphs);
  const allowed = usable * utilization / 100n, block = BigInt(known.block_size);
  const left = max(0n, allowed - weights - activations - outside - graphs);
  const numbers = F.has(s, "latent") ? s.kv_lora_rank + s.qk_rope_head_dim : 2n * heads * s.head_dim;
  const token = ceil(s.num_hidden_layers * numbers * n, d);
  const blocks = token ? left / (block * token) : 0n, fit = blocks / ceil(length, block);
  return { weights, activations, non_torch: outside, graphs, allowed,
    kv_cache: blocks * block * token, token, tokens: blocks * block, sequences,
    users: fit < sequences ? fit : sequences };
}

return { changes, levers, shortest, gpusNeeded, mostSequences, fromConfig, serve };
}
