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
    readout.textContent = [`step ${Math.round(lowX + ((x - startX) / (stopX - startX)) * (highX - lowX))}`, ...near].join("\n");
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
document.body.dataset.charts = String(charts.length);
