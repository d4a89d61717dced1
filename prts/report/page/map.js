"use strict";
// The map: nuclei as WebGL points (plotly.js) on top of the picture, in one panel or two with linked axes.
prts.map = (() => {
  const { meta } = prts;
  const div = document.getElementById("map");
  const frame = document.getElementById("frame");
  const overlay = document.getElementById("overlay");
  const tooltip = document.getElementById("tooltip");
  const viridis = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  // Okabe and Ito (2008), ordered so that colors similar to H&E come last, then further distinct colors
  const kinds = ["#0072b2", "#e69f00", "#009e73", "#f0e442", "#d55e00", "#56b4e9", "#222222", "#a6d854", "#8c564b", "#00d5c8",
    "#cc79a7", "#7f7f7f", "#bcbd22", "#aec7e8", "#ffbb78", "#9467bd", "#98df8a", "#ff9896", "#c49c94", "#ffffff"];
  const titles = { measured: "Measured", predicted: "Predicted", image: "H&E" };
  const config = { scrollZoom: true, displayModeBar: false, responsive: false, doubleClick: false, showTips: false };
  const smallest = 2.6, largest = 60; // px across a nucleus

  const state = {
    gene: 0, colour: "expression", view: "predicted", own: false, opacity: 0.85, drag: "pan", polygon: null,
    hidden: new Set(), range: null, extra: [null, null],
  };
  let x = null, y = null, area = null, ids = null;
  let panels = []; // what is drawn: {what, values, low, high, labels, label}
  let turn = 0, size = smallest, listening = false, hovered = null;

  const wide = () => frame.clientWidth >= 700;
  const whole = () => {
    const [x0, y0, x1, y1] = meta.bounds;
    const margin = 0.02 * Math.max(x1 - x0, y1 - y0) + meta.diameter;
    return { x: [x0 - margin, x1 + margin], y: [y1 + margin, y0 - margin] };
  };

  const atHome = () => {
    const home = whole(), near = (a, b) => Math.abs(a[0] - b[0]) + Math.abs(a[1] - b[1]) < 0.01 * Math.abs(b[1] - b[0]);
    return state.range !== null && (near(state.range.x, home.x) || near(state.range.y, home.y));
  };

  async function values(what) {
    const gene = meta.genes[state.gene];
    if (what === "image") return { what, values: null };
    if (state.colour.startsWith("column:")) {
      const index = Number(state.colour.slice(7));
      const column = meta.columns[index];
      const shown = await prts.column(index, what);
      if (column.kind === "number") return { what, values: shown, low: column.low, high: column.high, label: column.name };
      const visible = state.hidden.size ? shown.map((code) => (state.hidden.has(code) ? NaN : code)) : shown;
      return { what, values: visible, labels: column.labels, label: column.name };
    }
    if (state.colour === "genes") return composite(what);
    if (state.colour === "interval") {
      const [lower, upper] = await prts.interval(state.gene);
      const width = upper.map((count, k) => count - lower[k]);
      const high = width.slice().sort()[Math.floor((meta.percentile / 100) * (width.length - 1))] || 1;
      return { what, values: width, low: 0, high, label: gene.name };
    }
    if (state.colour === "prob") {
      const shown = what === "measured" ? (await prts.measured(state.gene)).map((v) => (v > 0 ? 1 : v)) : await prts.prob(state.gene);
      return { what, values: shown, low: 0, high: 1, label: gene.name };
    }
    const shown = what === "measured" ? await prts.measured(state.gene) : await prts.predicted(state.gene);
    const high = what === "predicted" && state.own ? gene.own : gene.top;
    return { what, values: shown, low: 0, high: high || 1, label: gene.name };
  }

  // Up to three genes as red, green and blue, each from 0 to the top of its own color scale.
  async function composite(what) {
    const chosen = [state.gene, ...state.extra];
    const levels = await Promise.all(chosen.map((gene) => gene === null ? null : what === "measured" ? prts.measured(gene) : prts.predicted(gene)));
    const tops = chosen.map((gene) => (gene === null ? 1 : meta.genes[gene].top || 1));
    const colours = Array.from(levels[0], (_, i) => `rgb(${levels.map((level, c) =>
      (level === null || Number.isNaN(level[i]) ? 0 : Math.round(255 * Math.min(1, level[i] / tops[c])))).join()})`);
    const labels = chosen.filter((gene) => gene !== null).map((gene) => meta.genes[gene].name);
    return { what, values: levels[0], colours, channels: labels, label: labels.join(", ") };
  }

  // Color of a nucleus, as on the color scale of its panel.
  function colourOf(panel, i) {
    if (panel.colours) return panel.colours[i];
    if (panel.labels) return kinds[panel.values[i] % kinds.length];
    const at = Math.max(0, Math.min(1, (panel.values[i] - panel.low) / (panel.high - panel.low || 1))) * (viridis.length - 1);
    const k = Math.min(viridis.length - 2, Math.floor(at));
    const [from, to] = [viridis[k], viridis[k + 1]].map((hex) => [1, 3, 5].map((c) => parseInt(hex.slice(c, c + 2), 16)));
    return `rgb(${from.map((value, c) => Math.round(value + (at - k) * (to[c] - value))).join()})`;
  }

  // A column of obs has a single map unless it was also found in the measured counts.
  const single = () => state.colour === "interval" || state.colour.startsWith("column:") && !meta.columns[Number(state.colour.slice(7))].measured;
  const wanted = () => {
    if (single() && state.view !== "image") return ["predicted"];
    return { predicted: ["predicted"], measured: ["measured"], both: ["measured", "predicted"], image: ["image", "predicted"] }[state.view];
  };

  function trace(panel, i) {
    const axes = { xaxis: i ? "x2" : "x", yaxis: i ? "y2" : "y" };
    if (panel.values === null) return { ...axes, type: "scattergl", mode: "markers", x: [null], y: [null], hoverinfo: "skip" };
    let colorscale = viridis.map((colour, step) => [step / (viridis.length - 1), colour]);
    let low = panel.low, high = panel.high;
    if (panel.labels) {
      const n = panel.labels.length;
      colorscale = panel.labels.flatMap((_, k) => [[k / n, kinds[k % kinds.length]], [(k + 1) / n, kinds[k % kinds.length]]]);
      [low, high] = [-0.5, n - 0.5];
    }
    const gaps = panel.values.some(Number.isNaN);
    return {
      ...axes, type: "scattergl", mode: "markers", hoverinfo: "none",
      x: gaps ? x.map((v, k) => (Number.isNaN(panel.values[k]) ? NaN : v)) : x, y,
      marker: panel.colours ? { color: panel.colours, size, opacity: state.opacity, line: { width: 0 } } : { color: gaps ? panel.values.map((v) => (Number.isNaN(v) ? 0 : v)) : panel.values, colorscale, cmin: low, cmax: high,
        size, opacity: state.opacity, line: { width: 0 } },
    };
  }

  function layout() {
    const stacked = panels.length === 2 && !wide();
    const range = state.range ?? whole();
    const gap = stacked ? 0.008 : 0.004;
    const spread = (i) => (panels.length === 1 ? [0, 1] : i === 0 ? [0, 0.5 - gap] : [0.5 + gap, 1]);
    const axis = { showgrid: false, zeroline: false, showticklabels: false, ticks: "", showline: false };
    const picture = document.getElementById("tissue").src;
    const made = {
      margin: { l: 0, r: 0, t: 0, b: 0, pad: 0 }, showlegend: false, hovermode: "closest", hoverdistance: 12, dragmode: state.drag,
      plot_bgcolor: "#ffffff", paper_bgcolor: "#e9e9ec", width: frame.clientWidth, height: frame.clientHeight, images: [], shapes: [],
      newshape: { line: { color: "#000", width: 2 }, fillcolor: "rgba(255,255,255,0.15)" }, selections: [],
    };
    panels.forEach((_, i) => {
      const n = i ? "2" : "";
      const [across, down] = stacked ? [[0, 1], [spread(i)[0], spread(i)[1]].map((v) => 1 - v).reverse()] : [spread(i), [0, 1]];
      made[`xaxis${n}`] = { ...axis, domain: across, range: range.x.slice(), anchor: `y${n}`, ...(i ? { matches: "x" } : {}) };
      made[`yaxis${n}`] = { ...axis, domain: down, range: range.y.slice(), anchor: `x${n}`, ...(i ? { matches: "y" } : { scaleanchor: "x" }) };
      made.images.push({ source: picture, xref: `x${n}`, yref: `y${n}`, x: 0, y: 0, sizex: meta.width, sizey: meta.height,
        sizing: "stretch", layer: "below", xanchor: "left", yanchor: "top" });
      if (state.polygon) made.shapes.push({ type: "path", xref: `x${n}`, yref: `y${n}`, layer: "above", editable: false,
        path: `M${state.polygon.map((p) => p.join(",")).join("L")}Z`, line: { color: "#000", width: 2 } });
    });
    return made;
  }

  async function render() {
    const mine = ++turn;
    const next = await Promise.all(wanted().map(values));
    if (mine !== turn) return; // a later choice was faster
    // one panel has a different aspect ratio than two: fit the whole section again
    if (next.length !== panels.length && atHome()) state.range = null;
    panels = next;
    await Plotly.react(div, panels.map(trace), layout(), config);
    if (!listening) listen();
    await follow();
    overlaid();
    await detailed();
    prts.legend.draw(panels, state);
    prts.link.write();
  }

  const axes = () => ({ x: div._fullLayout.xaxis, y: div._fullLayout.yaxis });
  const scale = () => { const { x } = axes(); return x._length / Math.abs(x.range[1] - x.range[0]); }; // screen px per picture px

  // Points grow with the zoom, like the nuclei on the tissue.
  async function follow() {
    const { x, y } = axes();
    state.range = { x: x.range.slice(), y: y.range.slice() };
    const fits = Math.min(largest, Math.max(smallest, meta.diameter * scale()));
    if (Math.abs(fits / size - 1) > 0.05) {
      size = fits;
      const drawn = panels.flatMap((panel, i) => (panel.values ? [i] : []));
      await Plotly.restyle(div, { "marker.size": size }, drawn);
    }
  }

  // Outlines instead of points where the zoom shows the shape of nuclei.
  async function detailed() {
    const drawn = panels.flatMap((panel, i) => (panel.values ? [i] : []));
    const opacity = prts.outlines.draw(panels, x, y, size, colourOf, state.opacity, div._fullLayout) ? 0 : state.opacity;
    if (drawn.length && div._fullData[drawn[0]].marker.opacity !== opacity) await Plotly.restyle(div, { "marker.opacity": opacity }, drawn);
  }

  function listen() {
    listening = true;
    div.on("plotly_relayout", async (change) => {
      if (change.shapes) return drawn(change.shapes.at(-1));
      await follow();
      overlaid();
      await detailed();
      prts.link.write();
    });
    div.on("plotly_relayouting", () => { hide(); overlaid(); prts.outlines.clear(); });
    div.on("plotly_hover", (event) => hover(event.points[0].pointNumber));
    div.on("plotly_unhover", hide);
    div.on("plotly_doubleclick", reset);
    let waiting = 0;
    new ResizeObserver(() => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { if (frame.clientWidth !== div._fullLayout.width || frame.clientHeight !== div._fullLayout.height) render(); }, 120);
    }).observe(frame);
  }

  function drawn(shape) {
    if (!shape) return;
    let polygon;
    if (shape.type === "rect") {
      const { x0, x1, y0, y1 } = shape;
      polygon = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    } else polygon = shape.path.slice(1, -1).split("L").map((pair) => pair.split(",").map(Number));
    select(polygon);
  }
  async function select(polygon) {
    state.polygon = polygon;
    await render();
    await prts.region.show(polygon, x, y);
  }
  const selectView = () => {
    const { x, y } = axes();
    return select([[x.range[0], y.range[0]], [x.range[1], y.range[0]], [x.range[1], y.range[1]], [x.range[0], y.range[1]]]);
  };

  // Panel titles, scale bar, and a ring around the nucleus under the mouse, in every panel.
  function overlaid() {
    const { element } = prts;
    const full = div._fullLayout;
    const length = bar();
    prts.link.follow();
    overlay.replaceChildren(...panels.map((panel, i) => {
      const [across, down] = [full[`xaxis${i ? "2" : ""}`], full[`yaxis${i ? "2" : ""}`]];
      const box = element("div", { class: "panel", style: `left:${across._offset}px;top:${down._offset}px;width:${across._length}px;height:${down._length}px` },
        element("span", { class: "panel-title" }, title(panel)));
      if (i === 0) box.append(element("span", { class: "scale-bar", style: `width:${length.px}px` }, length.text));
      return box;
    }));
  }
  const title = (panel) => (single() && state.colour !== "interval" && panel.what !== "image" ? panel.label : titles[panel.what]);
  function bar() {
    const exact = (100 / scale()) * meta.mpp; // um in about 100 px
    const step = 10 ** Math.floor(Math.log10(exact));
    const um = [5, 2, 1].map((m) => m * step).find((v) => v <= exact);
    return { px: (um / meta.mpp) * scale(), text: um >= 1000 ? `${um / 1000} mm` : `${um} µm` };
  }

  async function hover(i) {
    const { element, number } = prts;
    hovered = i;
    overlay.querySelectorAll(".ring").forEach((ring) => ring.remove());
    const place = { left: axes().x.l2p(x[i]), top: axes().y.l2p(y[i]) };
    const across = Math.max(10, size + 4);
    overlay.querySelectorAll(".panel").forEach((box) => box.append(element("span", { class: "ring",
      style: `left:${place.left - across / 2}px;top:${place.top - across / 2}px;width:${across}px;height:${across}px` })));
    const gene = meta.genes[state.gene];
    const lines = [[`nucleus ${ids[i]}`, Number.isNaN(area[i]) ? "" : `${number(area[i], 0)} µm²`]];
    if (state.colour.startsWith("column:")) {
      const index = Number(state.colour.slice(7));
      const column = meta.columns[index];
      for (const what of column.measured ? ["measured", "predicted"] : ["predicted"]) {
        const value = (await prts.column(index, what))[i];
        lines.push([column.measured ? `${column.name}, ${what}` : column.name,
          Number.isNaN(value) ? "n/a" : column.labels ? column.labels[value] : String(Number(value.toPrecision(4)))]);
      }
    } else {
      lines.push([state.colour === "genes" ? panels.at(-1).label : gene.name, ""]);
      for (const other of state.colour === "genes" ? [state.gene, ...state.extra] : [])
        if (other !== null) lines.push([meta.genes[other].name, `${number(Math.expm1((await prts.predicted(other))[i]), 2)} UMI`]);
      if (state.colour === "genes") { /* the values of each gene are listed */ } else if (prts.has.measured) {
        const value = (await prts.measured(state.gene))[i];
        lines.push(["measured", Number.isNaN(value) ? "not measured" : `${number(Math.expm1(value), 0)} UMI`]);
      }
      if (state.colour !== "genes") lines.push(["predicted", `${number(Math.expm1((await prts.predicted(state.gene))[i]), 2)} UMI`]);
      if (prts.has.interval && state.colour !== "genes") {
        const [lower, upper] = await prts.interval(state.gene);
        lines.push([`${Math.round(100 * meta.interval)}% interval`, `${lower[i]} to ${upper[i]} UMI`]);
      }
      if (prts.has.prob && state.colour !== "genes") lines.push(["P(expressed)", number((await prts.prob(state.gene))[i], 2)]);
    }
    if (hovered !== i) return; // the mouse has moved to another nucleus
    tooltip.replaceChildren(...lines.map(([name, value]) => element("div", {}, element("span", {}, name), element("b", {}, value))));
    tooltip.hidden = false;
    const first = overlay.querySelector(".panel");
    const left = first.offsetLeft + place.left, top = first.offsetTop + place.top;
    // in the corner of the map that is farthest from the nucleus, so that its surroundings stay in sight
    tooltip.style.left = `${left > frame.clientWidth / 2 ? 8 : Math.max(4, frame.clientWidth - tooltip.offsetWidth - 8)}px`;
    tooltip.style.top = `${top > frame.clientHeight / 2 ? 34 : frame.clientHeight - tooltip.offsetHeight - 34}px`;
  }
  function hide() {
    hovered = null;
    tooltip.hidden = true;
    overlay.querySelectorAll(".ring").forEach((ring) => ring.remove());
  }

  function zoom(factor, dx = 0, dy = 0) {
    const { x, y } = axes();
    const moved = (axis, shift) => {
      const [a, b] = axis.range, centre = (a + b) / 2 + shift * (b - a), half = ((b - a) / 2) * factor;
      return [centre - half, centre + half];
    };
    return Plotly.relayout(div, { "xaxis.range": moved(x, dx), "yaxis.range": moved(y, dy) });
  }
  function center(px, py) {
    const { x, y } = axes();
    const around = (axis, middle) => { const half = (axis.range[1] - axis.range[0]) / 2; return [middle - half, middle + half]; };
    return Plotly.relayout(div, { "xaxis.range": around(x, px), "yaxis.range": around(y, py) });
  }
  function reset() {
    const { x, y } = whole();
    return Plotly.relayout(div, { "xaxis.range": x, "yaxis.range": y });
  }
  frame.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: [1, -0.15, 0], ArrowRight: [1, 0.15, 0], ArrowUp: [1, 0, 0.15], ArrowDown: [1, 0, -0.15], "+": [0.7], "=": [0.7], "-": [1 / 0.7] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !(act || event.key === "0")) return;
    event.preventDefault();
    if (act) zoom(...act); else reset();
  });

  async function start() {
    [[x, y], area, ids] = await Promise.all([prts.coordinates(), prts.area(), prts.ids(), prts.outlines.start()]);
    prts.link.start();
  }
  return { state, single, start, render, select, selectView, zoom, center, reset, atHome, nuclei: () => ({ x, y, area, ids }), bar, title, div, viridis, kinds, panels: () => panels };
})();
