// What the theme's buttons do: see book/_ext/content_policy.py.
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
