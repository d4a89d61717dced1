"use strict";
// The address of the page remembers gene, view and region, so that a link shows what its sender saw; and an overview of the section.
prts.link = (() => {
  const { meta } = prts;
  const overview = document.getElementById("overview"), box = overview.firstElementChild;
  const round = (values) => values.map((value) => Math.round(value));
  let waiting = 0;

  function write() {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const { state, atHome } = prts.map, said = new URLSearchParams();
      if (meta.genes.length) said.set("gene", meta.genes[state.gene].name);
      if (state.colour === "genes") said.set("with", state.extra.filter((gene) => gene !== null).map((gene) => meta.genes[gene].name).join("|"));
      said.set("color", state.colour.startsWith("column:") ? `column:${meta.columns[Number(state.colour.slice(7))].name}` : state.colour);
      said.set("view", state.view);
      if (state.range && !atHome()) said.set("at", round([...state.range.x, ...state.range.y]).join(","));
      if (state.polygon) said.set("region", state.polygon.map((point) => round(point).join(",")).join(" "));
      history.replaceState(null, "", `#${said}`);
    }, 250);
  }

  // What the address asks for; unknown genes, columns and views are left out.
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1)), found = {};
    const gene = (name) => meta.genes.findIndex((each) => each.name === name);
    const numbers = (text) => text.split(",").map(Number);
    const good = (values, n) => values.length === n && values.every(Number.isFinite);
    if (gene(asked.get("gene")) >= 0) found.gene = gene(asked.get("gene"));
    const extra = (asked.get("with") ?? "").split("|").map(gene).filter((at) => at >= 0);
    const color = asked.get("color") ?? "";
    if (color.startsWith("column:")) {
      const at = meta.columns.findIndex(({ name }) => `column:${name}` === color);
      if (at >= 0) found.colour = `column:${at}`;
    } else if ([...document.getElementById("colour").options].some(({ value }) => value === color)) found.colour = color;
    if (found.colour === "genes") found.extra = [extra[0] ?? null, extra[1] ?? null];
    if ([...document.querySelectorAll("#views input")].some(({ value }) => value === asked.get("view"))) found.view = asked.get("view");
    const at = numbers(asked.get("at") ?? "");
    if (good(at, 4)) found.range = { x: at.slice(0, 2), y: at.slice(2) };
    const region = (asked.get("region") ?? "").split(" ").map(numbers);
    if (region.length > 2 && region.every((point) => good(point, 2))) found.region = region;
    return found;
  }

  function follow() {
    const { state, atHome } = prts.map;
    overview.hidden = !state.range || atHome();
    if (overview.hidden) return;
    const scale = overview.clientWidth / meta.width, [left, right] = state.range.x, [bottom, top] = state.range.y;
    Object.assign(box.style, { left: `${left * scale}px`, top: `${top * scale}px`, width: `${(right - left) * scale}px`, height: `${(bottom - top) * scale}px` });
  }
  function start() {
    const longest = 130 / Math.max(meta.width, meta.height);
    Object.assign(overview.style, { width: `${meta.width * longest}px`, height: `${meta.height * longest}px`,
      backgroundImage: `url(${document.getElementById("tissue").src})` });
    overview.addEventListener("click", (event) => {
      const bounds = overview.getBoundingClientRect();
      prts.map.center(((event.clientX - bounds.left) / bounds.width) * meta.width, ((event.clientY - bounds.top) / bounds.height) * meta.height);
    });
  }
  return { read, write, follow, start };
})();
