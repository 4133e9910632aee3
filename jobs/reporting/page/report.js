"use strict";
// Draws the curves and shows the images of a report from the JSON in the page; it loads nothing.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 8, bottom: 20, left: 46 };

function element(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

function formatted(value, form) {
  if (form === "share") return (100 * value).toFixed(Math.abs(value) < 0.1 ? 2 : 1) + " %";
  const size = Math.abs(value);
  if (value !== 0 && size < 0.0001) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(+value.toPrecision(4));
}

// Round numbers that divide low..high into about `count` parts; a logarithmic scale also uses powers of ten.
function ticks(low, high, count, log) {
  if (log) {
    const values = [];
    const mantissas = Math.log10(high / low) > 2 ? [1] : Math.log10(high / low) > 0.8 ? [1, 2, 5] : [1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const mantissa of mantissas) values.push(mantissa * 10 ** power);
    return values.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) values.push(value);
  return values;
}

function drawChart(figure) {
  const { name, form, zero } = figure.dataset;
  const axis = document.querySelector("[name=axis]:checked").value;
  const log = document.getElementById("log").checked && zero !== "yes";
  const lines = data.runs
    .map((run, number) => ({ run: run.name, number, events: run.events, ...run.curves[name] }))
    .filter((line) => line.value);
  const svg = figure.querySelector("svg");
  svg.replaceChildren();
  const width = svg.clientWidth, height = svg.clientHeight;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);  // paper has another width
  if (!width) return;
  const finite = (values) => values.filter((value) => value !== null && (!log || value > 0));
  const xs = lines.flatMap((line) => line[axis]), ys = lines.flatMap((line) => finite(line.value));
  if (!ys.length) return;
  const minimum = (values) => values.reduce((a, b) => Math.min(a, b));
  const maximum = (values) => values.reduce((a, b) => Math.max(a, b));
  const left = 0;
  const right = maximum(xs) || 1;
  let [low, high] = [zero === "yes" ? 0 : minimum(ys), maximum(ys)];
  if (low === high) high = low + (Math.abs(low) || 1);
  if (!log) high += 0.04 * (high - low);
  const scale = log ? Math.log : (value) => value;
  const x = (value) => MARGIN.left + ((value - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) =>
    height - MARGIN.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (height - MARGIN.top - MARGIN.bottom);
  for (const tick of ticks(low, high, 4, log)) {
    element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }, svg);
    element("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent = formatted(tick, form);
  }
  for (const tick of ticks(left, right, Math.max(2, width / 90), false))
    element("text", { x: x(tick), y: height - 5, "text-anchor": "middle" }, svg).textContent = formatted(tick, "");
  for (const line of lines) {
    let path = "", pen = "M";
    line.value.forEach((value, n) => {
      if (value === null || (log && value <= 0)) pen = "M";
      else (path += `${pen}${x(line[axis][n]).toFixed(1)} ${y(value).toFixed(1)}`), (pen = "L");
    });
    element("path", { class: "curve", d: path, stroke: `var(--run-${line.number % 8})` }, svg);
    if (name === "loss")
      for (const position of line.events[axis])
        element("line", { class: "event", x1: x(position), x2: x(position), y1: height - MARGIN.bottom, y2: height - MARGIN.bottom - 7 }, svg);
  }
  figure.onpointermove = (event) => showValues(figure, svg, event, lines, axis, x, y, form, left, right, width);
  figure.onpointerleave = () => {
    figure.querySelectorAll(".tip, .cursor, circle").forEach((old) => old.remove());
  };
}

// Shows the value of each curve under the pointer.
function showValues(figure, svg, event, lines, axis, x, y, form, left, right, width) {
  figure.onpointerleave();
  const at = event.clientX - svg.getBoundingClientRect().left;
  const wanted = left + ((at - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (right - left);
  const tip = document.createElement("div");
  tip.className = "tip";
  let position = null;
  for (const line of lines) {
    let best = -1;
    line.value.forEach((value, n) => {
      if (value !== null && (best < 0 || Math.abs(line[axis][n] - wanted) < Math.abs(line[axis][best] - wanted))) best = n;
    });
    if (best < 0) continue;
    position ??= line[axis][best];
    const colour = `var(--run-${line.number % 8})`;
    element("circle", { cx: x(line[axis][best]), cy: y(line.value[best]), r: 3.5, fill: colour }, svg);
    const row = document.createElement("div");
    row.textContent = formatted(line.value[best], form) + (lines.length > 1 ? "  " + line.run : "");
    row.style.color = lines.length > 1 ? colour : "";
    tip.append(row);
  }
  if (position === null) return;
  element("line", { class: "cursor", x1: x(position), x2: x(position), y1: MARGIN.top, y2: svg.clientHeight - MARGIN.bottom }, svg);
  const head = document.createElement("small");
  head.textContent = `${axis} ${formatted(position, "")}`;
  tip.prepend(head);
  figure.append(tip);
  tip.style.top = "1.9rem";
  const limit = figure.clientWidth - tip.offsetWidth - 4;
  tip.style.left = `${Math.max(4, at + 22 > limit ? Math.min(limit, at - tip.offsetWidth) : at + 22)}px`;
}

function drawCharts() {
  document.querySelectorAll(".chart").forEach(drawChart);
}

function showImages(panel) {
  const series = data.series[panel.dataset.series];
  const [time, ratio] = panel.querySelectorAll("input");
  const [timeText, ratioText] = panel.querySelectorAll("output");
  const image = panel.querySelector("img");
  const show = () => {
    const entry = series.entries[time.value], wanted = series.ratios[ratio.value];
    // A checkpoint that has no image at this ratio shows its nearest ratio.
    const nearest = Object.keys(entry.files).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    image.src = entry.files[nearest].src;
    image.alt = `${entry.label}, ${Math.round(100 * nearest)} % removed`;
    timeText.value = entry.label;
    ratioText.value = `${+(100 * nearest).toFixed(1)} % removed, loss ${entry.files[nearest].loss.toFixed(3)}`;
  };
  for (const [slider, last] of [[time, series.entries.length - 1], [ratio, series.ratios.length - 1]]) {
    slider.max = last;
    slider.disabled = last === 0;
    slider.addEventListener("input", show);
  }
  time.value = time.max;
  ratio.value = 0;
  show();
}

document.querySelectorAll(".images").forEach(showImages);
document.querySelectorAll(".curve-controls input").forEach((input) => input.addEventListener("change", drawCharts));
if (document.querySelector(".chart")) new ResizeObserver(drawCharts).observe(document.querySelector(".charts"));
