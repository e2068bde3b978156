"use strict";
// Draws the figures and answers the buttons above the curves. Colours are the style sheet's, so no theme is known here.
(function () {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const state = { x: "step", y: "log", start: false, arms: null };
  const views = {};
  const font = '"Helvetica Neue", Arial, sans-serif';
  const config = {
    background: null,
    font: font,
    view: { stroke: null },
    axis: {
      labelColor: "var(--ink-2)", labelFontSize: 12,
      titleColor: "var(--ink-2)", titleFontSize: 12, titleFontWeight: "normal",
      gridColor: "var(--rule)", domainColor: "var(--rule)", tickColor: "var(--rule)", titlePadding: 10,
    },
    axisY: { domain: false, ticks: false, labelPadding: 8 },
    text: { fontSize: 12 },
    aria: false,
  };

  function chosen(key) {
    const spec = structuredClone(specs[key]);
    const encoding = spec.encoding;
    if (!encoding.color) return spec; // a forest: nothing to choose
    encoding.x.field = state.x;
    encoding.x.title = state.x === "step" ? "optimizer step" : "tokens";
    const scale = encoding.y.scale;
    if (scale.type && state.y === "linear") Object.assign(scale, { type: "linear", zero: false });
    if (state.start) delete scale.domainMax;
    if (state.arms) spec.params[0].value = state.arms;
    return spec;
  }

  async function draw(key) {
    const place = document.getElementById("chart-" + key).firstElementChild;
    place.setAttribute("aria-hidden", "true"); // the figure is told in the words around it, not mark by mark
    const drawn = await vegaEmbed(place, chosen(key), {
      actions: false, renderer: "svg", ast: true, config: config, tooltip: { theme: "page" },
    });
    views[key] = drawn.view;
  }

  function redraw() {
    return Promise.all(Object.keys(specs).filter((key) => specs[key].encoding.color).map(draw));
  }

  function pressed(button, on) {
    button.setAttribute("aria-pressed", String(on));
  }

  document.querySelector(".controls").hidden = false;
  document.documentElement.classList.add("scripted");
  const arms = [...document.querySelectorAll("[data-arm]")];
  for (const button of arms) {
    button.addEventListener("click", function () {
      pressed(button, button.getAttribute("aria-pressed") !== "true");
      state.arms = arms.filter((one) => one.getAttribute("aria-pressed") === "true").map((one) => one.dataset.arm);
      for (const key in views) if (specs[key].encoding.color) views[key].signal("shown", state.arms).runAsync();
    });
  }
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", function () {
      const { choice, value } = button.dataset;
      state[choice] = value;
      for (const one of document.querySelectorAll(`[data-choice="${choice}"]`)) pressed(one, one === button);
      redraw();
    });
  }
  const start = document.querySelector("[data-start]");
  start.addEventListener("click", function () {
    state.start = !state.start;
    pressed(start, state.start);
    redraw();
  });
  Promise.all(Object.keys(specs).map(draw)).then(() => (document.documentElement.dataset.drawn = ""));
})();
