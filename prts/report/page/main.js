"use strict";
// Behavior of the controls.
(() => {
  const { meta, has, element } = prts;
  const { state } = prts.map;
  const $ = (id) => document.getElementById(id);
  const place = new Map(meta.genes.map((gene, i) => [gene.name, i]));

  async function render() {
    for (const input of $("views").querySelectorAll("input"))
      input.disabled = prts.map.single() && (input.value === "measured" || input.value === "both");
    $("more-genes").hidden = state.colour !== "genes";
    $("own-label").hidden = !(state.colour === "expression" && state.view === "both");
    await prts.map.render();
  }

  prts.choose = async (gene) => {
    state.gene = gene;
    if (state.colour.startsWith("column:")) $("colour").value = state.colour = "expression";
    const { name } = meta.genes[gene];
    $("gene").value = name;
    prts.table.mark(gene);
    await render();
    prts.say(`Showing ${name}.`);
  };

  // The second and third gene of a map in three colors; an empty field leaves one out.
  function another(k) {
    const text = $(`gene${k}`).value.trim(), gene = place.get(text);
    if (text && gene === undefined) return prts.say(`${text} is not among the ${meta.genes.length} genes on the map.`);
    state.extra[k - 2] = gene ?? null;
    return render();
  }

  function find() {
    const wanted = $("gene").value.trim();
    if (!wanted) return;
    const lower = wanted.toLowerCase();
    const gene = place.get(wanted) ?? meta.genes.findIndex(({ name }) => name.toLowerCase() === lower);
    if (gene >= 0) prts.choose(gene);
    else prts.say(meta.table.some(([name]) => name.toLowerCase() === lower)
      ? `${wanted} is not among the ${meta.genes.length} genes on the map.` : `This prediction has no gene ${wanted}.`);
  }

  function controls() {
    $("gene-names").append(...meta.genes.map(({ name }) => element("option", { value: name })));
    $("gene").addEventListener("change", find);
    $("gene").addEventListener("input", () => { if (place.has($("gene").value)) find(); });
    $("gene").addEventListener("keydown", (event) => { if (event.key === "Enter") find(); });
    for (const k of [2, 3]) $(`gene${k}`).addEventListener("change", () => another(k));
    const colours = [["expression", "expression"], ...(meta.genes.length > 1 ? [["genes", "with other genes"]] : []), ...(has.prob ? [["prob", "P(expressed)"]] : []), ...(has.interval ? [["interval", "uncertainty"]] : [])];
    $("colour").append(element("optgroup", { label: "the gene" }, ...colours.map(([value, text]) => element("option", { value }, text))));
    if (meta.columns.length) $("colour").append(element("optgroup", { label: "nuclei" },
      ...meta.columns.map(({ name }, i) => element("option", { value: `column:${i}` }, name.replaceAll("_", " ")))));
    $("colour").addEventListener("change", (event) => { state.colour = event.target.value; state.hidden.clear(); render(); });
    const views = [...(has.measured ? [["both", "Measured | predicted"], ["measured", "Measured"]] : []), ["predicted", "Predicted"], ["image", "H&E | predicted"]];
    state.view = has.measured ? "both" : "image";
    $("views").append(...views.map(([value, text]) => element("label", {},
      element("input", { type: "radio", name: "view", value, checked: value === state.view, onchange: () => { state.view = value; render(); } }), element("span", {}, text))));
    $("own").addEventListener("change", (event) => { state.own = event.target.checked; render(); });
    $("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; render(); });
    for (const input of $("drag").querySelectorAll("input"))
      input.addEventListener("change", () => { state.drag = input.value; Plotly.relayout(prts.map.div, { dragmode: state.drag }); });
    $("select-view").addEventListener("click", () => prts.map.selectView());
    $("clear").addEventListener("click", () => prts.region.clear());
    $("zoom-in").addEventListener("click", () => prts.map.zoom(0.7));
    $("zoom-out").addEventListener("click", () => prts.map.zoom(1 / 0.7));
    $("zoom-reset").addEventListener("click", () => prts.map.reset());
    $("png").addEventListener("click", () => prts.legend.picture());
    printing();
    $("controls").hidden = $("tools").hidden = false;
  }

  // Show what the address asks for.
  async function recall() {
    const { region, ...asked } = prts.link.read();
    Object.assign(state, asked);
    if (asked.gene !== undefined) { $("gene").value = meta.genes[asked.gene].name; prts.table.mark(asked.gene); }
    $("colour").value = state.colour;
    state.extra.forEach((gene, k) => { $(`gene${k + 2}`).value = gene === null ? "" : meta.genes[gene].name; });
    for (const input of $("views").querySelectorAll("input")) input.checked = input.value === state.view;
    await render();
    if (region) await prts.map.select(region);
  }

  // On paper, the map shrinks to the width of the sheet.
  function printing() {
    const frame = $("frame");
    window.addEventListener("beforeprint", () => { frame.style.zoom = Math.min(1, 690 / prts.map.div._fullLayout.width); });
    window.addEventListener("afterprint", () => { frame.style.zoom = ""; });
    $("print").addEventListener("click", () => window.print());
  }

  async function start() {
    await prts.library();
    prts.table.start();
    controls();
    const first = prts.table.first();
    if (first) { state.gene = first.place; $("gene").value = first.name; prts.table.mark(first.place); }
    await prts.map.start();
    await recall();
    $("loading").remove();
    prts.ready = performance.now();
  }
  start();
})();
