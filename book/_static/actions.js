// What the theme's buttons do (see book/_ext/content_policy.py), and how a page is printed.
"use strict";

const ACTIONS = {
  fullscreen: () => window.toggleFullScreen(),
  print: () => window.print(),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button !== null && Object.hasOwn(ACTIONS, button.dataset.action)) {
    ACTIONS[button.dataset.action]();
  }
});

// On paper a page is light in any theme: browsers leave its dark background out.
const page = document.documentElement;
let theme = page.dataset.theme;

window.addEventListener("beforeprint", () => {
  theme = page.dataset.theme;
  page.dataset.theme = "light";
});
window.addEventListener("afterprint", () => {
  page.dataset.theme = theme;
});
