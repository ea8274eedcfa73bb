"use strict";
// A click on a column title sorts by that column: the best value first, with the next click last. Empty cells stay last.
const table = document.getElementById("methods");
const heads = Array.from(table.tHead.rows[0].cells);
function sort(column) {
  const head = heads[column];
  const first = head.dataset.better === "higher" ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const way = head.getAttribute("aria-sort") === first ? other : first;
  for (const each of heads) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", way);
  const sign = way === "ascending" ? 1 : -1;
  const number = head.classList.contains("number");
  const key = (row) => row.cells[column].dataset.order;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (number ? Number(x) - Number(y) : x.localeCompare(y));
  });
  table.tBodies[0].append(...rows);
}
heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => sort(i)));
