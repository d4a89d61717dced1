"use strict";
// Compare a selected region with the rest: which genes are higher or lower inside.
prts.region = (() => {
  const { meta, element, number } = prts;
  const box = document.getElementById("region");
  const most = 15;
  let found = null, turn = 0;
  const order = { by: "predicted", down: true };

  // Even-odd rule: a point is inside if a ray from it crosses the outline an odd number of times.
  function inside(polygon, x, y) {
    const mask = new Uint8Array(x.length);
    for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
      const [xa, ya] = polygon[a], [xb, yb] = polygon[b];
      for (let i = 0; i < x.length; i++)
        if (ya > y[i] !== yb > y[i] && x[i] < ((xb - xa) * (y[i] - ya)) / (yb - ya) + xa) mask[i] ^= 1;
    }
    return mask;
  }

  // Mean UMI inside and outside, and their difference in standard deviations of log1p(UMI), from a histogram of codes.
  function compare(codes, mask, level, none) {
    const size = level.length, counts = [new Float64Array(size), new Float64Array(size)];
    for (let i = 0; i < codes.length; i++) if (codes[i] !== none) counts[mask[i]][codes[i]]++;
    const of = counts.map((count) => {
      let n = 0, umi = 0, sum = 0, square = 0;
      for (let k = 0; k < size; k++) {
        const times = count[k];
        if (!times) continue;
        n += times; umi += times * Math.expm1(level[k]); sum += times * level[k]; square += times * level[k] ** 2;
      }
      return { n, umi: umi / n, sum, square };
    });
    const [out, within] = of, n = out.n + within.n, mean = (out.sum + within.sum) / n;
    const sd = Math.sqrt(Math.max(0, (out.square + within.square) / n - mean ** 2));
    const difference = within.sum / within.n - out.sum / out.n;
    return { inside: within.umi, outside: out.umi, effect: sd > 0 ? difference / sd : 0 };
  }

  async function show(polygon, x, y) {
    const mine = ++turn;
    const mask = inside(polygon, x, y);
    const n = mask.reduce((sum, bit) => sum + bit, 0);
    document.getElementById("clear").disabled = false;
    if (n === 0 || n === mask.length) {
      found = null;
      box.hidden = true;
      prts.say(n ? "The selection contains all nuclei; select fewer to compare them with the rest." : "The selection contains no nuclei.");
      return;
    }
    prts.say("Comparing …");
    const genes = [];
    for (let gene = 0; gene < meta.genes.length; gene++) {
      const row = { gene, predicted: compare(await prts.predictedCodes(gene), mask, prts.predictedLevels(gene), -1) };
      if (prts.has.measured) {
        const none = prts.missing(gene);
        row.measured = compare(await prts.measuredCodes(gene), mask, Float64Array.from({ length: none + 1 }, (_, umi) => Math.log1p(umi)), none);
      }
      genes.push(row);
      if (mine !== turn) return;
    }
    found = { genes, n, out: mask.length - n };
    list();
    prts.say(`${n.toLocaleString("en")} nuclei selected. The genes that differ most are listed below the map.`);
  }

  function ranked() {
    const sign = order.down ? -1 : 1;
    return found.genes.filter((row) => Number.isFinite(row[order.by].effect)).sort((a, b) => sign * (a[order.by].effect - b[order.by].effect)).slice(0, most);
  }

  function choice(label, options, value, onchange) {
    const select = element("select", { onchange: (event) => onchange(event.target.value) }, ...options.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
    return element("label", {}, `${label} `, select);
  }

  function list() {
    const sources = prts.has.measured ? ["predicted", "measured"] : ["predicted"];
    const controls = [choice("Genes", [["down", "higher inside"], ["up", "lower inside"]], order.down ? "down" : "up", (value) => { order.down = value === "down"; list(); })];
    if (prts.has.measured) controls.push(choice("ranked by", sources.map((s) => [s, s]), order.by, (value) => { order.by = value; list(); }));
    const top = [
      element("tr", {}, element("th", { scope: "col", rowspan: 2 }, "Gene"), ...sources.map((s) => element("th", { scope: "colgroup", colspan: 3, class: "of" }, s))),
      element("tr", {}, ...sources.flatMap(() => ["inside", "outside", "difference"].map((w) => element("th", { scope: "col", class: "n" }, w))))];
    const lines = ranked().map((row) => element("tr", {},
      element("th", { scope: "row" }, element("button", { type: "button", onclick: () => prts.choose(row.gene) }, meta.genes[row.gene].name)),
      ...sources.flatMap((s) => [number(row[s].inside, 2), number(row[s].outside, 2), number(row[s].effect, 2)].map((text) => element("td", { class: "n" }, text)))));
    box.replaceChildren(
      element("h3", {}, `Selection: ${found.n.toLocaleString("en")} nuclei vs. ${found.out.toLocaleString("en")} others`),
      element("div", { class: "bar" }, ...controls),
      element("div", { class: "scroll" }, element("table", {},
        element("caption", { class: "hidden" }, "Genes that differ most between the selection and the rest"),
        element("thead", {}, ...top), element("tbody", {}, ...lines))),
      element("p", { class: "quiet" }, `Inside, outside: mean UMI per nucleus. Difference: in mean log1p(UMI), in standard deviations over all nuclei. Covers the ${meta.genes.length} genes on the map.`));
    box.hidden = false;
  }

  function clear() {
    turn++;
    found = null;
    box.hidden = true;
    document.getElementById("clear").disabled = true;
    prts.map.state.polygon = null;
    prts.say("Selection cleared.");
    return prts.map.render();
  }
  return { show, clear, result: () => found, ranked };
})();
