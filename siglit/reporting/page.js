"use strict";
for (const svg of document.querySelectorAll("svg[data-curve]")) {
  const { series } = JSON.parse(svg.dataset.curve);
  const legend = svg.parentElement.querySelector(".legend");
  const read = svg.parentElement.querySelector(".read");
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 10);
  cursor.setAttribute("y2", 166);
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a));
    const found = series.map((line) => [line.name, nearest(line.points)]);
    cursor.setAttribute("x1", found[0][1][2]);
    cursor.setAttribute("x2", found[0][1][2]);
    svg.append(cursor);
    read.textContent = found
      .map(([name, point]) => `${name} ${number.format(point[1])} at step ${number.format(point[0])}`)
      .join(" · ");
    read.hidden = false;
    legend.hidden = true;
  };
  const leave = () => {
    cursor.remove();
    read.hidden = true;
    legend.hidden = false;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", leave);
}

const gallery = document.querySelector("#gallery");
if (gallery) {
  const buttons = [...gallery.querySelectorAll("button[data-show]")];
  const words = gallery.querySelector("input");
  const queries = [...gallery.querySelectorAll(".query")];
  const filter = () => {
    const wanted = buttons.find((button) => button.ariaPressed === "true").dataset.show;
    const text = words.value.trim().toLowerCase();
    for (const query of queries) {
      const fits = wanted === "all" || query.dataset.found === wanted;
      query.hidden = !fits || !query.dataset.text.toLowerCase().includes(text);
    }
    const shown = queries.filter((query) => !query.hidden).length;
    gallery.querySelector("output").textContent = `${shown} of ${queries.length} queries`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.ariaPressed = String(other === button);
      filter();
    });
  }
  words.addEventListener("input", filter);
  filter();
}
