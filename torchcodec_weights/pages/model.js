"use strict";
const layers = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const bars = [...document.querySelectorAll("#bits .bars a")];
const dots = [...document.querySelectorAll("#snr .dot")];
const rows = [...document.querySelectorAll("#weights tbody tr")];
const side = 1000;
let chosen = -1;

function outline(heights, closed) {
  const width = side / heights.length;
  let path = `M0 ${side}`;
  heights.forEach((height, bin) => {
    const y = (side * (1 - height / 255 * 0.97)).toFixed(1);
    path += `L${(bin * width).toFixed(1)} ${y}L${((bin + 1) * width).toFixed(1)} ${y}`;
  });
  return path + `L${side} ${side}` + (closed ? "Z" : "");
}

function draw(layer) {
  byId("histogram").hidden = !layer.after;
  byId("none").hidden = Boolean(layer.after);
  if (!layer.after) return;
  const svg = byId("histogram").querySelector("svg");
  svg.replaceChildren();
  const add = (kind, path) => {
    const element = document.createElementNS(svg.namespaceURI, "path");
    element.setAttribute("class", kind);
    element.setAttribute("d", path);
    svg.append(element);
  };
  add("grid", `M0 ${side}L${side} ${side}`);
  for (const [place] of layer.ticks) add("grid", `M${place * side} 0L${place * side} ${side}`);
  add("after", outline(layer.after, true));
  if (layer.before) add("before", outline(layer.before, false));
  byId("before").hidden = !layer.before;
  byId("missing").hidden = Boolean(layer.before);
  byId("ends").replaceChildren(...layer.ticks.map(([place, text]) => {
    const label = document.createElement("span");
    label.className = "x" + (place < 0.02 ? " first" : place > 0.98 ? " last" : "");
    label.style.left = `${100 * place}%`;
    label.textContent = text;
    return label;
  }));
}

function choose(index, focus) {
  index = Math.max(0, Math.min(layers.length - 1, index));
  for (const list of [bars, dots, rows]) {
    if (chosen >= 0) list[chosen].classList.remove("selected");
    list[index].classList.add("selected");
  }
  // One stop of the Tab key; the arrows go on from there.
  bars.forEach((bar, number) => {
    bar.setAttribute("tabindex", number === index ? "0" : "-1");
    bar.setAttribute("aria-current", number === index);
  });
  chosen = index;
  const layer = layers[index];
  byId("layer").hidden = false;
  byId("name").replaceChildren(...layer.name.split(".").flatMap((part, place) =>
    place ? [".", document.createElement("wbr"), part] : [part]));
  byId("facts").replaceChildren(...layer.facts.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(document.createElement("dt"), document.createElement("dd"));
    row.children[0].textContent = name;
    row.children[1].textContent = value;
    return row;
  }));
  draw(layer);
  const picture = byId("picture");
  picture.hidden = !layer.picture;
  if (layer.picture) {
    const image = picture.querySelector("img");
    [image.src, image.alt] = layer.picture;
    picture.querySelector("figcaption").textContent = layer.picture[1];
  }
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === layers.length - 1;
  if (focus) bars[index].focus({preventScroll: true});
}

if (layers.length) {
  // Bars may be narrower than a finger: the nearest one counts, in both charts.
  for (const plot of document.querySelectorAll("#bits .plot, #snr .plot")) {
    plot.addEventListener("click", (event) => {
      event.preventDefault();
      const box = plot.getBoundingClientRect();
      choose(Math.floor((event.clientX - box.left) / box.width * layers.length), true);
    });
  }
  document.querySelector("#bits .plot").addEventListener("keydown", (event) => {
    const steps = {ArrowLeft: -1, ArrowRight: 1, Home: -layers.length, End: layers.length};
    if (event.key in steps) choose(chosen + steps[event.key], true);
    else if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
  });
  rows.forEach((row, index) => row.querySelector("a").addEventListener("click", (event) => {
    event.preventDefault();
    choose(index, false);
    byId("bits").scrollIntoView();
  }));
  byId("previous").addEventListener("click", () => choose(chosen - 1, false));
  byId("next").addEventListener("click", () => choose(chosen + 1, false));
  const linked = /^#w(\d+)$/.exec(location.hash);
  choose(linked ? Number(linked[1]) : 0, false);
}
