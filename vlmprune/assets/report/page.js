// SPDX-License-Identifier: Apache-2.0
// Sorting and filters. The page reads well without any of it.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const table = document.getElementById("board");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = all("th[data-column]", table);
  const lead = heads[0].cellIndex; // model and task, where there are several
  const menu = document.getElementById("sort");
  const text = document.getElementById("filter-text");
  const seeds = document.getElementById("filter-seed");

  function sort(column, direction) {
    const key = (row) => {
      const value = row.cells[column + lead].dataset.sort;
      return value === "" ? null : isNaN(value) ? value : Number(value);
    };
    const sorted = rows.map((row, place) => [key(row), place, row]);
    sorted.sort(([a, i], [b, j]) => {
      if (a === null || b === null) return (a === null) - (b === null) || i - j; // what has no value stays last
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return direction * order || i - j;
    });
    body.append(...sorted.map(([, , row]) => row));
    heads.forEach((head, number) => {
      if (number === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    menu.value = String(column);
  }

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    sort(column, now ? (now === "ascending" ? -1 : 1) : column ? -1 : 1); // numbers: largest first
  }));
  menu.addEventListener("change", () => sort(Number(menu.value), Number(menu.value) ? -1 : 1));

  const filters = all("[data-filter]");
  const filtered = all("[data-spec], table[data-model], .panels[data-model]");
  const flips = all("#flips article");

  function passes(item) {
    const tags = item.dataset;
    for (const { dataset, value } of filters) {
      const own = tags[dataset.filter];
      const exempt = own === undefined || (dataset.filter === "keep" && "dense" in tags); // every budget is compared with dense
      if (value && !exempt && own !== value) return false;
    }
    if ("seed" in tags && !seeds.checked) return false;
    if ("dense" in tags || !("spec" in tags)) return true; // so is every method
    return tags.spec.toLowerCase().includes(text.value.trim().toLowerCase());
  }

  function filter() {
    for (const item of filtered) item.hidden = !passes(item);
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = `${shown} of ${rows.length} rows`;
    document.querySelector("#table .none").hidden = shown > 0;
    document.querySelector("#flips .none").hidden = !flips.length || flips.some((flip) => !flip.hidden);
  }

  const form = document.querySelector(".filters");
  form.addEventListener("input", filter); // while typing
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter)); // after the fields have gone back
  filter();
})();
