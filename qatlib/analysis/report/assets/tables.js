/** Sorting and filtering. */
document.querySelectorAll("table.ops").forEach(function (table) {
  const body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
  const key = (row, i) => row.cells[i].dataset.k;
  heads.forEach(function (head, i) {
    const numeric = Array.from(body.rows).some((row) => row.cells[i].classList.contains("n"));
    head.classList.toggle("n", numeric);
    head.firstChild.addEventListener("click", function () {
      const up = head.getAttribute("aria-sort") === "descending" || (!numeric && !head.hasAttribute("aria-sort"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sign = up ? 1 : -1;
      const rows = Array.from(body.rows).sort(function (a, b) {
        const x = key(a, i), y = key(b, i);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y));
      });
      body.append(...rows);
    });
  });
});
document.querySelectorAll("input[data-table]").forEach(function (input) {
  const table = document.getElementById(input.dataset.table), rows = table.tBodies[0].rows;
  const steps = document.querySelector(`input[data-steps="${table.id}"]`);
  const show = function () {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const folded = row.classList.contains("step") && !words.length && !steps.checked;
      row.hidden = folded || !words.every((word) => text.includes(word));
    }
  };
  input.addEventListener("input", show);
  if (steps) steps.addEventListener("change", show);
  show();
});
window.addEventListener("beforeprint", function () {
  document.querySelectorAll("details.finding").forEach((item) => { item.open = true; });
});
