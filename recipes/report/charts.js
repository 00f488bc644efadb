// Charts: every curve of the run over one step axis, with one cursor for all of them.

const HEIGHT = 190;
const MARGIN = { top: 10, right: 10, bottom: 24, left: 48 };
const MARKED = 40; // curves with no more points than that show each of them
const SMOOTHED = 20; // curves with fewer points are not smoothed

class Axis {
  constructor(low, high, start, end) {
    Object.assign(this, { low, high, start, end });
  }
  at(value) {
    return this.start + ((value - this.low) / (this.high - this.low || 1)) * (this.end - this.start);
  }
  value(place) {
    return this.low + ((place - this.start) / (this.end - this.start || 1)) * (this.high - this.low);
  }
}

// A curve's buckets as points; x lies in the middle of the steps that a point sums up.
function pointsOf(curve) {
  return curve.mean.map((mean, i) => {
    const first = curve.first[i];
    const last = curve.last ? curve.last[i] : first;
    const count = curve.count ? curve.count[i] : 1;
    return { first, last, count, x: (first + last) / 2, y: mean, low: curve.low ? curve.low[i] : mean, high: curve.high ? curve.high[i] : mean };
  });
}

// Running mean, unbiased at the start.
function smoothed(points, decay) {
  let total = 0;
  let weight = 0;
  return points.map((point) => {
    total = decay * total + (1 - decay) * point.y;
    weight = decay * weight + (1 - decay);
    return { ...point, y: total / weight };
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i === 0 ? 0 : Number((i * step).toPrecision(12)));
  return found;
}

// The range of the values with some air; a curve that never moves lies on a line of its own.
function rangeOf(low, high) {
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, low * 1.5), Math.max(0, high * 1.5)];
  const air = 0.06 * (high - low);
  const isNearZero = low >= 0 && low < 0.5 * high;
  return [isNearZero ? 0 : low - air, high + air];
}

function line(points, x, y) {
  return points.map((point, i) => `${i ? "L" : "M"}${x.at(point.x).toFixed(1)} ${y.at(point.y).toFixed(1)}`).join("");
}

function band(points, x, y) {
  const there = points.map((point) => `${x.at(point.x).toFixed(1)} ${y.at(point.high).toFixed(1)}`);
  const back = points.map((point) => `${x.at(point.x).toFixed(1)} ${y.at(point.low).toFixed(1)}`).reverse();
  return `M${[...there, ...back].join("L")}Z`;
}

class Chart {
  constructor(spec, curves, stride, charts) {
    this.spec = spec;
    this.charts = charts;
    this.stride = stride;
    this.series = spec.series.map((series) => ({ ...series, points: pointsOf(curves[series.name]), missing: curves[series.name].missing || 0 }));
    if (spec.kind === "stack") this.stack();
    this.plot = element("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": this.description() });
    this.values = this.series.map(() => element("span", { class: "figure" }));
    const missing = this.series.reduce((sum, series) => sum + series.missing, 0);
    this.card = element(
      "figure", { class: "chart" },
      element("figcaption", {}, element("h4", {}, ...shown(spec.title)), spec.unit ? element("span", { class: "unit" }, spec.unit) : ""),
      this.plot,
      element("ul", { class: "legend" }, ...this.series.map((series, i) => this.legend(series, i))),
      missing ? element("p", { class: "warning" }, `! ${missing} ${missing === 1 ? "value was" : "values were"} no finite number`) : "",
    );
    this.listen();
  }

  // Values become [from, to] above one another. A phase that not every step of a bucket has counts for its share of them.
  stack() {
    const places = new Map();
    for (const series of this.series) {
      for (const point of series.points) {
        const place = Math.floor(point.first / this.stride);
        const bucket = places.get(place) || { steps: 0, height: 0 };
        places.set(place, { ...bucket, steps: Math.max(bucket.steps, point.count) });
      }
    }
    for (const series of this.series) {
      for (const point of series.points) {
        const bucket = places.get(Math.floor(point.first / this.stride));
        point.x = (Math.floor(point.first / this.stride) + 0.5) * this.stride - 0.5;
        point.y *= point.count / bucket.steps;
        point.low = bucket.height;
        bucket.height += point.y;
        point.high = bucket.height;
      }
    }
  }

  description() {
    const parts = this.series.map((series) => {
      const values = series.points.map((point) => point.y);
      const [first, last] = [series.points[0], series.points.at(-1)];
      return `${series.label || this.spec.title} from ${figure(first.y)} at step ${first.first} to ${figure(last.y)} at step ${last.last}, between ${figure(Math.min(...values))} and ${figure(Math.max(...values))}`;
    });
    return `${this.spec.title}${this.spec.unit ? `, ${this.spec.unit}` : ""}: ${parts.join("; ")}. Arrow keys read single steps.`;
  }

  legend(series, i) {
    const key = drawing("svg", { class: `key s${i}`, width: 22, height: 10, "aria-hidden": "true" });
    key.append(this.spec.kind === "stack" ? drawing("rect", { class: "fill", width: 12, height: 10, x: 5 }) : drawing("path", { class: "line", d: "M1 5H21" }));
    return element("li", {}, key, element("span", { class: "label" }, ...shown(series.label || series.name)), this.values[i]);
  }

  draw(width, domain, decay) {
    const inside = this.series.map((series) => series.points.filter((point) => point.last >= domain[0] && point.first <= domain[1]));
    const points = inside.flat();
    const isStack = this.spec.kind === "stack";
    const [low, high] = points.length ? rangeOf(isStack ? 0 : Math.min(...points.map((p) => p.low)), Math.max(...points.map((p) => p.high))) : [0, 1];
    const edge = isStack ? this.stride / 2 : 0;
    this.x = new Axis(domain[0] - edge, domain[1] + edge, MARGIN.left, width - MARGIN.right);
    this.y = new Axis(low, high, HEIGHT - MARGIN.bottom, MARGIN.top);
    const svg = drawing("svg", { width, height: HEIGHT, "aria-hidden": "true" });
    this.axes(svg, width, points.length && points.every((point) => point.low === 0 && point.high === 0));
    inside.forEach((own, i) => own.length && svg.append(isStack ? this.bars(own, i) : this.curve(own, i, decay)));
    this.cursor = drawing("g", { class: "cursor" });
    svg.append(this.cursor);
    this.plot.replaceChildren(svg);
  }

  axes(svg, width, isZero) {
    for (const value of isZero ? [0] : ticks(this.y.low, this.y.high, 4)) {
      const y = this.y.at(value);
      svg.append(drawing("path", { class: "grid", d: `M${MARGIN.left} ${y}H${width - MARGIN.right}` }));
      svg.append(drawing("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, figure(value)));
    }
    const [low, high] = [Math.ceil(this.x.low), Math.floor(this.x.high)];
    for (const step of low === high ? [low] : ticks(low, high, Math.max(2, width / 90)).filter(Number.isInteger)) {
      const x = this.x.at(step);
      svg.append(drawing("path", { class: "tick", d: `M${x} ${HEIGHT - MARGIN.bottom}v4` }));
      svg.append(drawing("text", { x, y: HEIGHT - 6, "text-anchor": x > width - 30 ? "end" : "middle" }, figure(step)));
    }
    svg.append(drawing("path", { class: "axis", d: `M${MARGIN.left} ${HEIGHT - MARGIN.bottom}H${width - MARGIN.right}` }));
    if (isZero) svg.append(drawing("text", { class: "verdict", x: (MARGIN.left + width) / 2, y: HEIGHT / 2, "text-anchor": "middle" }, this.spec.zero));
  }

  curve(points, i, decay) {
    const group = drawing("g", { class: `s${i}` });
    const isSmoothed = decay > 0 && points.length >= SMOOTHED;
    if (points.some((point) => point.low !== point.high)) group.append(drawing("path", { class: "band", d: band(points, this.x, this.y) }));
    group.append(drawing("path", { class: isSmoothed ? "line raw" : "line", "data-name": this.series[i].name, d: line(points, this.x, this.y) }));
    if (isSmoothed) group.append(drawing("path", { class: "line", d: line(smoothed(points, decay), this.x, this.y) }));
    if (points.length <= MARKED) {
      for (const point of points) group.append(drawing("circle", { class: isSmoothed ? "dot raw" : "dot", cx: this.x.at(point.x), cy: this.y.at(point.y), r: 2.2 }));
    }
    return group;
  }

  bars(points, i) {
    const width = (this.x.at(this.stride) - this.x.at(0)) * 0.9;
    const d = points.map((point) => {
      const [top, bottom] = [this.y.at(point.high), this.y.at(point.low)];
      return `M${(this.x.at(point.x) - width / 2).toFixed(1)} ${bottom.toFixed(1)}V${top.toFixed(1)}h${width.toFixed(1)}V${bottom.toFixed(1)}Z`;
    });
    return drawing("g", { class: `s${i}` }, drawing("path", { class: width < 5 ? "fill narrow" : "fill", "data-name": this.series[i].name, d: d.join("") }));
  }

  // Shows what the curves were at that step, or were last before it; without a step, what they are at the end.
  read(step) {
    this.cursor.replaceChildren();
    if (step !== null) {
      const x = this.x.at(step).toFixed(1);
      this.cursor.append(drawing("path", { d: `M${x} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}` }));
    }
    return this.series.map((series, i) => {
      const point = step === null ? series.points.at(-1) : series.points.findLast((candidate) => candidate.first <= step);
      this.values[i].textContent = point ? this.reading(point, step) : "–";
      if (point && step !== null && this.spec.kind !== "stack") this.cursor.append(drawing("circle", { class: `s${i}`, cx: this.x.at(point.x), cy: this.y.at(point.y), r: 4 }));
      return `${series.label || this.spec.title} ${this.values[i].textContent}`;
    });
  }

  // What a screen reader says of the cursor, which is a slider to it.
  say(step, text, [low, high]) {
    const values = { "aria-valuemin": low, "aria-valuemax": high, "aria-valuenow": step, "aria-valuetext": text };
    for (const [name, value] of Object.entries(values)) this.plot.setAttribute(name, value);
  }

  reading(point, step) {
    const isSpread = point.count > 1 && this.spec.kind !== "stack" && point.low !== point.high;
    const range = isSpread ? ` (${figure(point.low)} to ${figure(point.high)})` : "";
    const isEarlier = step !== null && point.last < step;
    return `${figure(point.y)}${range}${isEarlier ? ` at step ${point.last}` : ""}`;
  }

  stepAt(event) {
    const step = Math.round(this.x.value(event.clientX - this.plot.getBoundingClientRect().left));
    return Math.min(this.charts.domain[1], Math.max(this.charts.domain[0], step));
  }

  listen() {
    this.plot.addEventListener("pointermove", (event) => this.charts.setCursor(this.stepAt(event)));
    this.plot.addEventListener("pointerleave", () => this.charts.setCursor(null));
    this.plot.addEventListener("pointerdown", (event) => { this.dragged = event.pointerType === "mouse" ? this.stepAt(event) : null; });
    this.plot.addEventListener("pointerup", (event) => {
      const [from, to] = [this.dragged, this.stepAt(event)];
      if (from !== null && from !== undefined && Math.abs(this.x.at(to) - this.x.at(from)) > 12) this.charts.zoom(Math.min(from, to), Math.max(from, to));
      this.dragged = null;
    });
    this.plot.addEventListener("dblclick", () => this.charts.zoom(...this.charts.whole));
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.plot.addEventListener("blur", () => this.charts.setCursor(null));
  }

  onKey(event) {
    const [low, high] = this.charts.domain;
    const now = this.charts.cursor ?? high;
    const step = { ArrowLeft: now - this.stride, ArrowRight: now + this.stride, Home: low, End: high }[event.key];
    if (event.key === "Escape") this.charts.setCursor(null);
    if (step === undefined) return;
    event.preventDefault();
    this.charts.setCursor(Math.min(high, Math.max(low, step)));
  }
}

class Charts {
  constructor(data, container) {
    const steps = Object.values(data.curves).flatMap((curve) => [curve.first[0], (curve.last || curve.first).at(-1)]).filter((step) => step !== undefined);
    this.whole = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 0];
    this.domain = this.whole;
    this.cursor = null;
    this.stride = data.stride;
    this.list = [];
    for (const group of data.charts) {
      const charts = group.charts.map((spec) => new Chart(spec, data.curves, data.stride, this));
      this.list.push(...charts);
      const grid = element("div", { class: "grid-of-charts" }, ...charts.map((chart) => chart.card));
      container.append(element("section", { class: "group" }, element("h3", {}, group.title), grid));
    }
    if (!this.list.length) container.append(element("p", { class: "hint" }, "No step has been measured yet."));
    for (const id of ["from-step", "to-step"]) byId(id).addEventListener("change", () => this.zoom(Number(byId("from-step").value), Number(byId("to-step").value)));
    byId("all-steps").addEventListener("click", () => this.zoom(...this.whole));
    byId("smoothing").addEventListener("input", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(container);
    this.zoom(...this.whole);
  }

  zoom(from, to) {
    const [low, high] = this.whole;
    this.domain = [Math.max(low, Math.min(from, high)), Math.min(high, Math.max(to, low))];
    if (this.domain[0] >= this.domain[1]) this.domain = this.whole;
    [byId("from-step").value, byId("to-step").value] = this.domain;
    this.draw();
  }

  draw() {
    const decay = Number(byId("smoothing").value);
    const widths = this.list.map((chart) => Math.max(200, chart.plot.clientWidth)); // read all, then write
    this.list.forEach((chart, i) => chart.draw(widths[i], this.domain, decay));
    this.setCursor(this.cursor);
  }

  // The step, or those that the points there sum up.
  stepsAt(step) {
    const first = step - (step % this.stride);
    const last = Math.min(first + this.stride - 1, this.whole[1]);
    return first < last ? `Steps ${first.toLocaleString("en")}–${last.toLocaleString("en")}` : `Step ${step.toLocaleString("en")}`;
  }

  setCursor(step) {
    this.cursor = step;
    for (const chart of this.list) {
      const texts = chart.read(step);
      chart.say(step ?? this.domain[1], `${this.stepsAt(step ?? this.domain[1])}: ${texts.join(", ")}`, this.domain);
    }
    byId("cursor").textContent = step === null ? "" : this.stepsAt(step);
  }
}
