"use strict";
// Data of the page: metadata, and blocks that are unpacked when first needed (written by prts/report/embed.py).
const prts = (() => {
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const meta = json("prts-meta");
  const blocks = json("prts-blocks");
  const cache = new Map();

  async function unpack(text) {
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // Plotly is compressed, too: 2 MB instead of 5.
  async function library() {
    const code = await unpack(document.getElementById("prts-plotly").textContent);
    document.head.append(element("script", {}, new TextDecoder().decode(code)));
  }

  function block(name, index, kind) {
    const key = `${name}/${index}`;
    if (!cache.has(key)) {
      const text = index === null ? blocks[name] : blocks[name][index];
      cache.set(key, unpack(text).then((buffer) => new kind(buffer)));
    }
    return cache.get(key);
  }

  const has = { measured: meta.n_measured > 0, prob: "prob" in blocks, interval: "upper" in blocks, outlines: "outline_n" in blocks };

  // Codes of a gene, and the log1p(UMI) of each code; NaN means "not measured".
  const predictedCodes = (gene) => block("predicted", gene, Uint8Array);
  const measuredCodes = (gene) => block("measured", gene, meta.genes[gene].bytes === 1 ? Uint8Array : Uint16Array);
  const predictedLevels = (gene) => Float32Array.from({ length: 256 }, (_, code) => (code / 255) * meta.genes[gene].highest);
  const missing = (gene) => (meta.genes[gene].bytes === 1 ? 255 : 65535);

  async function predicted(gene) {
    const levels = predictedLevels(gene);
    return Float32Array.from(await predictedCodes(gene), (code) => levels[code]);
  }
  async function measured(gene) {
    const none = missing(gene);
    return Float32Array.from(await measuredCodes(gene), (code) => (code === none ? NaN : Math.log1p(code)));
  }
  // the mean for each predicted code, then the difference of each nucleus from it
  async function deltas(name, gene) {
    const [codes, bytes] = await Promise.all([predictedCodes(gene), block(name, gene, Uint8Array)]);
    return Float32Array.from(codes, (code, i) => (bytes[code] + bytes[256 + i]) & 255);
  }
  const prob = async (gene) => (await deltas("prob", gene)).map((step) => step / meta.prob_steps);
  const interval = (gene) => Promise.all([deltas("lower", gene), deltas("upper", gene)]);
  async function column(index, what = "predicted") {
    const name = what === "measured" && meta.columns[index].measured ? "measured_columns" : "columns";
    if (meta.columns[index].kind === "number") return block(name, index, Float32Array);
    return Float32Array.from(await block(name, index, Uint8Array), (code) => (code === 255 ? NaN : code));
  }

  const coordinates = () => Promise.all([block("x", null, Float32Array), block("y", null, Float32Array)]);
  const outlineBlocks = () => Promise.all([block("outline_n", null, Uint8Array), block("outline_xy", null, Int8Array)]);
  const area = () => block("area", null, Float32Array);
  let names = null;
  const ids = async () => (names ??= JSON.parse(new TextDecoder().decode(await block("ids", null, Uint8Array))));

  const number = (value, digits) =>
    value === null || Number.isNaN(value) ? "" : value.toFixed(digits).replace("-", "\u2212");
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value !== null) made.setAttribute(key, value);
    }
    made.append(...children); // inserted as text, so that names cannot contain markup
    return made;
  };
  const say = (text) => { document.getElementById("status").textContent = text; };

  return { meta, has, predicted, measured, prob, interval, column, predictedCodes, measuredCodes, predictedLevels, missing,
    coordinates, outlineBlocks, area, ids, number, element, say, library };
})();
