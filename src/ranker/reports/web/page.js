"use strict";
// Tooltip: the step under the pointer and the value of each line there, read from the drawn paths.
const readout = document.getElementById("readout");
const charts = document.querySelectorAll("svg.chart.line");
const short = (v) => (v !== 0 && (Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4)));
for (const svg of charts) {
  const [lowX, highX, startX, stopX] = svg.dataset.x.split(",").map(Number);
  const [lowY, highY, startY, stopY, log] = svg.dataset.y.split(",").map(Number);
  const lines = [...svg.querySelectorAll("path.line")].map((path) => ({
    label: path.dataset.label,
    points: [...path.getAttribute("d").matchAll(/(-?[\d.]+),(-?[\d.]+)/g)].map((m) => [Number(m[1]), Number(m[2])]),
  }));
  const value = (y) => {
    const share = (y - startY) / (stopY - startY);
    return log ? lowY * (highY / lowY) ** share : lowY + share * (highY - lowY);
  };
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    if (x < startX || x > stopX) return;
    const near = lines.filter((line) => line.points.length).map((line) => {
      const point = line.points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
      return `${line.label}  ${short(value(point[1]))}`;
    });
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    const at = Math.round(lowX + ((x - startX) / (stopX - startX)) * (highX - lowX));
    readout.textContent = [svg.dataset.names?.split("|")[at] ?? `step ${at}`, ...near].join("\n");
    readout.hidden = false;
    const width = readout.offsetWidth, height = readout.offsetHeight;
    readout.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    readout.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    readout.hidden = true;
  });
}
// A click on the head of a column sorts by it: numbers by value, then texts, empty cells last.
const key = (cell) => {
  const text = cell.textContent.trim();
  if (cell.dataset.order !== undefined) return [0, Number(cell.dataset.order), ""];
  return text === "" ? [2, 0, ""] : [1, 0, text];
};
const ahead = (a, b) => a[0] - b[0] || a[1] - b[1] || a[2].localeCompare(b[2], undefined, { numeric: true });
for (const head of document.querySelectorAll("table.sortable th")) {
  head.firstElementChild.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) => (a[0] === 2 || b[0] === 2 ? a[0] - b[0] : down * ahead(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}
for (const field of document.querySelectorAll("label.search input")) {
  const rows = field.closest("label").nextElementSibling.querySelectorAll("tbody tr");
  const texts = [...rows].map((row) => row.textContent.toLowerCase());
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => (row.hidden = !words.every((word) => texts[i].includes(word))));
  });
}
// A box of the header hides everything of one kind, such as one optimizer.
for (const box of document.querySelectorAll("[data-hides]")) {
  const show = () => {
    for (const mark of document.querySelectorAll(`main .${box.dataset.hides}`)) {
      (mark.closest("p.legend span") ?? mark).classList.toggle("off", !box.checked);
    }
  };
  box.addEventListener("change", show);
  show();
}
// Pointing at a run marks it everywhere.
const marks = {};
for (const mark of document.querySelectorAll("[data-run]")) (marks[mark.dataset.run] ??= []).push(mark);
for (const [type, on] of [["pointerover", true], ["pointerout", false]]) {
  document.addEventListener(type, (event) => {
    const name = event.target.closest?.("[data-run]")?.dataset.run;
    for (const mark of marks[name] ?? []) mark.classList.toggle("hot-run", on);
  });
}
document.body.dataset.charts = String(charts.length);
