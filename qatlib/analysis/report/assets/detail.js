/** The panel of one op. Its name stands in the address, so that a link opens it and "back" closes it. */
const DATA = JSON.parse(document.getElementById("ops").textContent);
const panel = document.getElementById("detail");
const TITLE = document.title;
let logarithmic = false, redraws = [], opener = null;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  Object.entries(attributes || {}).forEach(([name, value]) => element.setAttribute(name, value));
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const address = (name) => `#op=${encodeURIComponent(name)}`;
const linkTo = (name) => make("a", { href: address(name) }, DATA.ops[name].title);

/** Words and links to ops; null without any. Of many the first, the others behind a click. */
function listing(words, names) {
  const known = names.map((name) => (Object.hasOwn(DATA.ops, name) ? linkTo(name) : `input ${name}`));
  if (!known.length) return null;
  const row = (items) => items.flatMap((item, i) => (i ? [", ", item] : [item]));
  const more = known.slice(8);
  const rest = more.length ? make("details", {}, make("summary", {}, `${more.length} more`), ...row(more)) : null;
  return make("p", { class: "links" }, make("b", {}, `${words} `), ...row(known.slice(0, 8)), rest);
}

function grid(head, rows) {
  const cells = (row, tag) => row.map((text, i) => make(i ? tag : "th", i ? { class: "n" } : { scope: "row" }, text));
  return make("div", { class: "scroll" }, make("table", { class: "facts" },
    make("thead", {}, make("tr", {}, make("td", {}), ...head.map((text) => make("th", { class: "n", scope: "col" }, text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td"))))));
}

function drawn(seen, names) {
  const place = make("div", {});
  const draw = () => place.replaceChildren(histogram(seen, names, logarithmic));
  const box = make("input", { type: "checkbox", class: "log" });
  box.checked = logarithmic;
  box.addEventListener("change", function () {
    logarithmic = box.checked;
    panel.querySelectorAll("input.log").forEach((other) => { other.checked = logarithmic; });
    redraws.forEach((redraw) => redraw());
  });
  redraws.push(draw);
  draw();
  const cut = seen.cut ? `${seen.cut} of the ${names[0]} values lie beyond and are cut off.` : `No ${names[0]} value lies beyond.`;
  return make("div", {},
    make("p", { class: "legend" }, make("span", { class: "first" }, names[0]), " ", make("span", { class: "second" }, names[1]), " ",
      make("span", { class: "clip" }, "range of the format"), make("label", {}, box, " log")),
    place, make("p", { class: "note" }, `${cut} Counts of the output's codes, in 64 bins.`));
}

function comparison(mode, seen) {
  const [first, second] = DATA.stages[mode];
  const own = seen.own || DATA.errors.map(() => "–"), same = seen.same || DATA.errors.map(() => "–");
  const ranges = seen.ranges.map((range, i) => [i ? second : first, ...(range || ["–", "–", "–", "–"])]);
  return make("section", { "data-mode": mode },
    make("h3", {}, `${first} against ${second}`),
    grid(["own values", "same input"], DATA.errors.map((name, i) => [name, own[i], same[i]])),
    grid(["min", "max", "mean", "std"], ranges),
    seen.histogram ? drawn(seen.histogram, [first, second]) : null,
    ...seen.why.map((why) => make("p", { class: "note" }, `Not measured: ${why}`)));
}

function show(name) {
  const op = DATA.ops[name];
  const close = make("button", { type: "button", class: "close", "aria-label": "Close", title: "Close (Escape)" }, "×");
  close.addEventListener("click", leave);
  const range = Object.values(op.seen).map((seen) => seen.histogram).find(Boolean);
  const facts = [["Type", op.type], ["Format", op.format], ["Scale", op.scale], ["Name", name]];
  if (range) facts.splice(3, 0, ["Range of the format", [range.low, range.high].map((v) => String(Number(v.toPrecision(4)))).join(" … ")]);
  const found = op.findings.map((i) => DATA.findings[i]);
  redraws = [];
  panel.replaceChildren(
    make("header", {}, make("h2", { id: "detail-title" }, op.title), close),
    make("dl", {}, ...facts.map(([word, value]) => make("div", {}, make("dt", {}, word), make("dd", {}, value)))),
    found.length ? make("ul", { class: "about" }, ...found.map((one) => make("li", { class: one.severity },
      make("span", { class: "badge" }, one.severity), " ", make("a", { href: `#${encodeURIComponent(one.at)}` }, one.code), ` ${one.title}`)))
      : make("p", { class: "note" }, "No finding is about this op."),
    ...Object.entries(op.seen).map(([mode, seen]) => comparison(mode, seen)),
    ...[listing("Reads", op.inputs), listing("Read by", op.readers), listing("Calls of the module", op.calls),
      listing("Steps of the composite", op.steps)].filter(Boolean));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.title = `${op.title}: ${TITLE}`;
}

function hide() {
  panel.hidden = true;
  panel.replaceChildren();
  document.title = TITLE;
}

function leave() {
  history.pushState(null, "", location.href.split("#")[0]);
  follow();
  if (opener && opener.isConnected) opener.focus({ preventScroll: true });
}

document.addEventListener("click", function (event) {
  const link = event.target.closest("a");
  const href = link && link.getAttribute("href");
  if (!href || !href.startsWith("#op=") || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (!panel.contains(link)) opener = link;
  history.pushState(null, "", href);
  follow();
  panel.focus({ preventScroll: true });
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) leave(); });
document.addEventListener("op", function (event) {
  if (Object.hasOwn(DATA.ops, event.detail)) show(event.detail); else hide();
});
