"use strict";
// Legend of the map, and saving the map as a picture.
prts.legend = (() => {
  const { meta, element, number } = prts;
  const box = document.getElementById("legend");
  const rgb = ["#ff0000", "#00ff00", "#0000ff"];

  function words(panel, state) {
    if (state.colour === "prob") return `${panel.label}: P(expressed)` + (state.view === "both" || state.view === "measured" ? "; measured: expressed or not" : "");
    if (state.colour === "interval") return `${panel.label}: width of the ${Math.round(100 * meta.interval)}% prediction interval, UMI`;
    if (state.colour.startsWith("column:")) return panel.label;
    const of = panel.what === "predicted" && (state.own || !prts.has.measured) ? "predicted" : "measured";
    return `${panel.label}: log1p(UMI), 0 to ${meta.percentile}th percentile of ${of} nuclei`;
  }
  const ends = (panel, state) => {
    const ramp = state.colour === "expression";
    const digits = panel.high - panel.low >= 20 ? 0 : 2;
    return [number(panel.low, ramp ? 0 : digits), (state.colour === "prob" ? "" : "≥ ") + number(panel.high, digits)];
  };

  // Color scales to show: one if the panels share it.
  function scales(panels, state) {
    const coloured = panels.filter((panel) => panel.values && !panel.labels && !panel.colours);
    const apart = coloured.length === 2 && coloured[0].high !== coloured[1].high;
    return (apart ? coloured : coloured.slice(-1)).map((panel) => ({
      text: (apart ? `${prts.map.title(panel)}: ` : "") + words(panel, state), ends: ends(panel, state),
    }));
  }

  function draw(panels, state) {
    const made = scales(panels, state).map(({ text, ends: [low, high] }) => element("div", { class: "ramp" },
      element("span", { class: "ramp-words" }, text),
      element("span", { class: "ramp-row" }, element("span", {}, low),
        element("span", { class: "ramp-bar", style: `background:linear-gradient(to right,${prts.map.viridis.join()})` }), element("span", {}, high))));
    const kinds = panels.find((panel) => panel.labels);
    if (kinds) made.push(categories(kinds, state));
    const channels = panels.find((panel) => panel.channels)?.channels;
    if (channels) made.push(element("div", { class: "kinds" }, ...channels.map((name, c) => element("span", { class: "channel" },
      element("span", { class: "swatch", style: `background:${rgb[c]}` }), name)),
      element("span", { class: "quiet" }, "log1p(UMI) of each gene, black to its color; mixtures add up")));
    if (state.colour === "expression" && state.view !== "image" && prts.has.measured && state.view !== "predicted" && meta.n_measured < meta.n)
      made.push(element("span", { class: "quiet" }, `Measured: ${meta.n_measured.toLocaleString("en")} of ${meta.n.toLocaleString("en")} nuclei; the others did not pass quality control.`));
    box.replaceChildren(...made);
  }

  function categories(panel, state) {
    const toggle = (code) => async () => {
      if (state.hidden.has(code)) state.hidden.delete(code); else state.hidden.add(code);
      await prts.map.render();
      box.querySelectorAll("button")[code]?.focus();
    };
    return element("div", { class: "kinds", role: "group", "aria-label": `${panel.label}: choose which ones to show` },
      ...panel.labels.map((label, code) => element("button", { type: "button", "aria-pressed": String(!state.hidden.has(code)), onclick: toggle(code) },
        element("span", { class: "swatch", style: `background:${prts.map.kinds[code % prts.map.kinds.length]}` }), label)));
  }

  // The current map with titles, scale bar and legend.
  async function picture() {
    const { div, title, bar, panels, state, viridis, kinds } = prts.map;
    const full = div._fullLayout, factor = 2, head = 34;
    const source = await Plotly.toImage(div, { format: "png", width: full.width, height: full.height, scale: factor });
    const image = new Image();
    await new Promise((resolve, reject) => { image.onload = resolve; image.onerror = reject; image.src = source; });
    const shown = panels(), ramps = scales(shown, state), labelled = shown.find((panel) => panel.labels);
    const channels = shown.find((panel) => panel.channels)?.channels;
    const visible = channels ? channels.map((name, c) => [name, c]) : labelled ? labelled.labels.map((label, code) => [label, code]).filter(([, code]) => !state.hidden.has(code)) : [];
    const columns = Math.max(1, Math.floor(full.width / 180));
    const foot = 14 + 40 * ramps.length + 20 * Math.ceil(visible.length / columns);
    const canvas = element("canvas", { width: full.width * factor, height: (full.height + head + foot) * factor });
    const pen = canvas.getContext("2d");
    pen.scale(factor, factor);
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, full.width, full.height + head + foot);
    pen.drawImage(image, 0, head, full.width, full.height);
    if (prts.outlines.shown()) pen.drawImage(prts.outlines.canvas, 0, head, full.width, full.height);
    pen.fillStyle = "#1a1a1a";
    pen.font = "600 15px system-ui, sans-serif";
    shown.forEach((panel, i) => {
      const [across, down] = [full[`xaxis${i ? "2" : ""}`], full[`yaxis${i ? "2" : ""}`]];
      const words = panel.what === "image" || prts.map.single() ? title(panel) : `${panel.label}, ${title(panel).toLowerCase()}`;
      if (down._offset < 2) pen.fillText(words, across._offset + 8, 22, across._length - 16);
      else plate(pen, words, across._offset + 8, head + down._offset + 8);
    });
    const length = bar(), bottom = head + full.yaxis._offset + full.yaxis._length - 14;
    plate(pen, length.text, 12, bottom - 32);
    pen.fillRect(12, bottom - 5, length.px, 5);
    let top = head + full.height + 20;
    for (const { text, ends: [low, high] } of ramps) {
      pen.font = "13px system-ui, sans-serif";
      pen.fillText(text, 8, top);
      const from = 8 + pen.measureText(low).width + 8;
      pen.fillText(low, 8, top + 18);
      const gradient = pen.createLinearGradient(from, 0, from + 180, 0);
      viridis.forEach((colour, i) => gradient.addColorStop(i / (viridis.length - 1), colour));
      pen.fillStyle = gradient;
      pen.fillRect(from, top + 8, 180, 11);
      pen.fillStyle = "#1a1a1a";
      pen.fillText(high, from + 188, top + 18);
      top += 40;
    }
    pen.font = "13px system-ui, sans-serif";
    visible.forEach(([label, code], i) => {
      const left = 8 + (i % columns) * 180, line = top + 20 * Math.floor(i / columns);
      pen.fillStyle = channels ? rgb[code] : kinds[code % kinds.length];
      pen.fillRect(left, line - 10, 11, 11);
      pen.fillStyle = "#1a1a1a";
      pen.fillText(label, left + 17, line, 158);
    });
    const blob = await new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
    const what = state.colour.startsWith("column:") ? meta.columns[Number(state.colour.slice(7))].name : meta.genes[state.gene].name;
    const name = `${meta.section}_${what}_${state.view}.png`.replace(/[^A-Za-z0-9.+-]+/g, "_");
    const link = element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function plate(pen, text, left, top) {
    pen.font = "600 13px system-ui, sans-serif";
    pen.fillStyle = "rgba(255,255,255,.85)";
    pen.fillRect(left - 4, top, pen.measureText(text).width + 8, 20);
    pen.fillStyle = "#1a1a1a";
    pen.fillText(text, left, top + 14);
  }

  return { draw, picture };
})();
