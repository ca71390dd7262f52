/** What the address names: a finding unfolds; of an op, as in "#op=conv1", the panel and the graph are told. */
function follow() {
  let name = "";
  try { name = decodeURIComponent(location.hash.slice(1)); } catch (error) { /* no name of ours */ }
  const target = document.getElementById(name);
  if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
  document.dispatchEvent(new CustomEvent("op", { detail: name.startsWith("op=") ? name.slice(3) : "" }));
}
window.addEventListener("popstate", follow);
follow();
