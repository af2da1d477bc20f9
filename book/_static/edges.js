// What scrolls sideways shows it: it fades at an edge beyond which there is more, and the
// keyboard reaches it, also where it was folded when the page was loaded. On a phone a table that
// would scroll stands in a stack instead: each row a list of what its columns say. One with many
// columns, a matrix of ticks, scrolls there too.
"use strict";

const SCROLLING =
  ".pst-scrollable-table-container, .bd-article div.math, .bd-article pre, .scroll";
const LONG = 20; // characters
const PHONE = matchMedia("(max-width: 576px)");
const MATRIX = 9; // columns

function label(table) {
  const heads = [...table.tHead.rows[0].cells].map((cell) =>
    cell.textContent.trim(),
  );
  table.setAttribute("role", "table"); // what is no table in its layout still is one
  for (const row of table.rows) {
    row.setAttribute("role", "row");
    for (const [i, cell] of [...row.cells].entries()) {
      cell.setAttribute("role", cell.tagName === "TH" ? "columnheader" : "cell");
      cell.dataset.head = heads[i] ?? "";
      cell.classList.toggle("blank", !cell.textContent.trim());
    }
  }
}

// What is wider than its place: whether it can stand in a stack, and which cells hold sentences.
function fit(place) {
  const table = place.querySelector("table");
  if (!place.clientWidth || !table?.tHead || place.matches(".scroll")) {
    return; // the estimator's tables, which it draws anew, stay as they are
  }
  table.classList.remove("stacked");
  for (const cell of table.querySelectorAll("td")) {
    cell.classList.remove("long");
  }
  if (place.scrollWidth <= place.clientWidth + 1) {
    return;
  }
  for (const cell of table.querySelectorAll("td")) {
    cell.classList.toggle("long", cell.textContent.trim().length > LONG);
  }
  if (PHONE.matches && table.tHead.rows[0].cells.length < MATRIX) {
    label(table);
    table.classList.add("stacked");
  }
}

function mark(place) {
  const right = place.scrollWidth - place.clientWidth - place.scrollLeft;
  place.classList.toggle("more-left", place.scrollLeft > 1);
  place.classList.toggle("more-right", right > 1);
  if (place.scrollWidth > place.clientWidth + 1) {
    place.tabIndex = 0;
  }
}

const sizes = new ResizeObserver((entries) => {
  for (const entry of entries) {
    fit(entry.target);
    mark(entry.target);
  }
});

for (const place of document.querySelectorAll(SCROLLING)) {
  place.addEventListener("scroll", () => mark(place), { passive: true });
  sizes.observe(place);
}
