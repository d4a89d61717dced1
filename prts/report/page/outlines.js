"use strict";
// Outlines of the nuclei, drawn in place of points where they are large enough to be seen.
prts.outlines = (() => {
  const { meta } = prts;
  const canvas = document.getElementById("outlines");
  const least = 9, most = 8000; // px across a nucleus; nuclei in view
  let starts = null, offsets = null, shown = false;

  // Offsets from the center in steps of `outline_step` picture px, for all vertices of all nuclei in turn.
  async function start() {
    if (!prts.has.outlines) return;
    const [counts, xy] = await prts.outlineBlocks();
    starts = new Uint32Array(counts.length + 1);
    counts.forEach((count, i) => { starts[i + 1] = starts[i] + count; });
    offsets = xy;
  }

  const ring = (i, x, y) => Array.from({ length: starts[i + 1] - starts[i] }, (_, k) => {
    const at = 2 * (starts[i] + k);
    return [x[i] + offsets[at] * meta.outline_step, y[i] + offsets[at + 1] * meta.outline_step];
  });

  const visible = (x, y, across, down) => {
    const [x0, x1] = [Math.min(...across.range), Math.max(...across.range)], [y0, y1] = [Math.min(...down.range), Math.max(...down.range)];
    const found = [];
    for (let i = 0; i < x.length && found.length <= most; i++) if (x[i] >= x0 && x[i] <= x1 && y[i] >= y0 && y[i] <= y1) found.push(i);
    return found;
  };

  // Draw the nuclei in view in every panel; false if they are too small or too many, and points have to do.
  function draw(panels, x, y, size, colour, opacity, full) {
    clear();
    if (!starts || size < least || !panels.length) return false;
    const inside = visible(x, y, full.xaxis, full.yaxis);
    if (inside.length > most) return false;
    const factor = window.devicePixelRatio || 1;
    canvas.width = full.width * factor;
    canvas.height = full.height * factor;
    const pen = canvas.getContext("2d");
    panels.forEach((panel, n) => {
      if (!panel.values) return;
      const across = full[`xaxis${n ? "2" : ""}`], down = full[`yaxis${n ? "2" : ""}`];
      pen.setTransform(factor, 0, 0, factor, 0, 0);
      pen.save();
      pen.beginPath();
      pen.rect(across._offset, down._offset, across._length, down._length);
      pen.clip();
      for (const i of inside) {
        if (Number.isNaN(panel.values[i])) continue;
        const fill = colour(panel, i);
        pen.beginPath();
        ring(i, x, y).forEach(([px, py], k) => pen[k ? "lineTo" : "moveTo"](across._offset + across.l2p(px), down._offset + down.l2p(py)));
        pen.closePath();
        pen.globalAlpha = 0.7 * opacity;
        pen.fillStyle = fill;
        pen.fill();
        pen.globalAlpha = opacity;
        pen.strokeStyle = fill;
        pen.lineWidth = 1.5;
        pen.stroke();
      }
      pen.restore();
    });
    canvas.hidden = false;
    return (shown = true);
  }
  function clear() { canvas.hidden = true; shown = false; }

  return { start, draw, clear, ring, canvas, shown: () => shown, known: () => starts !== null };
})();
