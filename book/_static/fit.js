/* What would make it fit, and what a config.json says, for the estimator's page:
   ports of every_byte/estimate/fit.py (shortest, most_sequences) and config.py, which
   tests/test_estimator.py proves equal. F are the formulas of estimate.js. */
"use strict";

function everyByteFit(data, F) {
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
      return !(training && "quantised" in change && !BigInt(change.rank ?? rank));
    }));
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

  function mostSequences(sizes, setup, capacity, card = []) {
    const fits = (batch) => F.memory(sizes, { ...setup, batch }, ...card).needed <= BigInt(capacity);
    if (!fits(1)) return 0;
    let enough = 1, many = 2;
    while (many < data.most_sequences && fits(many)) [enough, many] = [many, 2 * many];
    if (many >= data.most_sequences && fits(data.most_sequences)) return data.most_sequences;
    while (many - enough > 1) {
      const middle = Math.floor((enough + many) / 2);
      if (fits(middle)) enough = middle;
      else many = middle;
    }
    return enough;
  }

  // The sizes in the text of a config.json

  function fromConfig(text) {
    const refuse = (...why) => { throw new Refusal(...why); };
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
    for (const name of known.required[kind]) if (of(name) === null) refuse(name, null, lacks);
    for (const name of known.without) {
      if (!empty(of(name))) refuse(name, shown(of(name)), "none, for the formulas do not describe it");
    }
    if ((of("decoder_sparse_step") ?? 1) !== 1) {
      refuse("decoder_sparse_step", shown(of("decoder_sparse_step")), "1, experts in every layer");
    }
    const acts = known.activations[kind] ?? known.gated;
    const act = of(kind === "gpt2" ? "activation_function" : "hidden_act") ?? acts[0];
    if (!acts.includes(act)) refuse("hidden_act", shown(act), `${acts[0]}, which the formulas describe`);
    const given = { ...config };
    if (kind === "qwen3_moe") {
      given.num_local_experts = of("num_local_experts") ?? of("num_experts");
      given.intermediate_size = config.moe_intermediate_size;
    } else if (kind !== "mixtral") given.num_local_experts = given.num_experts_per_tok = 0;
    const tied = given.tie_word_embeddings ?? known.tied.includes(kind);
    if (typeof tied !== "boolean") refuse("tie_word_embeddings", shown(tied), "True or False");
    const sizes = { model_type: known.same[kind] ?? kind, tie_word_embeddings: tied };
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

  return { changes, shortest, mostSequences, fromConfig };
}
