// What scrolls sideways shows it: it fades at an edge beyond which there is more, and the
// keyboard reaches it, also where it was folded when the page was loaded. A table that scrolls
// anyway gives its sentences room, rather than a word a line.
"use strict";

const SCROLLING =
  ".pst-scrollable-table-container, .bd-article div.math, .bd-article pre";
const LONG = 20; // characters

function mark(place) {
  const right = place.scrollWidth - place.clientWidth - place.scrollLeft;
  place.classList.toggle("more-left", place.scrollLeft > 1);
  place.classList.toggle("more-right", right > 1);
  if (place.scrollWidth > place.clientWidth + 1) {
    place.tabIndex = 0;
    for (const cell of place.querySelectorAll("td")) {
      cell.classList.toggle("long", cell.textContent.length > LONG);
    }
  }
}

const sizes = new ResizeObserver((entries) => {
  for (const entry of entries) {
    mark(entry.target);
  }
});

for (const place of document.querySelectorAll(SCROLLING)) {
  place.addEventListener("scroll", () => mark(place), { passive: true });
  sizes.observe(place);
}
