/* An out-of-memory message, taken apart, judged and answered: a port of every_byte/explain.py,
   which tests/test_explain_page.py proves equal. Patterns, words and cures are that module's
   own, in the page's JSON. A pasted text is only read: the page shows figures and our words. */
"use strict";

function everyByteExplain(data) {
  const pattern = (text, flags = "i") => new RegExp(text.replace("{}", data.size), flags);
  const said = (name, figures = {}) => data.said[name].replace(/\{(\w+)\}/g, (_, figure) =>
    typeof figures[figure] === "number" ? binary(figures[figure]) : figures[figure]);
  const told = (message, verdict, because, cures, assumed = "") => ({
    message, verdict, because,
    assumed: Object.hasOwn(data.said, assumed) ? data.said[assumed] : assumed,
    cures: cures.map((name) => data.cures[name]),
  });

  // Python's way with halves: to the even neighbour
  function rounded(number) {
    const up = Math.round(number);
    return number % 1 === 0.5 && up % 2 ? up - 1 : up;
  }

  function binary(nbytes) {
    for (const [exponent, name] of [[30n, "GiB"], [20n, "MiB"], [10n, "KiB"]]) {
      const unit = 1n << exponent, hundredfold = BigInt(nbytes) * 100n;
      if (BigInt(nbytes) <= unit) continue;
      let hundredths = hundredfold / unit;
      const rest = 2n * (hundredfold % unit);
      if (rest > unit || (rest === unit && hundredths % 2n)) hundredths += 1n;
      return `${hundredths / 100n}.${String(hundredths % 100n).padStart(2, "0")} ${name}`;
    }
    return `${nbytes} bytes`;
  }

  // Taking apart

  function bytes(number, unit = "bytes") {
    const nbytes = Number(number) * data.units[unit.toLowerCase()];
    return nbytes <= data.most ? rounded(nbytes) : null;
  }

  function size(text, patterns) {
    for (const each of patterns) {
      const match = pattern(each).exec(text);
      if (match) return bytes(match[1], match[2]);
    }
    return null;
  }

  function message(form, text) {
    const parts = Object.fromEntries(
      Object.entries(data.parts[form]).map(([name, patterns]) => [name, size(text, patterns)]));
    const { cached = null, other = null, ...figures } = parts;
    const allocated = figures.allocated ?? null;
    if (allocated !== null && cached !== null && figures.reserved === null) {
      figures.reserved = allocated + cached;
    }
    if (allocated !== null && other !== null) figures.in_use = allocated + other;
    const device = pattern(data.device, "").exec(text), name = /^(?:CUDA|HIP|XPU)/i.exec(text);
    return {
      backend: form === "PyTorch" && name ? name[0].toUpperCase() : form,
      device: device && form !== "driver" ? Number(device[1]) : null,
      tried: null, capacity: null, free: null, in_use: null,
      others: [...text.matchAll(pattern(data.processes, "gi"))]
        .map(([, number, unit]) => bytes(number, unit)).filter((nbytes) => nbytes !== null),
      allowed: null, allocated: null, reserved: null, private_pools: null,
      ...figures,
    };
  }

  function parse(pasted) {
    const text = pasted.replace(new RegExp(data.blank, "gu"), " ").slice(-data.largest);
    let found = [];
    for (const level of data.starts) {
      if (found.length) break;
      for (const [form, each] of Object.entries(level)) {
        for (const match of text.matchAll(new RegExp(each, "gi"))) found.push([match.index, form]);
      }
    }
    found = found.sort(([a, one], [b, other]) => a - b || (one < other ? -1 : 1));
    const messages = found.map(([start, form], i) => {
      const end = i + 1 < found.length ? found[i + 1][0] : text.length;
      return message(form, text.slice(start, Math.min(end, start + data.window)));
    });
    const whole = messages.filter(({ tried }) => tried !== null);
    return whole.length ? whole : messages;
  }

  // Judging

  function explain(text) {
    const messages = parse(text);
    if (!messages.length) return told(null, "unknown", said("nothing"), []);
    const last = messages.at(-1);
    const grown = messages.filter(({ device, allocated }) => device === last.device && allocated)
      .map(({ allocated }) => allocated);
    if (grown.length > 2 && grown.every((n, i) => !i || grown[i - 1] < n)) {
      const figures = { count: String(grown.length), first: grown[0], last: grown.at(-1) };
      return told(last, "a leak", said("grows", figures),
        ["release", "cycles", "no_grad", "smaller"], "in order");
    }
    if (last.backend === "driver") {
      return told(last, "a context", said("driver"),
        ["others", "restart", "workers", "smaller", "elsewhere"]);
    }
    if (last.tried === null) {
      return told(last, "unknown", said("no request"), data.too_big, "whole");
    }
    return judged(last, last.tried);
  }

  function judged(message, tried) {
    const { capacity, allowed, allocated, reserved } = message;
    const limits = [capacity, allowed].filter((n) => n !== null);
    const limit = limits.length ? Math.min(...limits) : null;
    const slack = Math.floor((limit || tried) / data.printed);
    if (message.backend === "TPU") return onTpu(message, tried, limit);
    if (limit !== null && tried > limit + slack) {
      const whose = limit === capacity ? "card" : "allowed";
      const because = said(whose === "card" ? "larger than the card" : "larger than allowed",
        { tried, limit });
      return told(message, "too big", because, [...(whose === "card" ? [] : ["fraction"]),
        "shape", "smaller", "less_state", "shard"]);
    }
    if (message.backend === "JAX") {
      return told(message, "unknown", said("JAX", { tried }),
        ["preallocate", "smaller", "rematerialise", "others"]);
    }
    if (message.backend === "MPS") {
      const used = message.in_use;
      return told(message, "too big", used ? said("MPS", { tried, used }) : said("more", { tried }),
        ["smaller", "checkpoint", "no_grad"]);
    }
    if (limit !== null && allocated !== null && tried + allocated > limit + slack) {
      return full(message, tried, limit, slack);
    }
    if (limit === null || allocated === null || reserved === null) {
      return told(message, "unknown", said("cut off", { tried }), data.too_big, "whole");
    }
    return weighed(message, tried, limit, slack);
  }

  function onTpu(message, tried, limit) {
    const { free } = message, cures = ["smaller", "rematerialise", "shard"];
    if (limit !== null) {
      return told(message, "too big", said("larger than the TPU", { tried, limit }), cures);
    }
    if (free === null) return told(message, "unknown", said("more", { tried }), cures);
    return free >= tried
      ? told(message, "in pieces", said("no hole", { tried, free }), cures)
      : told(message, "too big", said("no room", { tried, free }), cures);
  }

  function full(message, tried, limit, slack) {
    const because = said("beside", { tried, allocated: message.allocated, limit });
    if (message.allowed !== null) {
      return told(message, "too big", because, ["fraction", ...data.too_big]);
    }
    const [apart, assumed] = toldApart(message);
    if (apart.capacity !== null && (apart.reserved || 0) > apart.capacity + slack) {
      return told(apart, "too big", because, [...data.too_big, "host"], "lent");
    }
    return told(apart, "too big", because, data.too_big, assumed);
  }

  function weighed(given, tried, limit, slack) {
    const { allocated, reserved, allowed } = given, cached = Math.max(0, reserved - allocated);
    let free = given.free === null ? limit - reserved : given.free;
    if (allowed !== null) free = Math.min(free, Math.max(0, allowed - reserved));
    const [message, assumed] = toldApart(given);
    const outside = allowed !== null ? 0 : ofOthers(message, reserved);
    const theirs = said("outside", { outside });
    const others = ["others", "elsewhere", "reservation", "smaller"];
    if (free > tried + data.drivers + slack) {
      return message.others.length && outside * data.tenth >= limit
        ? told(message, "another process", theirs, others, assumed)
        : told(message, "unknown", said("refused", { tried, free }),
          ["others", "expandable", "restart", "smaller"]);
    }
    const context = message.in_use === null ? 0 : Math.max(0, message.in_use - reserved);
    const raised = allowed !== null ? ["fraction"] : [], wrong = [];
    if (cached + free + slack >= tried && cached * data.tenth >= limit) {
      wrong.push([cached, "in pieces", said("in pieces", { cached, tried }),
        ["expandable", "padding", ...raised, "smaller"]]);
    }
    if (outside + free + slack >= tried && outside * data.tenth >= limit) {
      wrong.push([outside, "another process", theirs, others]);
    }
    if (context > data.context && context + free + slack >= tried) {
      wrong.push([context, "a context", said("context", { context }),
        ["libraries", "workers", "smaller"]]);
    }
    if (wrong.length) {
      const [, verdict, because, cures] = wrong.reduce((a, b) => (b[0] > a[0] ? b : a));
      return told(message, verdict, because, cures, assumed);
    }
    return told(message, "too big", said("beside", { tried, allocated, limit }),
      [...raised, ...data.too_big, ...(cached >= tried ? ["expandable"] : [])], assumed);
  }

  function toldApart(message) {
    const reserved = message.reserved || message.allocated || 0;
    const large = message.others.filter((n) => n >= reserved - Math.floor(reserved / 1000));
    if (message.in_use !== null || !large.length) return [message, ""];
    const own = Math.min(...large), others = [...message.others];
    others.splice(others.indexOf(own), 1);
    return [{ ...message, in_use: own, others }, said("own", { own })];
  }

  function ofOthers({ others, capacity, free, in_use }, reserved) {
    if (others.length || capacity === null || free === null) {
      return others.reduce((sum, n) => sum + n, 0);
    }
    if (in_use !== null) return Math.max(0, capacity - free - in_use);
    return Math.max(0, capacity - free - reserved - data.context);
  }

  return { binary, explain, parse };
}

// The field and its answer

(() => {
  const $ = (id) => document.getElementById(id);
  const field = $("x-message"), AT_ONCE = 3; // cures; the others unfold
  if (!field) return;
  const data = JSON.parse($("explain-data").textContent), { binary, explain } = everyByteExplain(data);
  const element = (tag, text = "", attributes = {}) => {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  // Who holds the card, as far as the message tells
  function holders({ capacity, free, in_use, others, allocated, reserved }) {
    if (capacity === null || allocated === null) return [];
    const cached = reserved === null ? 0 : Math.max(0, reserved - allocated);
    const beside = in_use === null ? 0 : Math.max(0, in_use - allocated - cached);
    const elsewhere = others.reduce((sum, n) => sum + n, 0);
    const rest = capacity - allocated - cached - beside - elsewhere - (free ?? 0);
    return [
      ["allocated", "tensors", allocated],
      ["cached", "reserved, not in use", cached],
      ["beside", "this process beside them", beside],
      ["others", "other processes", elsewhere],
      ["rest", in_use === null ? "others, and this process beside them" : "other processes", rest],
      ["free", "free", free ?? 0],
    ].filter(([, , nbytes]) => nbytes > 0);
  }

  function draw(message) {
    const parts = message === null ? [] : holders(message), bar = $("x-bar"), legend = $("x-legend");
    const all = Math.max(message?.capacity ?? 0, parts.reduce((sum, [, , n]) => sum + n, 0),
      message?.tried ?? 0);
    const width = (nbytes) => `${Math.min(100, (100 * nbytes) / all)}%`;
    bar.replaceChildren(...parts.map(([kind, , nbytes]) => {
      const part = element("span", "", { "data-part": kind });
      part.style.width = width(nbytes);
      return part;
    }));
    const entries = parts.map(([kind, name, nbytes]) => [kind, `${name} ${binary(nbytes)}`]);
    if (parts.length) {
      const limit = element("span", "", { class: "limit" });
      limit.style.left = width(message.capacity);
      bar.append(limit);
      $("x-tried").style.width = width(message.tried);
      entries.unshift(["tried", `the request ${binary(message.tried)}`]);
    }
    bar.setAttribute("aria-label", entries.map(([, text]) => text).join(", "));
    legend.replaceChildren(...entries.map(([kind, text]) => {
      const entry = element("li", text);
      entry.prepend(element("span", "", { "data-part": kind }));
      return entry;
    }));
    $("x-card").hidden = !parts.length;
  }

  function show() {
    const text = field.value, found = explain(text), { message } = found;
    $("x-result").hidden = text.trim() === "";
    $("x-verdict").textContent = message === null
      ? "Not recognised" : `Verdict: ${found.verdict}`;
    $("x-because").textContent = `${found.because[0].toUpperCase()}${found.because.slice(1)}.`;
    $("x-assumed").textContent = found.assumed ? `Assumed: ${found.assumed}.` : "";
    const rows = Object.entries(data.names).map(([name, label]) => [label, message?.[name] ?? null])
      .filter(([, nbytes]) => nbytes !== null);
    for (const nbytes of message?.others ?? []) rows.push(["another process", nbytes]);
    $("x-parts").replaceChildren(...rows.map(([label, nbytes]) => {
      const row = element("tr");
      const cell = element("td");
      cell.append(element("data", binary(nbytes), { value: nbytes, title: `${nbytes} B` }));
      row.append(element("th", label, { scope: "row" }), cell);
      return row;
    }));
    $("x-table").hidden = !rows.length;
    draw(message);
    const cures = found.cures.map((cure) => {
      const entry = element("li"), section = cure.section ? `#${cure.section}` : "";
      const here = location.pathname.endsWith(`/${cure.chapter}.html`) && section;
      entry.append(element("strong", cure.do), ` ${cure.why} `,
        element("a", "Proof", { href: here || `${cure.chapter}.html${section}` }));
      return entry;
    });
    $("x-cures").replaceChildren(...cures.slice(0, AT_ONCE));
    $("x-others").replaceChildren(...cures.slice(AT_ONCE));
    $("x-more").hidden = cures.length <= AT_ONCE;
    $("x-todo").hidden = !found.cures.length;
  }

  field.addEventListener("input", show);
  field.addEventListener("focus", () => field.select(), { once: true }); // yours goes over the example
  show();
})();
