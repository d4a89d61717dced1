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
    found = { genes, n, out: mask.length - n, rows: Array.from(mask.keys()).filter((i) => mask[i]) };
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
      element("div", { class: "bar" }, ...controls,
        element("button", { type: "button", onclick: () => save("csv") }, "Save CSV"),
        ...(prts.outlines.known() ? [element("button", { type: "button", onclick: () => save("geojson") }, "Save GeoJSON")] : [])),
      element("div", { class: "scroll" }, element("table", {},
        element("caption", { class: "hidden" }, "Genes that differ most between the selection and the rest"),
        element("thead", {}, ...top), element("tbody", {}, ...lines))),
      element("p", { class: "quiet" }, `Inside, outside: mean UMI per nucleus. Difference: in mean log1p(UMI), in standard deviations over all nuclei. Covers the ${meta.genes.length} genes on the map.`));
    box.hidden = false;
  }

  // The selected nuclei: position, area, columns of obs, and the predicted UMI of the genes on the map.
  async function save(format) {
    const { x, y, area, ids } = prts.map.nuclei();
    const columns = await Promise.all(meta.columns.map(async (column, k) => {
      const values = await prts.column(k);
      return [column.name, (i) => (Number.isNaN(values[i]) ? null : column.labels ? column.labels[values[i]] : Number(values[i].toPrecision(6)))];
    }));
    const genes = await Promise.all(meta.genes.map(async ({ name }, k) => {
      const values = await prts.predicted(k);
      return [name, (i) => Number(Math.expm1(values[i]).toPrecision(4))];
    }));
    const text = format === "csv" ? csv(found.rows, [["cell_id", (i) => ids[i]], ["x", (i) => x[i]], ["y", (i) => y[i]],
      ...(meta.columns.some(({ name }) => name === "area_um2") ? [] : [["area_um2", (i) => area[i]]]), ...columns, ...genes])
      : geojson(found.rows, ids, x, y, columns, genes);
    const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: format === "csv" ? "text/csv" : "application/geo+json" })),
      download: `${meta.section}_selection.${format}`.replace(/[^A-Za-z0-9.+-]+/g, "_") });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function csv(rows, columns) {
    const field = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    return [columns.map(([name]) => field(name)), ...rows.map((i) => columns.map(([, of]) => field(of(i))))].map((cells) => `${cells.join(",")}\n`).join("");
  }
  function geojson(rows, ids, x, y, columns, genes) {
    const features = rows.map((i) => {
      const ring = prts.outlines.ring(i, x, y).map((point) => point.map((value) => Number(value.toFixed(2))));
      const values = [...columns, ...genes].map(([name, of]) => [name, of(i)]);
      const type = columns.find(([name]) => name === "type")?.[1](i);
      return { type: "Feature", id: ids[i], geometry: { type: "Polygon", coordinates: [[...ring, ring[0]]] }, properties: { objectType: "detection", name: ids[i],
        ...(type ? { classification: { name: type } } : {}), measurements: Object.fromEntries(values.filter(([, value]) => typeof value === "number")) } };
    });
    return JSON.stringify({ type: "FeatureCollection", features });
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
