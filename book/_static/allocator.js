/* One request at a time, of those that book/_ext/diagrams.py writes into the page. */
"use strict";

(() => {
  const root = document.getElementById("requests");
  if (!root) return;
  const steps = [...root.querySelectorAll("li")], buttons = [...root.querySelectorAll("button")];
  let at = 0;

  function show(step) {
    at = Math.max(0, Math.min(steps.length - 1, step));
    for (const [i, item] of steps.entries()) item.hidden = i !== at;
    buttons[0].disabled = at === 0;
    buttons[1].disabled = at === steps.length - 1;
    if (document.activeElement?.disabled) buttons.find((button) => !button.disabled).focus();
    root.querySelector("output").textContent = `Request ${at + 1} of ${steps.length}`;
  }

  for (const button of buttons) {
    button.addEventListener("click", () => show(at + Number(button.dataset.step)));
  }
  root.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  root.querySelector(".controls").hidden = false;
  root.classList.add("live");
  show(0);
})();
