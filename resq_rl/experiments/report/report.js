"use strict";
// Charts and the player of the report. The numbers come from the element #data; nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "clipPath"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Marks ---------------------------------------------------------------------------------------------------------------

const OPEN_MARKS = new Set(["x"]);

function markPath(kind, x, y, r) {
  const polygon = (count, turn, inner = 1) => {
    const corners = [];
    for (let i = 0; i < count; i++) {
      const angle = turn + (2 * Math.PI * i) / count - Math.PI / 2;
      const radius = inner < 1 && i % 2 ? r * inner : r;
      corners.push(`${(x + radius * Math.cos(angle)).toFixed(2)},${(y + radius * Math.sin(angle)).toFixed(2)}`);
    }
    return `M${corners.join("L")}Z`;
  };
  switch (kind) {
    case "s": return polygon(4, Math.PI / 4);
    case "^": return polygon(3, 0);
    case "v": return polygon(3, Math.PI);
    case "D": return polygon(4, 0);
    case "h": return polygon(6, 0);
    case "*": r *= 1.35; return polygon(10, 0, 0.42);
    case "P": {
      const a = r, b = r * 0.4;
      return `M${x - b},${y - a}h${2 * b}v${a - b}h${a - b}v${2 * b}h${b - a}v${a - b}h${-2 * b}v${b - a}h${b - a}v${-2 * b}h${a - b}Z`;
    }
    case "x": return `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`;
    default: return polygon(24, 0);
  }
}

function drawMark(kind, color, x, y, r, parent) {
  const style = OPEN_MARKS.has(kind) ? `fill:none;stroke:${color};stroke-width:2` : `fill:${color}`;
  return make("path", { d: markPath(kind, x, y, r), class: OPEN_MARKS.has(kind) ? "" : "mark", style }, parent);
}

// Charts --------------------------------------------------------------------------------------------------------------

const MARGIN = { left: 52, right: 14, top: 10, bottom: 44 };

function shortNumber(value) {
  if (value !== 0 && (Math.abs(value) >= 10000 || Math.abs(value) < 0.001)) {
    return value >= 1000 && value % 1000 === 0 ? `${value / 1000}k` : value.toExponential(0);
  }
  return String(+value.toPrecision(4));
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high, count) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) all.push(tick);
    }
  }
  const decades = all.filter((tick) => Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-9);
  return all.length > count && decades.length > 2 ? decades : all;
}

class Chart {
  static count = 0;

  // spec: {label, x, y: {label, log, from}, series: [{title, color, marker, points, line, thin}], rule: {y, label}}
  constructor(host, spec, { height = 260, cursor = false } = {}) {
    Object.assign(this, { host, spec, height, cursor, at: null, index: -1, all: false });
    this.hidden = new Set();
    this.id = `plot-${Chart.count++}`;
    this.keys = make("div", { class: "keys", role: "group", "aria-label": "Show or hide" }, host);
    this.canvas = make("div", {}, host);
    this.tip = make("div", { class: "tip", hidden: "" }, host);
    this.said = make("p", { class: "unseen", "aria-live": "polite" }, host);
    this.drawKeys();
    new ResizeObserver(() => this.draw()).observe(host);
  }

  drawKeys() {
    const { series, y } = this.spec;
    if (series.length < 2 && y.from == null) { this.keys.remove(); return; }
    for (const one of series) {
      const button = make("button", { type: "button", "aria-pressed": "true" }, this.keys);
      const icon = make("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, button);
      if (one.marker) drawMark(one.marker, one.color, 7, 7, 5, icon);
      else make("line", { x1: 0, x2: 14, y1: 7, y2: 7, style: lineStyle(one) }, icon);
      make("span", {}, button, one.title);
      button.addEventListener("click", () => {
        const gone = !this.hidden.delete(one);
        if (gone) this.hidden.add(one);
        button.setAttribute("aria-pressed", String(!gone));
        this.pick(-1);
        this.draw();
      });
    }
    if (y.from == null) return;
    const whole = make("button", { type: "button", "aria-pressed": "false", class: "whole" }, this.keys, "all accuracies");
    whole.style.textDecoration = "none";
    whole.addEventListener("click", () => {
      this.all = !this.all;
      whole.setAttribute("aria-pressed", String(this.all));
      this.pick(-1);
      this.draw();
    });
  }

  shown() { return this.spec.series.filter((one) => !this.hidden.has(one)); }

  bounds() {
    const xs = [], ys = [], from = this.all ? null : this.spec.y.from;
    const add = (x, y) => { if (from == null || y >= from) { xs.push(x); ys.push(y); } };
    for (const one of this.shown()) {
      for (const p of one.points) {
        add(p.x, p.y);
        if (from != null && p.y < from) continue;
        if (p.xi) xs.push(...p.xi.filter((v) => v > 0));
        if (p.yi) ys.push(from == null ? p.yi[0] : Math.max(p.yi[0], from), p.yi[1]);
      }
      for (const [x, y] of one.line) add(x, y);
    }
    if (this.spec.rule) ys.push(this.spec.rule.y);
    if (!xs.length) return [[0.1, 1], [0, 1]];
    return [extent(xs, this.spec.x.log), extent(ys, this.spec.y.log)];
  }

  draw() {
    const width = Math.max(240, this.host.clientWidth);
    if (!this.host.clientWidth) return;
    const [xb, yb] = this.bounds();
    const x = scale(xb, MARGIN.left, width - MARGIN.right, this.spec.x.log);
    const y = scale(yb, this.height - MARGIN.bottom, MARGIN.top, this.spec.y.log);
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${this.height}`, height: this.height, role: "group", tabindex: "0",
      "aria-label": `Chart: ${this.spec.label}. Arrow keys move between points.`,
    });
    this.drawAxes(svg, x, y, xb, yb, width);
    const inside = make("clipPath", { id: this.id }, svg);
    const size = { width: width - MARGIN.left, height: this.height - MARGIN.bottom + 1 };
    make("rect", { x: MARGIN.left, y: 0, ...size }, inside);
    const box = make("g", { "clip-path": `url(#${this.id})` }, svg);
    this.places = [];
    for (const one of this.shown()) this.drawSeries(one, box, x, y, yb);
    this.ring = make("circle", { class: "ring", r: 10, style: "display: none" }, svg);
    if (this.cursor) this.cursorLine = make("line", { class: "cursor", y1: MARGIN.top, y2: this.height - MARGIN.bottom }, svg);
    this.listen(svg);
    this.scaleX = x;
    this.canvas.replaceChildren(svg);
    if (this.at !== null) this.moveTo(this.at);
  }

  drawAxes(svg, x, y, xb, yb, width) {
    const bottom = this.height - MARGIN.bottom;
    const xTicks = this.spec.x.log ? logTicks(...xb, width / 60) : linearTicks(...xb, Math.max(2, width / 110));
    for (const tick of xTicks) {
      make("line", { class: "grid", x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: bottom }, svg);
      make("text", { class: "axis", x: x(tick), y: bottom + 16, "text-anchor": "middle" }, svg, shortNumber(tick));
    }
    const yTicks = this.spec.y.log ? logTicks(...yb, this.height / 28) : linearTicks(...yb, this.height / 50);
    for (const tick of yTicks) {
      make("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }, svg);
      make("text", { class: "axis", x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg, shortNumber(tick));
    }
    make("text", { x: (MARGIN.left + width) / 2, y: this.height - 6, "text-anchor": "middle" }, svg, this.spec.x.label);
    const middle = (MARGIN.top + bottom) / 2;
    make("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, svg, this.spec.y.label);
    if (this.spec.rule) {
      const at = y(this.spec.rule.y);
      make("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }, svg);
      make("text", { class: "axis", x: MARGIN.left + 6, y: at - 4 }, svg, this.spec.rule.label);
    }
  }

  drawSeries(one, box, x, y, yb) {
    if (one.line.length) {
      const d = one.line.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
      make("path", { d, fill: "none", style: lineStyle(one) }, box);
      if (!one.points.length) {
        for (const [a, b] of one.line) this.places.push({ x: x(a), y: y(b), one, text: [`${shortNumber(a)}: ${b.toPrecision(3)}`] });
      }
    }
    for (const p of one.points) {
      if (p.y < yb[0]) continue;
      const style = `stroke: ${one.color}`;
      if (p.xi) make("line", { class: "error", x1: x(Math.max(p.xi[0], 1e-9)), x2: x(p.xi[1]), y1: y(p.y), y2: y(p.y), style }, box);
      if (p.yi) make("line", { class: "error", x1: x(p.x), x2: x(p.x), y1: y(p.yi[0]), y2: y(p.yi[1]), style }, box);
    }
    for (const p of one.points) {
      if (p.y < yb[0]) continue;
      drawMark(one.marker, one.color, x(p.x), y(p.y), 5, box);
      this.places.push({ x: x(p.x), y: y(p.y), one, text: p.text });
    }
  }

  listen(svg) {
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      const left = event.clientX - box.left, top = event.clientY - box.top;
      let best = -1, least = 40 ** 2;
      this.places.forEach((place, i) => {
        const away = (place.x - left) ** 2 + (place.y - top) ** 2;
        if (away < least) [best, least] = [i, away];
      });
      this.pick(best);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", () => this.pick(-1));
    svg.addEventListener("blur", () => this.pick(-1));
    svg.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const count = this.places.length;
    if (!count) return;
    const series = this.shown().filter((one) => this.places.some((place) => place.one === one));
    const now = this.places[this.index];
    const jump = (step) => {
      const own = now ? series.indexOf(now.one) : -1;
      const next = series[(own + step + series.length) % series.length];
      this.pick(this.places.findIndex((place) => place.one === next), true);
    };
    switch (event.key) {
      case "ArrowRight": this.pick((this.index + 1) % count, true); break;
      case "ArrowLeft": this.pick((this.index + count - (now ? 1 : 0)) % count, true); break;
      case "ArrowDown": jump(1); break;
      case "ArrowUp": jump(-1); break;
      case "Home": this.pick(0, true); break;
      case "End": this.pick(count - 1, true); break;
      case "Escape": this.pick(-1); return;
      default: return;
    }
    event.preventDefault();
  }

  pick(index, say = false) {
    this.index = index;
    const place = this.places && this.places[index];
    this.tip.hidden = !place;
    if (this.ring) this.ring.style.display = place ? "" : "none";
    if (!place) return;
    this.ring.setAttribute("cx", place.x);
    this.ring.setAttribute("cy", place.y);
    this.tip.replaceChildren();
    make("strong", {}, this.tip, place.one.title);
    for (const line of place.text) make("div", {}, this.tip, line);
    const width = this.host.clientWidth, top = this.canvas.offsetTop;
    const left = place.x + 14 + this.tip.offsetWidth < width ? place.x + 14 : place.x - 14 - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(left, width - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${top + Math.max(0, place.y - this.tip.offsetHeight - 8)}px`;
    if (say) this.said.textContent = `${place.one.title}: ${place.text.join("; ")}`;
  }

  moveTo(value) {
    this.at = value;
    if (!this.cursorLine) return;
    this.cursorLine.setAttribute("x1", this.scaleX(value));
    this.cursorLine.setAttribute("x2", this.scaleX(value));
  }
}

function lineStyle(one) {
  return `stroke: ${one.color}; stroke-width: ${one.thin ? 1.4 : 2}; opacity: ${one.thin ? 0.8 : 0.9}${one.thin ? "; stroke-dasharray: 4 2" : ""}`;
}

function extent(values, log) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (log) return [low / 1.12, Math.max(high * 1.12, low * 1.3)];
  const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function scale([low, high], start, end, log) {
  const f = log ? Math.log : (value) => value;
  return (value) => start + ((end - start) * (f(value) - f(low))) / (f(high) - f(low));
}

// Player --------------------------------------------------------------------------------------------------------------

function bitColor(stops, share) {
  const place = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(place)), part = place - i;
  const rgb = [1, 3, 5].map((k) => {
    const [a, b] = [stops[i], stops[i + 1]].map((stop) => parseInt(stop.slice(k, k + 2), 16));
    return Math.round(a + (b - a) * part);
  });
  return `rgb(${rgb.join(",")})`;
}

class Player {
  constructor(film) {
    this.film = film;
    this.find = (id) => document.getElementById(id);
    this.slider = this.find("frame");
    this.playing = false;
    this.time = 0;
    film.clips.forEach((clip, i) => make("option", { value: i }, this.find("clip"), clip.name));
    this.find("clip-label").hidden = film.clips.length < 2;
    this.find("gradient").style.background = `linear-gradient(to right, ${film.scale.join(", ")})`;
    this.find("top").textContent = (film.top / 1000).toFixed(3);
    this.find("play").addEventListener("click", () => this.toggle());
    this.slider.addEventListener("input", () => { this.stop(); this.show(Number(this.slider.value)); });
    this.find("clip").addEventListener("change", (event) => this.load(Number(event.target.value)));
    this.load(0);
  }

  async load(index) {
    this.stop();
    const clip = this.clip = this.film.clips[index];
    this.frames = clip.methods[0].bops.length;
    const picture = (source) => { const image = new Image(); image.src = source; return image; };
    this.sheets = [picture(clip.sheet), ...clip.methods.map((method) => picture(method.sheet))];
    this.slider.max = this.frames - 1;
    this.drawCosts();
    await Promise.all(this.sheets.map((image) => image.decode()));
    if (this.clip === clip) this.show(0);
  }

  drawCosts() {
    const host = document.querySelector("[data-chart=running]");
    host.replaceChildren();
    const colors = [...document.querySelectorAll("#player figure.prediction .key")].map((key) => key.style.background);
    const series = this.clip.methods.flatMap((method, i) => {
      const line = (values) => values.map((value, t) => [t, value]);
      const name = this.film.names[i];
      return [
        { title: `${name}: mean so far`, color: colors[i], points: [], line: line(method.running) },
        { title: `${name}: each frame`, color: colors[i], points: [], line: line(method.bops), thin: true },
      ];
    });
    const label = "BOPs by frame, and their running mean";
    this.chart = new Chart(host, {
      label, x: { label: "frame" }, y: { label: "BOPs, share of W8A8", log: true }, series,
    }, { height: 240, cursor: true });
  }

  show(time) {
    this.time = time;
    const { cell: [width, height], columns } = this.film;
    const at = [(time % columns) * width, Math.floor(time / columns) * height];
    const names = ["screen-clip", "screen-prediction-0", "screen-prediction-1"];
    this.sheets.forEach((sheet, i) => {
      const canvas = this.find(names[i]);
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
      canvas.getContext("2d").drawImage(sheet, at[0], at[1], width, height, 0, 0, width, height);
    });
    const said = this.clip.methods.map((method, i) => this.showBits(method, i, time));
    this.slider.value = time;
    const short = `frame ${time} of ${this.frames - 1}`;
    this.slider.setAttribute("aria-valuetext", `${short}; ${said.join("; ")}`);
    const cut = this.frames < this.clip.all ? ` (the first ${this.frames} of ${this.clip.all} frames)` : "";
    const now = this.find("now");
    now.setAttribute("aria-live", this.playing ? "off" : "polite");
    now.textContent = `${short}${cut}`;
    this.chart.moveTo(time);
  }

  showBits(method, i, time) {
    const { cell: [width, height], top, names, scale } = this.film;
    const canvas = this.find(`screen-bits-${i}`), rows = method.share[time];
    if (canvas.width !== 2 * width || canvas.height !== 2 * height) [canvas.width, canvas.height] = [2 * width, 2 * height];
    const context = canvas.getContext("2d");
    rows.forEach((row, r) => row.forEach((share, c) => {
      const [left, right] = [c, c + 1].map((k) => Math.round((k * canvas.width) / row.length));
      const [above, below] = [r, r + 1].map((k) => Math.round((k * canvas.height) / rows.length));
      context.fillStyle = bitColor(scale, share / top);
      context.fillRect(left, above, right - left, below - above);
    }));
    const kind = method.keyframe[time] ? ", keyframe" : "";
    const text = `${method.bops[time].toFixed(3)} now${kind}, ${method.running[time].toFixed(3)} mean`;
    this.find(`spent-${i}`).textContent = text;
    return `${names[i]} ${text}`;
  }

  toggle() { if (this.playing) this.stop(); else this.play(); }

  play() {
    this.playing = true;
    this.label();
    if (this.time >= this.frames - 1) this.show(0);
    let due = performance.now();
    const step = (now) => {
      if (!this.playing) return;
      const wait = 1000 / (this.clip.fps * Number(this.find("speed").value));
      if (now - due > 500) due = now;  // the tab slept
      if (now - due >= wait) {
        due += wait;
        this.show(this.time + 1);
        if (this.time >= this.frames - 1) { this.stop(); return; }
      }
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  stop() { this.playing = false; this.label(); }

  label() {
    const button = this.find("play");
    button.textContent = this.playing ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(this.playing));
  }
}

// Page ----------------------------------------------------------------------------------------------------------------

for (const host of document.querySelectorAll("[data-chart=fronts]")) new Chart(host, data.fronts, { height: 440 });
for (const host of document.querySelectorAll("[data-chart=curves]")) {
  new Chart(host, data.curves[Number(host.dataset.index)], { height: 220 });
}
if (data.film) window.player = new Player(data.film);
document.getElementById("copy").addEventListener("click", async (event) => {
  const command = document.getElementById("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    event.target.textContent = "Copied";
  } catch {  // some browsers keep pages from disk away from the clipboard
    getSelection().selectAllChildren(command);
    event.target.textContent = "Selected: press Ctrl+C";
  }
});
