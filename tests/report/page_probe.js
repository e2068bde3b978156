// What the tests ask of the page in a browser. An expression: evaluated, it is an object of functions.
({
  // every text on the page that is less readable than WCAG 2.2 AA asks (1.4.3): [text, ratio]
  faint() {
    const channels = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => {
      const [x, y, z] = [r, g, b].map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
      for (; element; element = element.parentElement) {
        const colour = channels(getComputedStyle(element).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
      }
      return [255, 255, 255];
    };
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = texts.nextNode(); node; node = texts.nextNode()) {
      const element = node.parentElement, box = element.getBoundingClientRect(), style = getComputedStyle(element);
      if (!node.data.trim() || !box.width || !box.height || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
      const ink = light(channels(element.ownerSVGElement ? style.fill : style.color)), paper = light(behind(element));
      const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      if (!(ratio >= (large ? 3 : 4.5))) found.push([node.data.trim().slice(0, 40), ratio]);
    }
    return found;
  },
  // of each figure: its size, marks with a shape, rows of its table
  figures() {
    return [...document.querySelectorAll("figure.chart")].map((figure) => {
      const svg = figure.querySelector(".drawing svg"), box = svg && svg.getBoundingClientRect();
      const paths = (kind) => (svg ? [...svg.querySelectorAll(kind)] : []);
      const shaped = (kind) => paths(kind).filter((path) => (path.getAttribute("d") || "").length > 4);
      return {
        key: figure.querySelector(".drawing").id, width: box ? box.width : 0, height: box ? box.height : 0,
        inside: box ? box.right <= document.documentElement.clientWidth && box.left >= 0 : false,
        lines: shaped(".mark-line path").length, points: shaped(".mark-symbol path").length,
        rows: figure.querySelectorAll("tbody tr").length,
      };
    });
  },
  // elements that reach out of the page sideways, but for what scrolls in a region of its own
  sticking_out() {
    return [...document.body.querySelectorAll("*")]
      .filter((element) => !element.closest(".scroll, .skip, svg"))
      .filter((element) => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
      .map((element) => element.outerHTML.slice(0, 80));
  },
  colour(name) {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  },
})
