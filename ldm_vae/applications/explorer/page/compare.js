// The Compare tab: two models on the same images with one cursor, in standard deviations of each model's data.
"use strict";

explorer.tabs.compare = (function () {
  const element = explorer.element;
  const KEYS = ["a", "b"];
  const sides = {};

  function buildSide(key) {
    const model = explorer.model(key);
    const card = explorer.make("div", { class: "card" });
    const head = explorer.make("div", { class: "beside" }), words = explorer.make("div");
    head.append(
      explorer.make("canvas", {
        id: `compare-decoded-${key}`, width: "1", height: "1", role: "img",
        "aria-label": `What ${model.name} decodes there`,
      }),
      words,
    );
    words.append(
      explorer.make("h2", {}, `${model.name} (${explorer.kindName(model.kind)})`),
      explorer.make("p", { class: "share", id: `compare-share-${key}` }),
      explorer.make("p", { class: "note", id: `compare-caption-${key}` }),
    );
    const frame = explorer.make("div", { class: "plot short" });
    frame.append(explorer.make("div", {
      id: `compare-plot-${key}`, tabindex: "0", role: "application",
      "aria-label": `Map of ${model.name}. Arrow keys move the cursor on both maps, Enter locks it, Escape unlocks it.`,
    }));
    card.append(head, frame);
    element("compare-columns").append(card);
  }

  const decodesOf = (key) => explorer.newest(
    ({ x, y }, signal) => explorer.source.decode(key, x, y, { mode: "inverse", slot: `compare-${key}`, signal }),
    ({ picture, nearest }, { x, y }) => {
      const canvas = element(`compare-decoded-${key}`), { data, plot } = sides[key];
      Object.assign(canvas.dataset, { x, y });
      explorer.drawPicture(canvas, picture);
      const caption = [explorer.pointText(x, y)];
      if (nearest !== null && nearest < data.x.length) {
        const point = [data.x[nearest], data.y[nearest]], { spread } = explorer.model(key).plane;
        const away = Math.hypot((x - point[0]) / spread[0], (y - point[1]) / spread[1]);
        plot.setMarks({ nearest: point });
        const name = explorer.labelName(data.label[nearest]);
        caption.push(`nearest image ${explorer.number(away, 2)} deviations away (${name})`);
      }
      element(`compare-caption-${key}`).textContent = caption.join("; ");
    },
  );

  // The cursor of one model in standard deviations of its data, and back in the plane of any model.
  function inDeviations(key, point) {
    const { center, spread } = explorer.model(key).plane;
    return [0, 1].map((axis) => (point[axis] - center[axis]) / (spread[axis] || 1));
  }

  function inPlane(key, deviations) {
    const { center, spread } = explorer.model(key).plane;
    return [0, 1].map((axis) => explorer.rounded(center[axis] + deviations[axis] * (spread[axis] || 1)));
  }

  function follow(from, point, locked) {
    const deviations = inDeviations(from, point);
    for (const key of KEYS) {
      const [x, y] = key === from ? point : inPlane(key, deviations);
      sides[key].plot.setMarks({ cursor: [x, y], pin: locked ? [x, y] : null });
      sides[key].decodes.ask({ x, y });
    }
    const [a, b] = deviations.map((value) => value.toFixed(2).replace("-0.00", "0.00"));
    const text = `${locked ? "Locked at" : "Cursor at"} ${a}, ${b} standard deviations from the middle of each.`;
    element("compare-coordinates").textContent = text;
    explorer.announce(text);
  }

  function unlock() {
    for (const key of KEYS) sides[key].plot.setMarks({ pin: null, path: [] });
  }

  function shareText(key) {
    const measured = explorer.model(key).round_trip;
    if (!measured) return "The round trip is being measured…";
    const within = `within ${explorer.number(measured.tolerance, 2)} standard deviations`;
    const percent = (share) => `${Math.round(100 * share)} %`;
    const holes = Number.isFinite(measured.share_in_holes)
      ? `; in its cells without an image, ${percent(measured.share_in_holes)}` : "";
    return `${percent(measured.share)} of the grid inside the images' outline decodes to images that encode back to ` +
      `where they were (${within})${holes}.`;
  }

  async function showShares() {
    try {
      for (const key of KEYS) {
        element(`compare-share-${key}`).textContent = shareText(key);
        const kind = element("compare-heat").checked ? "errors" : "density";
        sides[key].plot.setBackdrop(await explorer.backdropOf(key, kind, sides[key].data));
      }
    } catch (error) { explorer.failed(error); }
  }

  function lead(a, b) {
    if (explorer.isPlain(a) === explorer.isPlain(b)) {
      return "Two models on the same images. One cursor moves over both, at the same distance from the middle of each.";
    }
    return "The same images, the same cursor. The plain autoencoder was only asked to rebuild its images, and " +
      "nothing says what lies between them; the VAE had to rebuild them from noisy latents too. The numbers say " +
      "how far that went.";
  }

  return {
    async start() {
      if (!explorer.model("b")) {
        element("compare-body").hidden = true;
        element("compare-lead").append(
          "There is one model. Start with a second to see both side by side: ",
          explorer.make("code", {}, "ldm-vae explore MODEL compare=OTHER"),
        );
        return;
      }
      element("compare-lead").textContent = lead(...KEYS.map(explorer.model));
      KEYS.forEach(buildSide);
      const loaded = await Promise.all(KEYS.map(explorer.pointsOf));
      KEYS.forEach((key, index) => {
        const calls = {
          moved: (x, y) => follow(key, [x, y], false), locked: (x, y) => follow(key, [x, y], true),
          unlocked: unlock, drawn: () => {},
        };
        const plot = explorer.planePlot(element(`compare-plot-${key}`), explorer.model(key).plane.bounds, calls);
        sides[key] = { plot, data: loaded[index], decodes: decodesOf(key) };
        plot.setData(loaded[index]);
      });
      const change = (hidden, chosen) => KEYS.forEach((key) => sides[key].plot.setLabels(hidden, chosen));
      explorer.legend(element("compare-legend"), explorer.labelsOf(loaded[0]), change);
      element("compare-heat").addEventListener("change", showShares);
      explorer.themeListeners.push(showShares);
      await showShares();
      follow("a", explorer.model("a").plane.center.map(explorer.rounded), false);
    },
    measured: () => { if (sides.b) showShares(); },
    hide: () => { if (sides.b) KEYS.forEach((key) => sides[key].decodes.cancel()); },
  };
})();
