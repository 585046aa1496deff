// The read-out: the key of a plot says the values at the step under the pointer, or at the last step.
"use strict";

function plain(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0 || (Number.isInteger(value) && size < 1e7)) return value.toLocaleString("en-US");
  if (size >= 1e7 || size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(size)))));
}

const short = (value) => plain(value).replace("-", "−");

function nearest(points, step) {
  let best = null;
  for (const point of points) {
    if (point[1] !== null && (best === null || Math.abs(point[0] - step) < Math.abs(best[0] - step))) best = point;
  }
  return best;
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg");
  const keys = [...figure.querySelectorAll(".key b")];
  const at = figure.querySelector(".at");
  const atRest = [at.textContent, ...keys.map((key) => key.textContent)];
  const steps = [...new Set(data.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
  const {x, y} = data;
  let marks = null;
  let index = steps.length - 1;

  const draw = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    marks.append(node);
  };
  const height = (value) => {
    const scale = y.log ? Math.log10 : (v) => v;
    const share = (scale(value) - scale(y.low)) / (scale(y.high) - scale(y.low));
    return y.bottom + (y.top - y.bottom) * Math.min(1, Math.max(0, share));
  };
  const across = (step) => x.left + (x.right - x.left) * (step - x.low) / (x.high - x.low);

  function hide() {
    marks?.remove();
    marks = null;
    [at, ...keys].forEach((node, i) => { node.textContent = atRest[i]; });
  }

  function show(step) {
    marks?.remove();
    marks = document.createElementNS("http://www.w3.org/2000/svg", "g");
    draw("path", {class: "cursor", d: `M${across(step)},${y.bottom}V${y.top}`});
    at.textContent = `step ${step.toLocaleString("en-US")}`;
    data.series.forEach((series, i) => {
      const point = nearest(series.points, step);
      if (point === null) return;
      const far = point[0] !== step ? ` at ${point[0].toLocaleString("en-US")}` : "";
      keys[i].textContent = short(point[1]) + (point.length > 2 ? ` ± ${short(point[2])}` : "") + far;
      if (!data.stacked) draw("circle", {class: `dot c${i % 6}`, r: 3.4, cx: across(point[0]), cy: height(point[1])});
    });
    svg.append(marks);
  }

  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const wanted = x.low + (x.high - x.low) * (pixel - x.left) / (x.right - x.left);
    index = steps.reduce((best, step, i) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best), 0);
    show(steps[index]);
  };
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move === undefined) return;
    event.preventDefault();
    index = Math.min(steps.length - 1, Math.max(0, index + (marks === null ? 0 : move)));
    show(steps[index]);
  });
}
