
"use strict";
(() => {
    const element = document.getElementById("timeline");
    if (!element) return;
    const { left, width, kinds, places, phases, at } = JSON.parse(element.textContent);
    const chart = document.querySelector(".chart");
    const svg = chart.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const [where, source, held] = [".where", ".source", ".held"].map((name) => document.querySelector(name));
    const last = places.of.length - 1;
    const number = new Intl.NumberFormat("en-US");
    // Three digits and a unit: `short` of every_byte/units.py.
    const short = (bytes) => {
        if (bytes < 1000) return bytes ? `${bytes} B` : "0";
        const [unit, name] = [
            [1e3, "kB"],
            [1e6, "MB"],
            [1e9, "GB"],
        ].find(([size, name]) => bytes / size < 999.5 || name === "GB");
        const n = bytes / unit;
        const digits = n < 9.995 ? 2 : n < 99.95 ? 1 : 0;
        return `${n.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${name}`;
    };
    let now = at;
    const show = (index) => {
        now = Math.max(0, Math.min(last, index));
        const [step, phase, line, text] = places.known[places.of[now]];
        const bytes = places.bytes[now];
        const total = bytes.reduce((sum, n) => sum + n, 0);
        const x = left + (width * now) / Math.max(last, 1);
        cursor.setAttribute("x1", x);
        cursor.setAttribute("x2", x);
        where.textContent = `Step ${step}, ${phases[phase]}, at ${line}: ${short(total)} (${number.format(total)} B)`;
        source.textContent = text || "\u00a0";
        const pairs = kinds
            .map((kind, i) => [kind, bytes[i]])
            .filter((pair) => pair[1])
            .sort((a, b) => b[1] - a[1]);
        held.textContent = pairs.map(([kind, n]) => `${kind} ${short(n)}`).join(" · ");
        held.title = pairs.map(([kind, n]) => `${kind} ${number.format(n)} B`).join(", ");
        chart.setAttribute("aria-valuenow", now);
        chart.setAttribute("aria-valuetext", `${where.textContent} ${text}`);
    };
    const point = (event) => {
        const box = svg.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
        show(Math.round(((x - left) / width) * last));
    };
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("keydown", (event) => {
        const stride = Math.max(1, Math.round(last / 20));
        const to = {
            ArrowLeft: now - 1,
            ArrowDown: now - 1,
            ArrowRight: now + 1,
            ArrowUp: now + 1,
            PageDown: now - stride,
            PageUp: now + stride,
            Home: 0,
            End: last,
        }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show(to);
    });
    show(at);
})();
