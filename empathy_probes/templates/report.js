"use strict";
// Figures: the printed image stands until its interactive twin is drawn, so the page is complete without scripts.
(function () {
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const hovers = window.matchMedia("(hover: hover)").matches;
  function draw(box) {
    const id = box.dataset.live;
    const figure = JSON.parse(document.getElementById(id + "-data").textContent);
    // A finger scrolls the page; only a mouse drags a zoom box.
    if (coarse) figure.layout.dragmode = false;
    const config = {
      displaylogo: false, responsive: true, displayModeBar: hovers ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
    };
    box.classList.add("is-live");
    Plotly.newPlot(id, figure.data, figure.layout, config).catch(function () { box.classList.remove("is-live"); });
  }
  const boxes = document.querySelectorAll("[data-live]");
  if (window.Plotly && "IntersectionObserver" in window) {
    const seen = new IntersectionObserver(function (entries) {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "800px" });
    boxes.forEach(function (box) { seen.observe(box); });
  } else if (window.Plotly) {
    boxes.forEach(draw);
  }

  // Tables: a heading sorts, numbers as numbers, blanks last.
  document.querySelectorAll("table.data th button").forEach(function (button) {
    button.addEventListener("click", function () {
      const th = button.closest("th");
      const body = th.closest("table").tBodies[0];
      const column = th.cellIndex;
      const down = th.getAttribute("aria-sort") !== "ascending";
      th.parentElement.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      th.setAttribute("aria-sort", down ? "ascending" : "descending");
      const rows = Array.from(body.rows, function (row) { return [row.cells[column].dataset.sort || "", row]; });
      rows.sort(function (a, b) {
        if (!a[0] || !b[0]) return (a[0] ? 0 : 1) - (b[0] ? 0 : 1);
        const x = Number(a[0]), y = Number(b[0]);
        const order = isNaN(x) || isNaN(y) ? a[0].localeCompare(b[0]) : x - y;
        return down ? order : -order;
      });
      rows.forEach(function (pair) { body.appendChild(pair[1]); });
    });
  });

  document.querySelectorAll(".filter input").forEach(function (input) {
    input.addEventListener("input", function () {
      const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const table = input.closest("label").nextElementSibling.querySelector("table.data");
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every(function (word) { return text.includes(word); });
      }
    });
  });

  // On a phone the contents would push the headlines off the first screen.
  const contents = document.querySelector(".contents details");
  if (contents && window.matchMedia("(max-width: 1000px)").matches) contents.open = false;
})();
