"use strict";
for (const svg of document.querySelectorAll("svg[data-curve]")) {
  const { series } = JSON.parse(svg.dataset.curve);
  const legend = svg.parentElement.querySelector(".legend");
  const readout = svg.parentElement.querySelector(".readout");
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 10);
  cursor.setAttribute("y2", 166);
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a));
    const points = series.map((line) => [line.name, nearest(line.points)]);
    cursor.setAttribute("x1", points[0][1][2]);
    cursor.setAttribute("x2", points[0][1][2]);
    svg.append(cursor);
    readout.textContent = points
      .map(([name, point]) => `${name} ${number.format(point[1])} at step ${number.format(point[0])}`)
      .join(" · ");
    readout.hidden = false;
    legend.hidden = true;
  };
  const hide = () => {
    cursor.remove();
    readout.hidden = true;
    legend.hidden = false;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

const gallery = document.querySelector("#gallery");
if (gallery) {
  const buttons = [...gallery.querySelectorAll("button[data-show]")];
  const words = gallery.querySelector("input");
  const queries = [...gallery.querySelectorAll(".query")];
  const filter = () => {
    const selected = buttons.find((button) => button.ariaPressed === "true").dataset.show;
    const text = words.value.trim().toLowerCase();
    for (const query of queries) {
      const matches = selected === "all" || query.dataset.result === selected;
      query.hidden = !matches || !query.dataset.text.toLowerCase().includes(text);
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
