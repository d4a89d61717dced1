"use strict";
// Table of all genes: sorted by clicking a heading, filtered by name; clicking a gene shows it on the map.
prts.table = (() => {
  const { meta, element, number } = prts;
  const head = document.querySelector("#genes thead"), body = document.querySelector("#genes tbody");
  const columns = [{ label: "Gene", title: "Name of the gene", text: true }, ...meta.headings];
  const rows = meta.table.map(([name, place, predictable, ...figures]) => ({ name, place, predictable, cells: [name, ...figures], line: null }));
  let sorted = { column: meta.headings.length ? 1 : 0, down: meta.headings.length > 0 };

  function line(row) {
    const button = element("button", { type: "button", tabindex: -1, disabled: row.place < 0, title: row.place < 0 ? `${row.name} is not included in the map` : row.name,
      onclick: () => prts.choose(row.place) }, row.name);
    const made = element("tr", { class: row.predictable ? "" : "grey", title: row.predictable ? null : "not predictable on the validation data" },
      element("th", { scope: "row" }, button));
    columns.slice(1).forEach((column, i) => made.append(element("td", { class: "n" }, number(row.cells[i + 1], column.digits))));
    return made;
  }

  function sort(column) {
    // names sort from A, numbers from the highest
    sorted = { column, down: sorted.column === column ? !sorted.down : column > 0 };
    arrange();
    prts.say(`Genes sorted by ${columns[column].label}, ${sorted.down ? "highest first" : "lowest first"}.`);
  }
  function arrange() {
    const { column, down } = sorted, sign = down ? -1 : 1;
    rows.sort((a, b) => {
      const [p, q] = [a.cells[column], b.cells[column]];
      if (p === null || q === null) return (p === null) - (q === null); // missing values last in either direction
      return sign * (column === 0 ? p.localeCompare(q, "en", { numeric: true }) : p - q);
    });
    body.append(...rows.map((row) => row.line));
    [...head.querySelectorAll("th")].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending"); else cell.removeAttribute("aria-sort");
    });
  }
  function filter(text) {
    const wanted = text.trim().toLowerCase();
    for (const row of rows) row.line.hidden = !row.name.toLowerCase().includes(wanted);
    stop();
  }
  const rowsShown = () => rows.filter((row) => !row.line.hidden && row.place >= 0).map((row) => row.line.querySelector("button"));
  // The table is one tab stop, also where the gene that was it is filtered out.
  function stop() {
    const now = head.parentElement.querySelector("button[tabindex='0']");
    if (now && !now.closest("tr").hidden) return;
    if (now) now.tabIndex = -1;
    (rowsShown()[0] ?? head.querySelector("button")).tabIndex = 0;
  }
  // Arrows, Home and End move within the table.
  function moves() {
    const grid = () => [[...head.querySelectorAll("button")], ...rowsShown().map((button) => [button])];
    const table = head.parentElement;
    table.addEventListener("focusin", (event) => {
      table.querySelectorAll("button[tabindex='0']").forEach((button) => { button.tabIndex = -1; });
      event.target.tabIndex = 0;
    });
    table.addEventListener("keydown", (event) => {
      const all = grid(), down = all.findIndex((line) => line.includes(event.target)), across = all[down]?.indexOf(event.target) ?? -1;
      const to = { ArrowDown: [down + 1, 0], ArrowUp: [down - 1, 0], Home: [0, 0], End: [all.length - 1, 0], ArrowLeft: [down, across - 1], ArrowRight: [down, across + 1] }[event.key];
      const button = to && down >= 0 && all[to[0]]?.[to[1]];
      if (!to) return;
      event.preventDefault();
      if (button) button.focus();
    });
  }
  function mark(gene) {
    for (const row of rows) {
      const chosen = row.place === gene;
      row.line.classList.toggle("chosen", chosen);
      row.line.querySelector("button").setAttribute("aria-pressed", String(chosen));
    }
  }

  function start() {
    head.append(element("tr", {}, ...columns.map((column, i) => element("th", { scope: "col", class: i ? "n" : "" },
      element("button", { type: "button", tabindex: -1, title: column.title, onclick: () => sort(i) }, column.label)))));
    for (const row of rows) row.line = line(row);
    arrange();
    moves();
    stop();
    document.getElementById("filter").addEventListener("input", (event) => filter(event.target.value));
  }
  return { start, mark, first: () => rows.find((row) => row.place >= 0 && row.predictable) ?? rows.find((row) => row.place >= 0) };
})();
