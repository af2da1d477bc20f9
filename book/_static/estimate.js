/* The formulas of every_byte/estimate, which tests/test_estimator.py proves equal to Python's,
   to the byte. Whole numbers are BigInt; `data` is what book/_ext/estimator.py writes. */
"use strict";

class Refusal extends Error {
  constructor(what, value, expected) {
    const shown = value === null ? "None" : value === true ? "True" : typeof value === "string" ? `'${value}'` : value;
    super(`${what} is ${shown}: expected ${expected}`);
    Object.assign(this, { what, value, expected });
  }
}

function everyByteFormulas(data) {
const big = (value) => BigInt(value);
const ceil = (n, d) => (n + d - 1n) / d;
const sum = (tensors) => tensors.reduce((all, [nbytes, count]) => all + nbytes * count, 0n);
const product = (shape) => shape.reduce((all, size) => all * size, 1n);
const has = (sizes, trait) => data.traits[sizes.model_type].includes(trait);
const refuse = (...why) => { throw new Refusal(...why); };
const atLeast = (of, what, from, more = "") => {
  if (of[what] < from) refuse(what, of[what], `a whole number from ${from} up${more}`);
};
const ofQkv = (s) => has(s, "biases") || has(s, "query, key and value biases");
const inputs = (s) => (has(s, "joined") || s.model_type === "gpt2" ? 1n : 3n); // matrices that read attention's
const mlpInputs = (s) => (has(s, "gated") && !has(s, "joined") ? 2n : 1n); // input, and the MLP's
const isOther = (s) => has(s, "encoder") || has(s, "images"); // no decoder-only transformer
const isMatrix = (s, part, shape) => shape.length === 2
  && (["attention", "latent", "shared"].includes(part) || (part === "mlp" && !s.num_local_experts));

// Dimensions

const LEAST = { vocab_size: 1n, hidden_size: 1n, num_attention_heads: 1n };

function dimensions(given) {
  const s = { ...given };
  for (const name of data.sizes) s[name] = big(given[name] ?? 0);
  if (!(s.model_type in data.traits)) {
    refuse("model_type", s.model_type, `one of ${Object.keys(data.traits).join(", ")}`);
  }
  for (const name of data.sizes) atLeast(s, name, LEAST[name] ?? 0n);
  for (const [trait, name] of Object.entries(data.own_names)) {
    if (has(s, trait) && !s[name]) refuse(name, 0n, `a whole number from 1 up, of ${s.model_type}`);
  }
  const heads = s.num_attention_heads;
  s.intermediate_size ||= 4n * s.hidden_size;
  s.num_key_value_heads ||= heads;
  if (!s.head_dim && s.hidden_size % heads) {
    refuse("num_attention_heads", heads, `a divisor of hidden_size ${s.hidden_size}`);
  }
  s.head_dim ||= s.hidden_size / heads;
  if (heads % s.num_key_value_heads) {
    refuse("num_key_value_heads", s.num_key_value_heads, `a divisor of ${heads}`);
  }
  if (s.num_experts_per_tok > s.num_local_experts) {
    refuse("num_experts_per_tok", s.num_experts_per_tok,
      `at most num_local_experts ${s.num_local_experts}`);
  }
  for (const name of ["sliding_layers", "first_k_dense_replace"]) {
    if (s[name] > s.num_hidden_layers) refuse(name, s[name], `at most num_hidden_layers ${s.num_hidden_layers}`);
  }
  return s;
}

// Parameter tensors: [part, shape, how many]

function tensors(s) {
  const h = s.hidden_size, i = s.intermediate_size, layers = s.num_hidden_layers, heads = s.num_attention_heads;
  const queries = heads * s.head_dim, keys = s.num_key_value_heads * s.head_dim;
  const biases = has(s, "biases"), gated = has(s, "gated") ? 2n : 1n, found = [];
  const both = has(s, "encoder"), reading = both ? s.encoder_layers : 0n; // each attention, and each MLP
  const attentions = both ? reading + 2n * layers : layers, all = layers + reading;
  const add = (part, shape, count) => { if (count) found.push([part, shape, count]); };
  const norm = (count) => add("norm", [h], has(s, "layer norm") ? 2n * count : count);
  const linear = (part, n, m, bias, count) => {
    add(part, [n, m], count);
    if (bias) add(part, [m], count);
  };
  if (has(s, "images")) {
    linear("embedding", big(data.channels) * s.patch_size ** 2n, h, true, 1n);
    add("embedding", [h], 1n);
  } else add("embedding", [s.vocab_size, h], 1n);
  if (has(s, "learned positions")) {
    add("embedding", [s.max_position_embeddings + (both ? big(data.bart_offset) : 0n), h], both ? 2n : 1n);
  } else if (both) add("embedding", [big(data.buckets), heads], layers ? 2n : 1n);
  norm(has(s, "four norms") ? 4n * layers : has(s, "one norm") ? layers : attentions + all);
  if (has(s, "latent")) {
    const wide = heads * (s.qk_nope_head_dim + s.qk_rope_head_dim), kv = s.kv_lora_rank, q = s.q_lora_rank;
    if (q) {
      add("latent", [h, q], layers);
      add("norm", [q], layers);
    }
    add("attention", [q || h, wide], layers);
    add("latent", [h, kv + s.qk_rope_head_dim], layers);
    add("norm", [kv], layers);
    add("attention", [kv, heads * (s.qk_nope_head_dim + s.v_head_dim)], layers);
    add("attention", [heads * s.v_head_dim, h], layers);
  } else {
    if (s.model_type === "gpt2") linear("attention", h, 3n * h, biases, layers);
    else if (has(s, "joined")) linear("attention", h, queries + 2n * keys, false, layers);
    else for (const width of [queries, keys, keys]) linear("attention", h, width, ofQkv(s), attentions);
    if (has(s, "query and key norms")) add("norm", [s.head_dim], 2n * layers);
    if (has(s, "wide query and key norms")) for (const width of [queries, keys]) add("norm", [width], layers);
    linear("attention", queries, h, biases, attentions);
    if (has(s, "sinks")) add("attention", [heads], layers);
  }
  const experts = s.num_local_experts, few = s.first_k_dense_replace;
  const dense = isOther(s) || !experts ? all : few < layers ? few : layers;
  const part = experts && !both ? "shared" : "mlp", joined = has(s, "joined") && gated > 1n;
  if (joined) linear(part, h, 2n * i, false, dense);
  else linear(part, h, i, biases, gated * dense);
  linear(has(s, "position bias") ? "whole" : part, i, h, biases, dense);
  if (experts && !isOther(s)) {
    const inner = s.moe_intermediate_size || i, wide = inner * s.n_shared_experts, rest = layers - dense;
    linear("router", h, experts, has(s, "sinks"), rest);
    for (const [name, width, count] of [["mlp", inner, rest * experts], ["shared", wide, wide ? rest : 0n]]) {
      linear(name, h, width, biases, gated * count);
      linear(name, width, h, biases, count);
    }
  }
  norm(both ? 2n : 1n);
  if (has(s, "images")) linear("head", h, s.vocab_size, true, 1n);
  else if (!s.tie_word_embeddings) add("head", [h, s.vocab_size], 1n);
  return found;
}

const shapes = (s) => tensors(s).map(([, shape, count]) => [shape, count]);
const numbers = (of) => of.reduce((n, [shape, count]) => n + count * product(shape), 0n);
const parameters = (s) => numbers(shapes(s));

const adapters = (s, rank) => tensors(s)
  .filter(([part, shape]) => isMatrix(s, part, shape))
  .flatMap(([, [n, m], count]) => [[[n, rank], count], [[rank, m], count]]);

const loraParameters = (s, rank) => numbers(adapters(s, rank));

// Bytes of a number, as a fraction

function bytes(dtype) {
  if (!(dtype in data.bytes)) {
    refuse("dtype", dtype, `one of ${Object.keys(data.bytes).join(", ")}`);
  }
  return data.bytes[dtype].map(big);
}

function width(dtype) {
  const [n, d] = bytes(dtype);
  if (n < 2n * d) {
    refuse("dtype", dtype, "one that is computed in: fp64, fp32, fp16 or bf16");
  }
  return n / d;
}

// Tensors in memory: [bytes, how many]

const isStored = (s, part, shape, format) => {
  const known = data.stored[format];
  if (s.model_type === "gpt_oss" && format === "mxfp4") return shape.length === 2 && part === "mlp";
  return isMatrix(s, part, shape) || (shape.length === 2 && ((part === "mlp" && known.experts)
    || (known.whole && (part === "embedding" || part === "head"))));
};

function quantised(shape, format) {
  const known = data.stored[format], count = product(shape);
  const found = known.tensors.map(([n, numbers]) => big(n) * ceil(count, big(numbers)));
  const scales = [big(known.outputs) * shape[1], big(known.inputs) * shape[0]];
  return [...found, ...scales.filter((n) => n)];
}

function weights(s, dtype, format) {
  const [n, d] = bytes(dtype);
  return tensors(s).flatMap(([part, shape, count]) => {
    const held = format && isStored(s, part, shape, format)
      ? quantised(shape, format) : [ceil(product(shape) * n, d)];
    return held.map((nbytes) => [nbytes, count]);
  });
}

const STORES = {
  whole: (shape, b, states) => Array(states).fill(b * product(shape)),
  factored: (shape, b) =>
    shape.length < 2 ? [b * shape[0]] : [b * shape[0], b * shape[1]],
  blockwise: (shape, b, states) => {
    const count = product(shape);
    const one = count < 4096n ? [4n * count] : [count, 4n * ceil(count, 256n)];
    return Array(states).fill(one).flat();
  },
  paged: (shape, _, states) => (product(shape) < big(data.paged) ? Array(states).fill(4n * product(shape)) : []),
  projected: (shape, b, states) => {
    const [long, short] = shape[0] < shape[1] ? [shape[1], shape[0]] : shape;
    return [...Array(states).fill(b * big(data.apollo_rank) * long), b * big(data.apollo_rank) * short];
  },
};

// What is trained: the layers' matrices (or LoRA's factors), and the rest.
function trainedTensors(s, rank) {
  if (rank) return [adapters(s, rank), []];
  const all = tensors(s), inner = ([part, shape]) => isMatrix(s, part, shape);
  const plain = (some) => some.map(([, shape, count]) => [shape, count]);
  return [plain(all.filter(inner)), plain(all.filter((one) => !inner(one)))];
}

function states([matrices, others], optimizer, dtype) {
  const { store, states: copies, tables, rest } = data.optimizers[optimizer];
  if (rest) return [...states([[], others], rest, dtype), ...states_(matrices)];
  return [[4n * 256n, big(tables)], ...states_([...matrices, ...others])];
  function states_(some) {
    return some.flatMap(([shape, count]) =>
      STORES[store](shape, width(dtype), copies).map((nbytes) => [nbytes, count]));
  }
}

const MATRICES = { // what a step takes for the moment for one matrix
  orthogonalised: ([n, m], b) => (b + 4n) * n * m + 4n * (n < m ? n * n : m * m),
  scaled: ([n, m], b) => 3n * b * n * m,
};

// Adafactor's, parameter by parameter, still has that of the one before.
function stepTemporaries([matrices, others], setup, dtype, following) {
  const known = data.optimizers[setup.optimizer], b = width(dtype);
  if (known.matrix) {
    const largest = matrices.reduce((a, [shape, n]) => (n ? most(a, MATRICES[known.matrix](shape, b)) : a), 0n);
    const python = known.matrix === "scaled";
    const asked = { optimizer: known.rest, implementation: python ? "for-loop" : setup.implementation };
    const rest = stepTemporaries([[], others], asked, dtype, 0n);
    return most(largest, rest + (python ? largest / 3n : 0n));
  }
  const trained = [...matrices, ...others];
  if (setup.implementation === "fused" && known.fused) return 0n;
  if (setup.implementation === "for-loop") {
    const largest = trained.reduce((a, [shape, count]) => (count ? most(a, product(shape)) : a), 0n);
    if (known.store !== "factored") return big(known.temporaries) * b * largest;
    const counts = {};
    for (const [shape, count] of trained) counts[shape] = (counts[shape] ?? 0n) + count;
    const many = trained.reduce((a, [shape]) => (counts[shape] > 2n ? most(a, product(shape)) : a), 0n);
    return b * most(largest + (following < largest ? following : largest), 2n * many);
  }
  return known.foreach ? b * numbers(trained) : 0n;
}

const stored = (shapes, dtype) =>
  shapes.map(([shape, count]) => [product(shape) * width(dtype), count]);

function castWeights(s, setup, dtype) {
  const cast = tensors(s).filter(([part, shape], index) =>
    ["attention", "mlp", "router", "head"].includes(part)
      ? shape.length === 2 && !(setup.quantised && isStored(s, part, shape, setup.quantised))
      : s.tie_word_embeddings && index === 0);
  const own = cast.map(([, shape, count]) => [shape, count]);
  return stored(setup.rank ? [...own, ...adapters(s, setup.rank)] : own, dtype);
}

// Activations, logits, KV cache

const normInput = (s, b) =>
  has(s, "layer norm") ? b * s.hidden_size + 8n : (b > 4n ? b : 4n) * s.hidden_size + 4n;
const inFP32 = (s) => has(s, "wide norms") || has(s, "norms after"); // before a norm's weight
const normRest = (s, b, rank) => (rank || has(s, "layer norm") ? 0n : (inFP32(s) ? most(4n, b) : b) * s.hidden_size);

function attentionKernel(s, dtype, attention) {
  if (attention !== "sdpa") return attention;
  if (has(s, "no sdpa")) return "eager";
  if (width(dtype) === 2n) return "flash";
  return s.num_key_value_heads < s.num_attention_heads || dtype === "fp64" ? "math" : "efficient";
}

const hasScores = (...of) => ["eager", "math"].includes(attentionKernel(...of));

// What LoRA keeps for each token beside the frozen layers, or instead of them.
function adaptersKeep(s, rank, b, own, dropout) {
  const h = s.hidden_size, i = s.intermediate_size, mlp = mlpInputs(s);
  const dense = s.num_local_experts ? 0n : 1n, qkv = inputs(s);
  const kept = (qkv + 1n + (1n + mlp) * dense) * rank * own;
  if (own === b && !dropout) return kept;
  const read = qkv * h + s.num_attention_heads * s.head_dim + (mlp * h + i) * dense;
  return kept + read * (own + (dropout ? 1n : 0n)) - b * (h + (h + i) * dense);
}

// How many layers have no mask for a window, and how many have one.
function kindsOfLayers(s, length, attention) {
  const fused = ["sdpa", "efficient"].includes(attention) && !has(s, "no sdpa");
  const masked = fused && s.sliding_window > 0n && length >= s.sliding_window ? s.sliding_layers : 0n;
  return [s.num_hidden_layers - masked, masked];
}

function allMasked(s, { length, attention }) {
  const [plain, masked] = kindsOfLayers(s, length, attention);
  return masked && !plain;
}

// The largest of the kinds that there are.
const largestLayer = (kinds, of) => most(kinds[0] || !kinds[1] ? of(false) : 0n, kinds[1] ? of(true) : 0n);

function layerActivations(s, batch, length, dtype, asked, masked = false) {
  const { rank, autocast, dropout, adapters, lora_dropout } = asked;
  const attention = masked ? "masked" : attentionKernel(s, dtype, asked.attention);
  if (dropout && !has(s, "dropout")) {
    refuse("dropout", true, `False, as ${s.model_type} has none`);
  }
  const b = width(dtype), half = b < 4n, h = s.hidden_size, heads = s.num_attention_heads;
  const queries = heads * s.head_dim, keys = s.num_key_value_heads * s.head_dim;
  const experts = s.num_experts_per_tok || 1n, gated = has(s, "gated");
  const wide = autocast ? 4n : b;
  const readers = autocast ? inputs(s) + mlpInputs(s) : 2n;
  const upcast = autocast || !has(s, "layer norm"); // the softmax
  const scores = upcast && half ? b + 4n : half || !upcast ? b : 4n;
  let fixed = 0n; // for the whole batch
  const norms = has(s, "four norms") ? 4n : 2n, inNorm = half ? 4n : b, each = has(s, "query and key norms");
  let token = norms * (normInput(s, wide) + normRest(s, wide, rank)) + readers * b * h;
  if (each) {
    token += (inNorm + (rank ? 0n : has(s, "wide norms") ? inNorm : b)) * (queries + keys);
    token += 4n * (heads + s.num_key_value_heads);
  }
  if (has(s, "wide query and key norms")) token += inNorm * (rank ? 1n : 2n) * (queries + keys) + 8n;
  if (attention === "eager") {
    const once = batch === 1n && s.num_key_value_heads === 1n;
    const repeated = once ? (autocast ? queries : keys) + keys : 2n * queries;
    token += b * (2n * queries + repeated) + heads * length * scores;
    if (dropout) token += heads * length * (1n + b);
  } else if (attention === "math") token += b * (4n * queries + heads * length);
  else {
    const fast = attention === "flash";
    const rows = batch * (fast ? length : 32n * ceil(length, 32n));
    const repeated = masked && s.num_key_value_heads > 1n ? queries : keys;
    token += 2n * b * (queries + repeated) + (masked ? b * length : 0n);
    if (has(s, "joined")) token += (repeated === keys ? b * (queries + keys) : 0n) + (half ? b * queries : 0n);
    fixed = 4n * heads * rows + (rows ? (fast ? 24n : dropout ? 0n : 16n) : 0n);
  }
  token += (gated ? experts * 4n * b : 5n * b + (autocast ? 6n : 0n)) * s.intermediate_size;
  if (has(s, "wide norms")) fixed += most(4n, wide) * (norms * h + (each ? 2n * s.head_dim : 0n)); // 1 + weight
  if (dropout) token += 2n * h;
  if (s.num_local_experts) {
    token += 2n * experts * b * h + 4n * s.num_local_experts + 40n * experts + 4n;
    fixed += 4n * s.num_local_experts;
    if (rank) token -= b * (experts * (h + s.intermediate_size) + h);
  }
  if (rank) token += adaptersKeep(s, rank, b, width(adapters), lora_dropout);
  return batch * length * token + fixed;
}

function activations(s, batch, length, dtype, checkpointing, asked) {
  const { rank, autocast, dropout } = asked;
  const kinds = kindsOfLayers(s, length, asked.attention), layer = (masked) => layerActivations(s, batch, length, dtype, asked, masked);
  const b = width(dtype), h = s.hidden_size, layers = s.num_hidden_layers;
  const wide = autocast ? 4n : b, norm = normInput(s, wide);
  let last = batch * length * (norm + normRest(s, wide, rank) + (rank ? 0n : b * h));
  if (!has(s, "learned positions")) {
    const tables = has(s, "wide norms") && s.sliding_layers && s.sliding_layers < layers ? 2n : 1n;
    last += 2n * tables * (has(s, "norms after") ? most(4n, b) : wide) * length * s.head_dim;
  }
  if (has(s, "wide norms") && !(rank && layers)) last += most(4n, wide) * h;
  if (dropout) last += batch * length * h;
  if (checkpointing) {
    const inputs = layers + (rank && layers && (has(s, "learned positions") || has(s, "scaled embedding")) ? 1n : 0n);
    return last + inputs * batch * length * h * wide + (kinds[1] ? batch * length * length : 0n) + (layers ? largestLayer(kinds, layer) : 0n);
  }
  return last + kinds[0] * layer(false) + kinds[1] * layer(true) - (rank && layers && !has(s, "norms after") ? batch * length * norm : 0n);
}

const logits = (s, batch, length, dtype) => batch * length * s.vocab_size * width(dtype);

// What a number in a cache takes, its share of scales included: a fraction.
function cacheBytes(dtype) {
  const [n, d] = bytes(dtype), [scale, of] = (data.scales[dtype] ?? [0, 1]).map(big);
  return [n * of + scale * d, d * of];
}

function kvCache(s, batch, length, dtype) {
  if (has(s, "images")) return 0n;
  if (has(s, "encoder")) length *= 2n; // also of the text that was read
  const [n, d] = cacheBytes(dtype), layers = s.num_hidden_layers, window = s.sliding_window;
  const sliding = window ? s.sliding_layers : 0n;
  const seen = window && window - 1n < length ? window - 1n : length;
  const numbers = has(s, "latent") ? layers * length * (s.kv_lora_rank + s.qk_rope_head_dim)
    : 2n * ((layers - sliding) * length + sliding * seen) * s.num_key_value_heads * s.head_dim;
  return ceil(batch * numbers * n, d);
}

// Numbers of a token between an MLP's matrices, of all experts that it uses.
function innerNumbers(s) {
  const chosen = ((s.num_experts_per_tok || 1n) + s.n_shared_experts) * (s.moe_intermediate_size || s.intermediate_size);
  return s.first_k_dense_replace && s.intermediate_size > chosen ? s.intermediate_size : chosen;
}

// The allocator's blocks, and ZeRO

function block(nbytes, ownSegment) {
  const up = (n, multiple) => ceil(n, big(multiple)) * big(multiple);
  const size = up(nbytes, data.allocator.kMinBlockSize);
  const segment = up(size, data.allocator.kRoundLarge);
  return ownSegment && size >= KEPT[1] && segment - size <= KEPT[0] ? segment : size;
}

const KEPT = [data.allocator.kSmallSize, data.allocator.kMinLargeAlloc].map(big);
const isShared = (n) => n > KEPT[0] && n < KEPT[1];

function sharedSegments(tensors) {
  const shared = sum(tensors.filter(([n]) => isShared(n)));
  return shared * KEPT[0] / (2n * big(data.allocator.kLargeBuffer));
}

// All together

const KINDS = Object.keys(data.kinds); // the fields of Memory, in order
const NUMBERS = ["batch", "length", "rank", "gpus"];

function checked(given) {
  const setup = { ...given };
  for (const name of NUMBERS) setup[name] = big(given[name]);
  for (const [what, known] of Object.entries(data.choices)) {
    if (!known.includes(setup[what])) {
      const none = known.includes(null) ? "None or " : "";
      refuse(what, setup[what], `${none}one of ${known.filter(Boolean).join(", ")}`);
    }
  }
  for (const name of data.flags) setup[name] = Boolean(setup[name]);
  for (const dtype of [setup.dtype, setup.gradients, setup.states]) width(dtype ?? setup.dtype);
  bytes(setup.cache_dtype ?? setup.dtype);
  for (const what of ["batch", "length"]) atLeast(setup, what, 0n);
  atLeast(setup, "rank", 0n, ", 0 for no LoRA");
  atLeast(setup, "gpus", 1n);
  if (setup.task === "training" && setup.quantised && !setup.rank) {
    refuse("rank", 0n,
      "1 or more, for quantised weights are not trained; LoRA's factors are");
  }
  if (setup.task === "training" && setup.quantised && !data.stored[setup.quantised].trained) {
    const trained = Object.keys(data.stored).filter((name) => data.stored[name].trained);
    refuse("quantised", setup.quantised, `one that LoRA is trained beside: ${trained.join(", ")}`);
  }
  return setup;
}

const splits = (setup, what) => data.sharding[setup.sharding].includes(what);
const usesAutocast = (setup) => setup.amp !== null && setup.dtype === "fp32";

function checkLength(s, length) {
  if (has(s, "learned positions") && length > s.max_position_embeddings) {
    refuse("length", length, `at most the ${s.max_position_embeddings} positions that the model has learned`);
  }
}

function checkTogether(s, setup) {
  checkLength(s, setup.length);
  if (setup.task !== "training") {
    if (isOther(s)) checkReading(s, setup);
    return;
  }
  if (has(s, "inference only")) {
    const trained = Object.keys(data.traits).filter((name) => !data.traits[name].includes("inference only"));
    refuse("model_type", s.model_type, `for training one whose activations the formulas describe: ${trained.join(", ")}`);
  }
  if (setup.rank > s.hidden_size) {
    refuse("rank", setup.rank, `at most hidden_size ${s.hidden_size}`);
  }
  const computed = usesAutocast(setup) ? setup.amp : setup.dtype;
  if (setup.attention === "flash" && width(computed) !== 2n) {
    refuse("attention", "flash",
      `another one, for flash is for fp16 and bf16, not ${computed}`);
  }
}

function checkReading(s, setup) {
  const positions = s.max_position_embeddings;
  if (has(s, "images") && setup.length !== positions) {
    refuse("length", setup.length, `${positions}, an image's patches and one more`);
  }
  if (setup.all_logits) refuse("all_logits", true, `False, for ${s.model_type} reads before it answers`);
  if (!has(s, "position bias")) return;
  if (setup.dtype === "fp16") refuse("dtype", "fp16", "fp32 or bf16, for in FP16 a part of T5 stays in FP32");
  if (setup.attention === "flash") refuse("attention", "flash", "another one, for flash takes no position bias");
}

const most = (a, b) => (a > b ? a : b);
const shown = (...numbers) => numbers.map((n) => (typeof n === "bigint" ? n.toLocaleString("en-US") : n)).join(" × ");
// A moment: its name, its bytes, and what they are the sum of, in words.
const moment = (name, ...terms) => [name, terms.reduce((all, [, n]) => all + n, 0n), terms];

function layerTemporaries(s, setup, b) {
  const experts = s.num_experts_per_tok || 1n, gated = has(s, "gated");
  const tokens = setup.batch * setup.length, h = s.hidden_size, i = s.intermediate_size;
  const computed = { 2: "bf16", 4: "fp32", 8: "fp64" }[b], heads = s.num_attention_heads;
  const autocast = usesAutocast(setup), g = gated ? 1n : 0n;
  const split = setup.gpus > 1n && splits(setup, "gradients") && !gathered(s, setup)[0];
  const own = setup.rank || split ? 0n : width(setup.gradients ?? setup.dtype);
  const matrix = own * h * i * (s.num_local_experts || 1n);
  let taken = tokens * (3n * b + (autocast && !gated ? 4n : 0n)) * experts * i + matrix * (gated && has(s, "joined") ? 2n : 1n);
  if (hasScores(s, computed, setup.attention) && !allMasked(s, setup)) {
    const softmax = has(s, "layer norm") && !autocast ? b : most(4n, b);
    let scores = 3n * softmax - (softmax > b ? b : 0n);
    if (softmax > b && (autocast ? setup.amp : setup.dtype) === "fp16") scores -= b;
    let mlp = (gated ? 4n : 5n) * b * experts * i + 3n * b * h;
    if (setup.rank && !s.num_local_experts) { // what its factors read
      const wide = autocast ? b : width(setup.adapters ?? setup.dtype);
      if (wide !== b || setup.lora_dropout) {
        mlp += (mlpInputs(s) * h + i) * (wide + (setup.lora_dropout ? 1n : 0n)) - b * (h + i);
      }
    }
    let attention = tokens * (heads * setup.length * scores - mlp);
    if (!setup.accumulation) {
      const made = (2n + g) * matrix + own * heads * s.head_dim * h;
      attention += made - (autocast ? made / 2n : 0n);
    }
    taken = most(taken, attention);
  }
  return taken;
}

const outsideOfLayers = (s) => parameters({ ...s, num_hidden_layers: 0n });

// What a sharded model has whole while it computes: what is outside of the layers; one layer.
function gathered(s, setup) {
  const sharded = setup.gpus > 1n && splits(setup, "parameters");
  if (!sharded && setup.offload !== "all") return [0n, 0n];
  const outside = outsideOfLayers(s), b = width(setup.dtype);
  return [b * outside, s.num_hidden_layers ? b * (parameters({ ...s, num_hidden_layers: 1n }) - outside) : 0n];
}

function trainingMoments(s, setup, { atRest, gradients, kept, again, one, outer, step, cast }) {
  const tokens = setup.batch * setup.length, h = s.hidden_size, v = s.vocab_size;
  const b = usesAutocast(setup) ? 2n : width(setup.dtype), layers = s.num_hidden_layers;
  const scores = block(tokens * v * b, true), upcast = block(tokens * v * most(4n, b), true);
  const forward = atRest + kept + (setup.accumulation ? gradients : 0n);
  const [root, unit] = gathered(s, setup);
  const embedding = setup.rank ? 0n : block(v * h * width(setup.gradients ?? setup.dtype), true);
  const extra = (s.tie_word_embeddings ? 2n : 0n) + (setup.accumulation ? 1n : 0n);
  const head = setup.rank ? 0n : v * h * b, wide = tokens * h * b, layer = layerTemporaries(s, setup, b);
  const whole = parameters(s), ofLayers = gradients * (whole - outsideOfLayers(s)) / whole;
  const done = gradients - ofLayers / most(1n, layers) - (s.tie_word_embeddings ? 0n : embedding);
  const scored = `${shown(tokens)} tokens × ${shown(v)} words`;
  const resting = ["at rest", atRest], out = ["autocast's copies, gone by now", -cast], w = most(4n, b);
  const base = [resting, ["activations and copies kept for backward", kept],
    ["gradients of the batches before", setup.accumulation ? gradients : 0n]];
  const heads = [`the head's gradient, ${shown(v, h, b)} B`, head], temporaries = ["the layer's own temporaries", layer];
  const once = ["one layer and what is outside of all, gathered", root + unit];
  const inFP32 = (n, what) => [`${n} × ${scored} × ${w} B: ${what}`, n * upcast];
  let last = [...base, out, ["activations that a checkpoint makes again", again],
    setup.accumulation ? ["", 0n] : heads, temporaries];
  let first = [resting, ["gradients but for this layer's and the embedding's", done], ["one layer's activations", one], temporaries];
  let ending = ["gradients", gradients];
  if (root) { // gradients of layers are parts, the root's are whole until backward ends
    const trained = setup.rank ? 0n : 1n, on = setup.checkpointing ? 0n : one;
    const parts = layers > 2n ? ofLayers * (layers - 2n) / layers : 0n;
    const outside = ["what is outside of the layers, gathered", root];
    ending = ["parts of gradients; what is outside of the layers, and its gradients; a layer's, not yet sent",
      ofLayers + root + (root + unit) * trained];
    last = [...base, out, outside, heads, ["layers gathered, their whole gradients and temporaries", [
      again - outer + 2n * unit + layer,
      again - outer - on + (2n + trained) * unit + layer,
      -outer - 2n * on + (2n + 2n * trained) * unit + 3n * wide].reduce(most)]];
    first = [resting, ["parts of gradients", parts], outside, heads,
      ["two layers gathered, and two layers' whole gradients", (2n + 2n * trained) * unit],
      ["one layer's activations, and three states between layers", on + 3n * wide]];
  }
  return [
    moment("at rest", ["parameters, optimizer states, workspaces, all as blocks", atRest]),
    moment("end of forward: the loss", ...base, once, inFP32(2n, "logits and log-probabilities"),
      [`${scored} × ${b} B: logits as the model makes them`, b < 4n ? scores : 0n]),
    moment("start of backward: the loss", ...base, out, once, inFP32(3n, "log-probabilities and two gradients")),
    moment("backward: the head", ...base, out, ["gathered", root + 2n * unit], heads,
      [`gradients of logits, ${scored} × ${b} B, and of what the head reads`,
        most(scores + wide, usesAutocast(setup) ? head : 0n)]),
    moment("backward: the last layer", ...last),
    moment("backward: the first layer", ...first),
    moment("end of backward: the embedding", resting, ending,
      [`${extra} × ${shown(v, h, width(setup.gradients ?? setup.dtype))} B: the embedding's gradients before they are added`, extra * embedding],
      [`${shown(3n, tokens, h, b)} B: gradients between layers`, 3n * wide]),
    moment("optimizer step", resting, ["gradients", gradients], ["the step's own temporaries", step]),
  ];
}

function ofExperts(s) {
  const k = s.num_experts_per_tok, read = k * s.hidden_size, given = s.model_type === "deepseek_v3" ? 6n : 4n;
  const wide = read + 4n * k * (s.moe_intermediate_size || s.intermediate_size);
  return s.num_local_experts ? most(wide, given * read) + s.hidden_size + 4n * s.num_local_experts : 0n;
}

function ofLatentAttention(s) {
  const head = 4n * s.qk_nope_head_dim + 3n * s.qk_rope_head_dim + 3n * s.v_head_dim;
  return has(s, "latent") ? s.num_attention_heads * head + s.kv_lora_rank : 0n;
}

function prefillTemporaries(s, setup, b) {
  const h = s.hidden_size, heads = s.num_attention_heads, gpt2 = !has(s, "gated");
  const tokens = setup.batch * setup.length, queries = heads * s.head_dim, layers = s.num_hidden_layers;
  const callers = gpt2 ? 3n : 1n + (layers < 2n ? layers : 2n), more = gpt2 ? 1n : 0n;
  const kernel = attentionKernel(s, setup.dtype, setup.attention);
  const inner = tokens * b * innerNumbers(s);
  const joined = has(s, "joined") && !gpt2 ? 1n : 0n, window = s.sliding_window;
  let taken = (3n + more + joined) * block(inner, true) + tokens * (1n + more) * b * h;
  if (isShared(inner)) taken += KEPT[0];
  taken = [taken, tokens * b * ofExperts(s), tokens * b * ofLatentAttention(s)].reduce(most);
  if (s.sliding_layers && window <= setup.length && kernel !== "eager") taken += tokens * setup.length * (1n + b);
  if (kernel === "eager") {
    taken += tokens * b * heads * setup.length;
    const score = gpt2 || b === 4n ? 2n * b : 2n * b + 4n + (setup.dtype === "bf16" ? 2n : 0n);
    const repeated = s.num_key_value_heads < heads ? 3n : 1n;
    const whole = (gpt2 ? 0n : joined * queries) + (gpt2 || joined ? 2n * s.num_key_value_heads * s.head_dim : 0n);
    taken = most(taken, tokens * (heads * setup.length * score + b * (repeated * queries + whole)));
  } else if (kernel === "math") {
    taken = most(taken, tokens * (heads * setup.length * (2n * b + 1n) + 4n * b * queries));
  }
  if (has(s, "query and key norms")) taken = most(taken, tokens * (b + 2n * most(4n, b)) * queries);
  return tokens * callers * b * h + taken;
}

// Encoder-decoders and vision transformers
function readingMoments(s, setup, weights, cache) {
  const b = width(setup.dtype), h = s.hidden_size, heads = s.num_attention_heads, length = setup.length;
  const images = has(s, "images"), bart = has(s, "encoder") && has(s, "learned positions"), t5 = has(s, "position bias");
  const tokens = setup.batch * length, queries = tokens * heads * s.head_dim * b, state = tokens * h * b;
  const inner = block(tokens * s.intermediate_size * b, true), grid = length * length;
  const states = bart || (s.encoder_layers || s.num_hidden_layers) > 1n ? 3n : 2n;
  const scores = heads * tokens * length, bias = t5 ? heads * grid * b : 0n;
  const eager = attentionKernel(s, setup.dtype, setup.attention) === "eager";
  const mlp = (states + 1n) * state + (has(s, "gated") ? 4n : 2n) * inner + (eager ? scores * b : 0n);
  const wide = images && b < 4n ? (setup.dtype === "bf16" ? 6n : 4n) : 0n;
  const attention = states * state + 3n * queries + (eager ? scores * (2n * b + wide) : queries + bias);
  const tables = t5 ? 2n * state + 3n * queries + 49n * grid : 0n;
  const patches = s.max_position_embeddings ? s.max_position_embeddings - 1n : 0n;
  const read = images ? setup.batch * big(data.channels) * patches * s.patch_size ** 2n * b : state;
  const scored = [`${shown(setup.batch, s.vocab_size, b)} B: scores`, setup.batch * s.vocab_size * b];
  const own = ["weights and workspaces, as blocks", weights];
  const layer = ["a layer's temporaries", most(most(mlp, attention) + bias, tables)];
  const given = [images ? "pixels" : "what the encoder made of the text", read];
  if (images) {
    return [moment("at rest", own, given), moment("an image: a layer", own, layer, given),
      moment("an image: the labels", own, given, ["three states between layers", 3n * state], scored)];
  }
  const resting = [own, ["keys and values of both texts", cache], given];
  return [moment("at rest", ...resting), moment("reading: a layer of the encoder", own, layer),
    moment("writing: the decoder", ...resting, ["a layer's cache, made anew", cache / 2n / most(1n, s.num_hidden_layers)], scored)];
}

function inferenceMoments(s, setup, atRest, cache) {
  const b = width(setup.dtype), h = s.hidden_size, rows = setup.batch;
  const tokens = rows * setup.length;
  const scores = block((setup.all_logits ? tokens : rows) * s.vocab_size * b, true);
  const mask = attentionKernel(s, setup.dtype, setup.attention) === "eager" ? tokens * setup.length * b : 0n;
  const positions = has(s, "learned positions") ? setup.length * h * b : 0n;
  const resting = ["at rest", atRest], masked = [`the mask, ${shown(tokens, setup.length, b)} B`, mask];
  return [
    moment("at rest", ["parameters, KV cache, workspaces, all as blocks", atRest]),
    moment("prefill: a layer", resting, masked, ["a layer's temporaries", prefillTemporaries(s, setup, b)],
      ["positions", positions]),
    moment("prefill: the logits", resting, masked, ["logits", (has(s, "scaled logits") ? 2n : 1n) * scores], [`hidden states, ${shown(tokens, h, b)} B`, tokens * b * h]),
    moment("decoding", resting, ["a layer's cache, made anew", cache / most(1n, s.num_hidden_layers)], masked,
      [`logits, ${shown(rows, s.vocab_size, b)} B`, rows * s.vocab_size * b]),
  ];
}

// What fragmentation may leave idle at the peak.
function fragments(s, setup) {
  const training = setup.task === "training", autocast = training && usesAutocast(setup);
  const b = autocast ? 2n : width(setup.dtype), heads = s.num_attention_heads;
  const tokens = setup.batch * setup.length, h = s.hidden_size;
  const scored = (training || setup.all_logits ? tokens : setup.batch) * s.vocab_size;
  const large = [scored * (training ? most(4n, b) : b),
    tokens * innerNumbers(s) * b];
  if (has(s, "position bias")) large.push(heads * setup.length * setup.length * b);
  if (training && !setup.rank) large.push(s.vocab_size * h * width(setup.gradients ?? setup.dtype));
  const computed = { 2: "bf16", 4: "fp32", 8: "fp64" }[b];
  if (has(s, "query and key norms")) large.push(tokens * heads * s.head_dim * most(4n, b));
  const mask = training && kindsOfLayers(s, setup.length, setup.attention)[1];
  const scores = hasScores(s, computed, setup.attention) && !(training && allMasked(s, setup));
  if (scores) large.push(tokens * heads * setup.length * most(4n, b));
  if (mask) large.push(tokens * setup.length * b);
  const blocks = large.map((n) => block(n, true)), narrow = training && b < 4n ? scored * b : 0n;
  const largest = block(large.reduce(most), true);
  return largest + (scores || mask ? blocks.reduce((all, n) => all + n) : largest)
    + block(narrow, true) + big(data.allocator.kLargeBuffer);
}

function memory(s, given, workspace = data.workspace, context = data.context) {
  const setup = checked(given), { dtype, batch, length, rank } = setup;
  checkTogether(s, setup);
  const held = Object.fromEntries(KINDS.map((kind) => [kind, 0n]));
  const tensorsOf = { parameters: weights(s, dtype, setup.quantised) };
  const training = setup.task === "training", layers = s.num_hidden_layers;
  let parts, states_, kept, layer, margin = fragments(s, setup), cast = 0n, copy = 0n, outer, host = 0n;
  held.context = big(context);
  if (training) {
    parts = trainedTensors(s, rank);
    const trained = parts.flat();
    const own = rank ? setup.adapters ?? dtype : dtype;
    if (rank) tensorsOf.parameters.push(...stored(trained, own));
    states_ = setup.states ?? data.optimizers[setup.optimizer].dtype ?? own;
    tensorsOf.gradients = stored(trained, setup.gradients ?? own);
    tensorsOf.optimizer_states = states(parts, setup.optimizer, states_);
    if (setup.master_weights && width(own) < 4n) {
      tensorsOf.optimizer_states.push(...stored(trained, "fp32"));
    }
    const autocast = usesAutocast(setup), computed = autocast ? setup.amp : dtype;
    const asked = { ...setup, autocast, adapters: autocast ? computed : own };
    kept = held.activations = activations(s, batch, length, computed, setup.checkpointing, asked);
    for (const size of [s.hidden_size, s.intermediate_size].map((n) => n * batch * length * width(computed))) {
      if (!isShared(size)) continue;
      const rest = sharedSegments([[size, ceil(kept, size)]]);
      margin += rest;
      kept += rest;
      break;
    }
    if (setup.attention === "eager") kept += batch * length * length * width(dtype);
    layer = layers ? largestLayer(kindsOfLayers(s, length, setup.attention),
      (masked) => layerActivations(s, batch, length, computed, asked, masked)) : 0n;
    outer = activations({ ...s, num_hidden_layers: 0n, sliding_layers: 0n }, batch, length, computed, false, asked);
    held.logits = 2n * logits(s, batch, length, computed);
    if (autocast) {
      held.logits += logits(s, batch, length, "fp32");
      held.cast_weights = sum(castWeights(s, setup, computed));
      const none = { ...s, num_hidden_layers: 0n };
      const copies = held.cast_weights - sum(castWeights(none, setup, computed));
      copy = copies / most(1n, layers);
      if (setup.checkpointing && layers > 1n) cast = copies - copy;
    }
  } else {
    held.logits = logits(s, batch, 1n, dtype);
    held.kv_cache = kvCache(s, batch, length, setup.cache_dtype ?? dtype);
    const caches = 2n * layers;
    if (caches) held.rounding = caches * block(ceil(held.kv_cache, caches)) - held.kv_cache;
  }
  const rounded = {}, shared = {};
  for (const kind of Object.keys(tensorsOf)) {
    let some = tensorsOf[kind], own = kind === "parameters" && setup.load === "to";
    let nbytes = sum(some);
    if (training && data.offloaded[setup.offload ?? "null"].includes(kind)) {
      host += splits(setup, kind) ? ceil(nbytes, setup.gpus) : nbytes;
      [nbytes, some] = [0n, []];
    }
    if (setup.gpus > 1n && splits(setup, kind)) {
      nbytes = ceil(nbytes, setup.gpus);
      [some, own] = [[[nbytes, 1n]], false];
    }
    const blocks = (alone) => sum(some.map(([n, count]) => [block(n, alone), count]));
    held[kind] = nbytes;
    held.rounding += blocks(own) - nbytes;
    rounded[kind] = blocks(own || kind !== "parameters");
    shared[kind] = sharedSegments(some);
    margin += shared[kind];
  }
  let rest = big(workspace);
  if (ofQkv(s)) rest += big(data.lt_workspace);
  rest += rounded.parameters + shared.parameters;
  if (training) {
    const again = setup.checkpointing ? layer : 0n;
    held.moments = trainingMoments(s, setup, {
      atRest: rest + big(workspace) + (ofQkv(s) && setup.checkpointing ? big(data.lt_workspace) : 0n) + rounded.optimizer_states + shared.optimizer_states,
      gradients: rounded.gradients + shared.gradients,
      kept: kept + held.cast_weights - again, again, one: layers ? layer + copy : 0n, outer, cast,
      step: (setup.offload ? 0n : ceil(
        stepTemporaries(parts, setup, states_, rank ? 0n : s.hidden_size * s.num_attention_heads * s.head_dim),
        splits(setup, "optimizer_states") ? setup.gpus : 1n)) + shared.gradients,
    });
  } else if (isOther(s)) held.moments = readingMoments(s, setup, rest, held.kv_cache);
  else held.moments = inferenceMoments(s, setup, rest + held.kv_cache, held.kv_cache);
  Object.assign(held, { margin, host });
  [held.peakAt, held.peak] = held.moments.reduce((a, m) => (m[1] > a[1] ? m : a));
  held.least = held.peak + held.context;
  held.needed = held.least + margin;
  return held;
}

const verdict = (held, capacity) =>
  held.needed <= capacity ? "fits" : held.least <= capacity ? "may fit" : "does not fit";

const total = (held) => KINDS.reduce((all, kind) => all + held[kind], 0n);

return { dimensions, parameters, loraParameters, width, bytes, layerActivations, usesAutocast,
  has, splits, isOther, tensors, isStored, quantised, cacheBytes, innerNumbers,
  memory, verdict, total, refuse, atLeast, checkLength, ceil, most };
}
