/* The start page's picture, drawn again for what a reader chooses: see book/_ext/hero.py.
   The bytes are those of estimate.js. */
"use strict";

(() => {
  const root = document.getElementById("hero");
  if (!root) return;
  const data = JSON.parse(document.getElementById("hero-data").textContent);
  const F = everyByteFormulas(data.estimator);
  const form = root.querySelector("form"), moment = document.getElementById("hero-moment");
  const $ = (selector) => root.querySelector(selector);
  const GB = 1e9, MB = 1e6;
  const least = (a, b) => (a < b ? a : b);

  function short(nbytes) { // with three digits
    if (!nbytes) return "0 B";
    const [unit, name] = nbytes >= 0.9995 * GB ? [GB, "GB"] : [MB, "MB"];
    const number = nbytes / unit, digits = number < 9.995 ? 2 : number < 99.95 ? 1 : 0;
    return `${number.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${name}`;
  }

  function chosen() {
    const of = (name) => form.elements.namedItem(name).value;
    const { dtype, amp } = data.precisions[of("precision")];
    return {
      model: of("model"), card: of("card"),
      setup: { ...data.estimator.presets.full, optimizer: of("optimizer"), dtype, amp,
        batch: data.batches[of("batch")], length: data.lengths[of("length")] },
    };
  }

  function rowsOf(held) { // the bytes of each kind at each moment
    const moments = Object.fromEntries(held.moments);
    return data.moments.map(([name, , gradients, activations]) => {
      let left = moments[name] + held.context;
      const row = [held.parameters, held.optimizer_states, held.gradients * BigInt(gradients) / 100n,
        held.activations * BigInt(activations) / 100n].map((nbytes) => {
        const part = least(nbytes, left);
        left -= part;
        return part;
      });
      return [...row, left].map(Number);
    });
  }

  function pointsOf(held, rows) {
    const rest = least(rows[0].at(-1) + Number(held.cast_weights), rows[1].at(-1));
    const drawn = data.moments.map(([, place], i) => [place, rows[i]]);
    drawn.splice(1, 0, [data.layers, [...rows[1].slice(0, -1), rest]]);
    return [...drawn, [data.end, rows[0]], [100, rows[0]]];
  }

  function pathsOf(drawn, top) {
    let under = drawn.map(() => 0);
    return data.kinds.map((_, kind) => {
      const over = drawn.map(([, row], i) => under[i] + row[kind]);
      const at = (heights) => drawn.map(([x], i) => `${x} ${(100 - 100 * heights[i] / top).toFixed(2)}`);
      const area = `M${[...at(over), ...at(under).reverse()].join("L")}Z`;
      under = over;
      return area;
    });
  }

  let shown;

  function showMoment() { // the legend, and the line in the picture
    const [name, place] = data.moments[moment.value], row = shown.rows[moment.value];
    const all = [...row].reverse();
    all.push(row.reduce((a, b) => a + b, 0));
    for (const [i, item] of root.querySelectorAll(".legend data").entries()) {
      item.value = all[i];
      item.textContent = short(all[i]);
    }
    $(".at").textContent = name;
    $(".now").style.left = `${place}%`;
    moment.setAttribute("aria-valuetext", `${name}: ${short(all.at(-1))}`);
  }

  function update() {
    const { model, card, setup } = chosen(), [capacity, workspace, context] = data.estimator.cards[card];
    for (const name of ["batch", "length"]) {
      const text = setup[name].toLocaleString("en-US"), slider = form.elements.namedItem(name);
      slider.setAttribute("aria-valuetext", text);
      form.querySelector(`output[for=${slider.id}]`).textContent = text;
    }
    const held = F.memory(F.dimensions(data.estimator.models[model]), setup, workspace, context);
    const most = Number(held.least), says = F.verdict(held, BigInt(capacity)), top = 1.14 * Math.max(most, capacity);
    const rows = rowsOf(held), peak = data.moments.findIndex(([name]) => name === held.peakAt);
    shown = { rows };
    const place = data.moments[peak][1], height = (nbytes) => `${(100 - 100 * nbytes / top).toFixed(2)}%`;
    pathsOf(pointsOf(held, rows), top).forEach((area, i) => {
      root.querySelectorAll("path")[i].setAttribute("d", area);
    });
    $(".card-line").style.top = $(".over").style.height = height(capacity);
    $(".card-line").classList.toggle("left", place > 50);
    $(".card-line span").textContent = `${card}: ${data.sold[card]}`;
    $(".peak").style.left = `${place}%`;
    $(".peak").style.top = height(most);
    $(".peak span").style.transform = `translate(-${place}%,-135%)`;
    $(".peak span").textContent = `peak ${short(most)}`;
    const verdict = `Training ${model} takes ${short(most)} at its peak. `
      + `The ${card} can give ${short(capacity)}: `;
    const end = $(".verdict b");
    end.textContent = data.ends[says];
    end.classList.toggle("out", says === "does not fit");
    $(".verdict").replaceChildren(verdict, end);
    const parts = data.labels.map((label, i) => `${label} ${short(rows[peak][i])}`).join(", ");
    $(".plot").setAttribute("aria-label",
      `Memory during one training step, by kind. ${verdict}${end.textContent} At the peak, ${held.peakAt}: ${parts}.`);
    const words = { model, card, batch: setup.batch, length: setup.length, optimizer: setup.optimizer,
      dtype: setup.dtype, amp: setup.amp ?? "" };
    $(".more").href = `estimator.html#${new URLSearchParams(words)}`;
    moment.value = peak;
    showMoment();
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  moment.addEventListener("input", showMoment);
  $(".plot").addEventListener("pointermove", ({ clientX }) => { // to the moment nearest to it
    const box = $(".plot").getBoundingClientRect(), at = 100 * (clientX - box.left) / box.width;
    const away = data.moments.map(([, place]) => Math.abs(place - at));
    moment.value = away.indexOf(Math.min(...away));
    showMoment();
  });
  form.hidden = $(".moment").hidden = false;
  update();
})();
