"use strict";
// Tables sort by their headers. Without this script they are plain tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key;
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every((row) => key(row) === undefined || !isNaN(key(row)));
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const order = numeric ? x - y : x.localeCompare(y, undefined, { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
      const said = document.getElementById("said");
      said.textContent = `Sorted by ${button.textContent}, ${up ? "ascending" : "descending"}.`;
    });
  });
}
// A table that is wider than the page shows it, and at which edge it goes on.
for (const frame of document.querySelectorAll(".frame")) {
  const table = frame.firstElementChild;
  const first = table.querySelector("th");
  const look = () => {
    const beyond = table.scrollWidth - table.clientWidth;
    frame.classList.toggle("wide", beyond > 1);
    frame.classList.toggle("goes-left", table.scrollLeft > 1);
    frame.classList.toggle("goes-right", table.scrollLeft < beyond - 1);
    frame.style.setProperty("--first", `${first.offsetWidth}px`);
  };
  table.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(table);
}
// What is folded on the screen is not folded on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.more")) details.open = true;
});
