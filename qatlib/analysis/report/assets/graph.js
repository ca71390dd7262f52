/** Moving about in a graph: what it shows is the viewBox of its SVG, in units of one CSS pixel at scale 1. */
class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.svg = canvas.querySelector("svg");
    this.whole = this.svg.viewBox.baseVal;
    this.whole = { x: this.whole.x, y: this.whole.y, w: this.whole.width, h: this.whole.height };
    canvas.classList.add("live");
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focusin", (event) => this.uncover(event.target.closest("a")));
    canvas.addEventListener("dragstart", (event) => event.preventDefault());
    this.drag();
    this.map();
  }

  get size() { return { w: this.canvas.clientWidth || 1, h: this.canvas.clientHeight || 1 }; }
  get fit() { return Math.min(1.25, this.size.w / this.whole.w, this.size.h / this.whole.h); }

  /** Show the point (x, y) at the middle; ``scale`` is in pixels per unit. */
  set(x, y, scale) {
    this.scale = Math.max(Math.min(this.fit, 0.5), Math.min(4, scale));
    const w = this.size.w / this.scale, h = this.size.h / this.scale, all = this.whole;
    const kept = (at, from, length, seen) => (seen >= length ? from + length / 2 : Math.max(from + seen / 2, Math.min(from + length - seen / 2, at)));
    this.x = kept(x, all.x, all.w, w);
    this.y = kept(y, all.y, all.h, h);
    this.svg.setAttribute("viewBox", [this.x - w / 2, this.y - h / 2, w, h].map((v) => v.toFixed(1)).join(" "));
    this.strip.style.display = this.whole.h > 2 * h ? "" : "none";
    Object.entries({ x: this.x - w / 2, y: this.y - h / 2, width: w, height: h }).forEach(([name, v]) => this.seen.setAttribute(name, v));
  }

  /** Beside a deep network a strip of all of it, in which a click goes there. */
  map() {
    const make = (tag, parent) => parent.appendChild(document.createElementNS(this.svg.namespaceURI, tag));
    const strip = make("svg", this.canvas);
    strip.setAttribute("class", "map");
    strip.setAttribute("aria-hidden", "true");
    strip.setAttribute("preserveAspectRatio", "none");
    strip.setAttribute("viewBox", Object.values(this.whole).join(" "));
    this.svg.querySelectorAll("a").forEach(function (node) {
      const place = make("g", strip);
      Object.entries(node.dataset).forEach(([name, value]) => { place.dataset[name] = value; });
      place.appendChild(node.querySelector("rect:last-of-type").cloneNode());
    });
    this.seen = make("rect", strip);
    this.seen.setAttribute("class", "seen");
    this.strip = strip;
    const go = (event) => {
      event.stopPropagation();
      if (event.buttons) this.set(this.x, this.whole.y + this.whole.h * event.offsetY / this.size.h, this.scale);
    };
    strip.addEventListener("pointerdown", go);
    strip.addEventListener("pointermove", go);
  }

  colour(mode) { [this.svg, this.strip].forEach((svg) => { svg.dataset.colour = mode; }); }

  /** A small network as a whole; the beginning of a deep one, large enough to read. */
  start() {
    const readable = Math.max(0.7, Math.min(0.9, this.size.w / this.whole.w));
    if (this.fit >= 0.7) this.all();
    else this.set(this.whole.x + this.whole.w / 2, -Infinity, readable);
  }

  all() { this.set(this.whole.x + this.whole.w / 2, this.whole.y + this.whole.h / 2, this.fit); }
  move(x, y) { this.set(this.x + x / this.scale, this.y + y / this.scale, this.scale); }

  /** Zoom about a point of the canvas, in pixels from its middle. */
  zoom(factor, x = 0, y = 0) {
    const before = this.scale, px = this.x + x / before, py = this.y + y / before;
    const after = Math.max(Math.min(this.fit, 0.5), Math.min(4, before * factor));
    this.set(px - x / after, py - y / after, after);
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey && !this.canvas.contains(document.activeElement)) return;
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 80;
    const actions = {
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8), 0: () => this.all(), w: () => this.worst(),
      ArrowLeft: () => this.move(-step, 0), ArrowRight: () => this.move(step, 0),
      ArrowUp: () => this.move(0, -step), ArrowDown: () => this.move(0, step),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  drag() {
    let from = null, moved = false;
    this.canvas.addEventListener("pointerdown", (event) => {
      const held = event.pointerType !== "touch" || this.canvas.contains(document.activeElement);
      from = event.button === 0 && held ? { x: event.clientX, y: event.clientY } : null;
      moved = false;
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!from || !event.buttons) return;
      if (!moved && Math.hypot(event.clientX - from.x, event.clientY - from.y) < 4) return;
      if (!moved) this.canvas.setPointerCapture(event.pointerId);
      moved = true;
      this.move(from.x - event.clientX, from.y - event.clientY);
      from = { x: event.clientX, y: event.clientY };
    });
    this.canvas.addEventListener("pointerup", () => { from = null; });
    this.canvas.addEventListener("click", (event) => {
      if (moved && event.detail) { event.preventDefault(); event.stopPropagation(); }  // 0 is the Enter key
      moved = false;
    }, true);
  }

  /** Bring a node into the picture, where it is not. */
  uncover(node) {
    if (!node) return;
    const box = node.getBBox(), w = this.size.w / this.scale, h = this.size.h / this.scale;
    const seen = box.x >= this.x - w / 2 && box.x + box.width <= this.x + w / 2 && box.y >= this.y - h / 2 && box.y + box.height <= this.y + h / 2;
    if (!seen) this.set(box.x + box.width / 2, box.y + box.height / 2, Math.max(this.scale, 0.7));
  }

  node(name) {
    return Array.from(this.svg.querySelectorAll("a"))
      .find((node) => node.dataset.op === name || (node.dataset.steps || "").split(" ").includes(name));
  }

  mark(name) {
    this.svg.querySelectorAll(".current").forEach((item) => item.classList.remove("current"));
    const node = name && this.node(name);
    if (!node) return;
    node.classList.add("current");
    this.svg.querySelectorAll("path").forEach((line) => line.classList.toggle("current", line.dataset.from === node.dataset.op));
    this.uncover(node);
  }

  /** Focus the op with the largest error, then the next. */
  worst() {
    const mode = this.svg.dataset.colour;
    const error = function (node) {
      const words = node.querySelector(`tspan.${mode}`).textContent;
      return words.includes("−∞") ? -Infinity : parseFloat(words.replace(" · ", ""));
    };
    const ranked = Array.from(this.svg.querySelectorAll("a")).filter((node) => !Number.isNaN(error(node))).sort((a, b) => error(a) - error(b));
    if (!ranked.length) return;
    const next = ranked[(ranked.indexOf(this.shown) + 1) % ranked.length];
    this.shown = next;
    next.focus({ preventScroll: true });
    const box = next.getBBox();
    this.set(box.x + box.width / 2, box.y + box.height / 2, Math.max(this.scale, 0.9));
  }
}

const views = Array.from(document.querySelectorAll(".canvas")).map((canvas) => new View(canvas));
let view = views[0], current = "";
if (view) {
  document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
  views.forEach((one) => one.colour(one.svg.dataset.colour));
  view.start();
  document.querySelectorAll("[data-zoom]").forEach(function (button) {
    const actions = { in: () => view.zoom(1.25), out: () => view.zoom(0.8), all: () => view.all(), worst: () => view.worst() };
    button.addEventListener("click", actions[button.dataset.zoom]);
  });
  document.querySelectorAll("input[name=colour]").forEach(function (input) {
    const colour = () => { if (input.checked) views.forEach((one) => one.colour(input.value)); };
    input.addEventListener("change", colour);
    colour();
  });
  const unfold = document.getElementById("unfold");
  const swap = function () {
    view = views[unfold.checked ? 1 : 0];
    views.forEach((one) => { one.canvas.hidden = one !== view; });
    view.start();
    view.mark(current);
  };
  if (unfold) {
    unfold.addEventListener("change", swap);
    if (unfold.checked) swap();
  }
  document.addEventListener("op", function (event) {
    current = event.detail;
    views.forEach((one) => one.mark(""));
    view.mark(current);
  });
  const resized = () => { if (!matchMedia("print").matches) view.set(view.x, view.y, view.scale); };
  new ResizeObserver(resized).observe(views[0].canvas.parentElement);
  window.addEventListener("beforeprint", () => views.forEach((one) => one.svg.setAttribute("viewBox", Object.values(one.whole).join(" "))));
  window.addEventListener("afterprint", resized);
}
