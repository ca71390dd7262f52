/** Picture of how many values of two models fall on the codes of a format, and where the format ends. */
function histogram(seen, names, log) {
  const W = 520, H = 190, L = 8, R = 8, T = 18, B = 26;
  const span = seen.high - seen.low, beyond = 0.12 * span;
  const from = seen.low - Math.min(beyond, Math.max(0, seen.low - seen.min)) - 0.03 * span;
  const to = seen.high + Math.min(beyond, Math.max(0, seen.max - seen.high)) + 0.03 * span;
  const x = (value) => L + (W - L - R) * (value - from) / (to - from);
  const scaled = (count) => (log ? Math.log10(1 + count) : count);
  const most = Math.max(1, ...seen.counts.flatMap((row) => row.slice(1).map(scaled)));
  const y = (count) => T + (H - T - B) * (1 - scaled(count) / most);
  const shape = function (row) {
    const step = span / 64, start = x(seen.low + row[0] * step).toFixed(1);
    let path = `M${start} ${H - B}`;
    row.slice(1).forEach(function (count, i) {
      path += `V${y(count).toFixed(1)}H${x(seen.low + (row[0] + i + 1) * step).toFixed(1)}`;
    });
    return `${path}V${H - B}`;
  };
  const text = (value) => String(Number(value.toPrecision(4)));
  const clip = [seen.low, seen.high].map((v) => `<line class="clip" x1="${x(v)}" x2="${x(v)}" y1="${T - 6}" y2="${H - B}"/>`);
  const ends = [[seen.low, "start"], [seen.high, "end"]]
    .map(([v, side]) => `<text x="${x(v)}" y="${H - 10}" text-anchor="${side}">${text(v)}</text>`);
  const zero = from < 0 && to > 0 ? `<text x="${x(0)}" y="${H - 10}" text-anchor="middle">0</text>` : "";
  const marks = [seen.min, seen.max].filter((v) => v < seen.low || v > seen.high)
    .map(function (v) {
      const at = Math.max(L + 4, Math.min(W - R - 4, x(v)));
      return `<path class="beyond" d="M${at - 4} ${H - B + 2}h8l-4 -7z"><title>${names[0]} goes to ${text(v)}</title></path>`;
    });
  const picture = document.createElement("template");
  picture.innerHTML = `<svg class="histogram" viewBox="0 0 ${W} ${H}" role="img" `
    + `aria-label="Histogram of ${names.join(" and ")}, from ${text(seen.low)} to ${text(seen.high)}">`
    + `<line class="grid" x1="${L}" x2="${W - R}" y1="${H - B}" y2="${H - B}"/>`
    + `<path class="first" d="${shape(seen.counts[0])}"/><path class="second" d="${shape(seen.counts[1])}"/>`
    + `${clip.join("")}${ends.join("")}${zero}${marks.join("")}</svg>`;
  return picture.content;
}
