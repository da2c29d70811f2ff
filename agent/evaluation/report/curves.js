// Learning curves: one small chart a metric, with axes, the value under the pointer, and smoothing.

const WIDTH = 340, HEIGHT = 170, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;
const SMOOTHING = 0.8;

// Shown first, in this order; every other metric is one click away.
const MAIN = [
  /^reward\/mean/, /^rollout\/em/, /^dev\/em|^dev.*\/em/, /searches/, /tokens$|length/, /entropy/,
  /clip_fraction/, /(^|\/)kl/, /grad_norm|gradient_norm/, /seconds/,
];

function rank(key) {
  const found = MAIN.findIndex((pattern) => pattern.test(key));
  return found < 0 ? MAIN.length : found;
}

// Exponential moving average, corrected for its start (Kingma & Ba 2015, section 3).
function smoothed(points) {
  let sum = 0, weight = 0;
  return points.map(([step, value]) => {
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return [step, sum / weight];
  });
}

function niceTicks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step); i <= Math.ceil(high / step); i++) {
    ticks.push(Number((i * step).toPrecision(10)));
  }
  return ticks.length > 1 ? ticks : [ticks[0], ticks[0] + step];
}

function extent(values) {
  return values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
}

function scales(points) {
  const ticks = niceTicks(...extent(points.map((p) => p[1])), 4);
  const [y0, y1] = [ticks[0], ticks[ticks.length - 1]];
  const [x0, x1] = extent(points.map((p) => p[0]));
  return {
    ticks,
    steps: niceTicks(x0, x1, 4).filter((s) => s >= x0 && s <= x1 && Number.isInteger(s)),
    x: (step) => LEFT + ((step - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT),
    y: (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM),
  };
}

function axes(scale) {
  const parts = scale.ticks.map((tick) => [
    svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: scale.y(tick), y2: scale.y(tick) }),
    svg("text", { x: LEFT - 6, y: scale.y(tick) + 3.5, "text-anchor": "end" }, formatNumber(tick)),
  ]);
  const steps = scale.steps.map((step) =>
    svg("text", { x: scale.x(step), y: HEIGHT - 8, "text-anchor": "middle" }, formatNumber(step)));
  return svg("g", { class: "axes" }, parts.flat(), steps);
}

function line(points, scale, name) {
  const path = points.map(([s, v], i) => `${i ? "L" : "M"}${scale.x(s).toFixed(1)} ${scale.y(v).toFixed(1)}`);
  return svg("path", { class: name, d: path.join("") });
}

function follow(plot, points, scale, value, rest) {
  const mark = svg("g", { class: "pointer", visibility: "hidden" },
    svg("line", { y1: TOP, y2: HEIGHT - BOTTOM }), svg("circle", { r: 3 }));
  plot.append(mark);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const nearest = points.reduce((a, b) =>
      Math.abs(scale.x(b[0]) - at) < Math.abs(scale.x(a[0]) - at) ? b : a);
    const [x, y] = [scale.x(nearest[0]), scale.y(nearest[1])];
    mark.setAttribute("visibility", "visible");
    fill(mark.firstChild, { x1: x, x2: x }, []);
    fill(mark.lastChild, { cx: x, cy: y }, []);
    value.textContent = `step ${nearest[0]}: ${formatNumber(nearest[1])}`;
  });
  plot.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    value.textContent = rest;
  });
}

function chart(key, points) {
  const scale = scales(points), few = points.length < 30;
  const last = points[points.length - 1];
  const rest = `last ${formatNumber(last[1])}`;
  const value = el("output", {}, rest);
  const label = `${key}: ${formatNumber(points[0][1])} at step ${points[0][0]}, ${formatNumber(last[1])} at step ${last[0]}`;
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    axes(scale), line(points, scale, few ? "raw few" : "raw"));
  if (few) { // too few to smooth: every point is shown
    plot.append(...points.map(([s, v]) => svg("circle", { class: "dot", cx: scale.x(s), cy: scale.y(v), r: 2.5 })));
  } else {
    plot.append(line(smoothed(points), scale, "smoothed"));
  }
  follow(plot, points, scale, value, rest);
  return el("figure", { "data-metric": key }, el("figcaption", {}, el("code", {}, key), value), plot);
}

function drawCurves() {
  const keys = Object.keys(DATA.metrics).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const main = keys.filter((key) => rank(key) < MAIN.length);
  const other = keys.filter((key) => rank(key) === MAIN.length);
  const charts = (names) => names.map((key) => chart(key, DATA.metrics[key]));
  byId("main-curves").append(...charts(main.length ? main : other));
  if (!keys.length) {
    byId("main-curves").append(el("p", { class: "empty" }, "No metrics yet: metrics.jsonl is empty or missing."));
  }
  if (main.length && other.length) {
    byId("other").hidden = false;
    byId("other").firstElementChild.textContent = `All other metrics (${other.length})`;
    byId("other-curves").append(...charts(other));
  }
  const smooth = () => byId("curves").classList.toggle("smoothing", byId("smooth").checked);
  byId("smooth").addEventListener("change", smooth);
  smooth();
}

drawCurves();
