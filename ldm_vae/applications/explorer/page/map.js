// The Map tab: the plane of one model; the point under the cursor decoded as it moves, locked points, drawn paths.
"use strict";

// Points of a model, loaded once: {x, y, label, id}.
explorer.pointsOf = (function () {
  const loaded = new Map();
  return function (key) {
    if (!loaded.has(key)) {
      const asked = explorer.source.map(key);
      asked.catch(() => loaded.delete(key));
      loaded.set(key, asked);
    }
    return loaded.get(key);
  };
})();

explorer.labelsOf = (data) => [...new Set(data.label)].sort((a, b) => a - b);

// What lies behind the points of a model: "density", "errors" of the round trip (null until measured), or "none".
explorer.backdropOf = async function (key, kind, data) {
  const { plane, round_trip: measured } = explorer.model(key);
  if (kind === "density") return explorer.points.densityBackdrop(data, plane.bounds);
  if (kind === "errors" && measured) return explorer.points.errorBackdrop(await explorer.source.roundTrip(key));
  return null;
};

explorer.pointText = (x, y) => `x ${explorer.number(x, 5)}, y ${explorer.number(y, 5)}`;

explorer.tabs.map = (function () {
  const MOST_PATH_POINTS = 32;
  const element = explorer.element;
  let plot = null, data = null, model = null, locked = null, last = null, drawnPath = [], stripAddress = "";

  const decodes = explorer.newest(
    ({ key, x, y, mode }, signal) => explorer.source.decode(key, x, y, { mode, slot: "map", signal }),
    ({ picture, nearest }, { x, y }) => {
      const canvas = element("map-decoded");
      Object.assign(canvas.dataset, { x, y });
      explorer.drawPicture(canvas, picture);
      showNearest(nearest, x, y);
    },
  );
  const paths = explorer.newest(
    ({ points, frames }, signal) => explorer.source.path(model.key, points, frames, signal),
    (address, { points, frames }) => {
      if (stripAddress.startsWith("blob:")) URL.revokeObjectURL(stripAddress);
      stripAddress = address;
      element("path-card").hidden = false;
      explorer.showImage(element("path-strip"), address);
      Object.assign(element("path-strip").style, { minWidth: `${48 * frames}px`, maxWidth: `${160 * frames}px` });
      element("path-text").textContent = `${frames} frames along a path through ${points.length} points.`;
      explorer.announce(element("path-text").textContent);
    },
  );

  function showNearest(index, x, y) {
    if (index === null || index === undefined || !(index < data.x.length)) return;
    const point = [data.x[index], data.y[index]];
    const name = explorer.labelName(data.label[index]);
    const distance = explorer.number(Math.hypot(x - point[0], y - point[1]), 2);
    plot.setMarks({ nearest: point });
    const image = element("map-nearest");
    if (image.dataset.index !== String(index)) {
      image.dataset.index = index;
      explorer.showImage(image, explorer.source.image(index));
      image.hidden = false;
    }
    image.alt = `The nearest image: ${name}, ${data.id[index]}`;
    element("map-nearest-text").textContent = `nearest: ${name} (${data.id[index]}), ${distance} away`;
    explorer.announce(`${explorer.pointText(x, y)}. Nearest image: ${name}.`);
  }

  function decode(x, y) {
    last = [x, y];
    element("map-coordinates").textContent = explorer.pointText(x, y);
    decodes.ask({ key: model.key, x, y, mode: element("map-mode").value });
  }

  function lock(x, y) {
    locked = [x, y];
    element("map-lock").textContent = `Locked at ${explorer.pointText(x, y)}.`;
    const hash = `#map?x=${x}&y=${y}&mode=${element("map-mode").value}&model=${model.key}`;
    element("map-share").href = hash;
    element("map-share").hidden = element("map-unlock").hidden = false;
    history.replaceState(null, "", hash);
    decode(x, y);
  }

  function unlock() {
    if (locked) history.replaceState(null, "", "#map");
    locked = null;
    element("map-lock").textContent = "";
    element("map-share").hidden = element("map-unlock").hidden = true;
    element("path-card").hidden = true;
    drawnPath = [];
    paths.cancel();
  }

  // A drawn line has hundreds of points: as many as the server takes, evenly along its length.
  function thinned(points) {
    if (points.length <= MOST_PATH_POINTS) return points;
    const lengths = [0];
    for (let index = 1; index < points.length; index += 1) {
      const [a, b] = [points[index - 1], points[index]];
      lengths.push(lengths[index - 1] + Math.hypot(b[0] - a[0], b[1] - a[1]));
    }
    const whole = lengths[lengths.length - 1];
    return Array.from({ length: MOST_PATH_POINTS }, (_, step) => {
      const wanted = whole * step / (MOST_PATH_POINTS - 1);
      const after = Math.max(1, lengths.findIndex((length) => length >= wanted));
      const span = lengths[after] - lengths[after - 1] || 1, share = (wanted - lengths[after - 1]) / span;
      const from = points[after - 1], to = points[after];
      return [0, 1].map((axis) => explorer.rounded(from[axis] + share * (to[axis] - from[axis])));
    });
  }

  function follow(points) {
    drawnPath = points;
    if (points.length < 2) return;
    const frames = Math.min(24, Math.max(2, Math.round(Number(element("map-frames").value)) || 12));
    paths.ask({ points: thinned(points), frames });
  }

  async function showBackdrop() {
    try {
      const wanted = model.key, backdrop = await explorer.backdropOf(wanted, element("map-background").value, data);
      if (wanted === model.key) plot.setBackdrop(backdrop);
    } catch (error) { explorer.failed(error); }
  }

  function planeNote({ plane, latent_shape: shape }) {
    if (plane.kind === "latent") {
      return "The plane is the latent space itself: the two numbers are all that the decoder gets.";
    }
    const [first, second] = plane.explained;
    return `A plane through ${explorer.shape(shape)} latents: the two directions of most variance, ` +
      `${explorer.percent(first)} and ${explorer.percent(second)} of all. The rest is set to its mean, so pictures ` +
      "decoded here are blurred averages; nearest images are real ones.";
  }

  // Whether the model is shown now: another one may have been chosen while its points were on their way.
  async function use(key) {
    const points = await explorer.pointsOf(key);
    if (key !== explorer.state.active) return false;
    model = explorer.model(key);
    data = points;
    element("map-plane-note").textContent = planeNote(model);
    element("map-lead").textContent =
      `${data.x.length.toLocaleString("en")} images as the ${explorer.kindName(model.kind)} sees them, colored by ` +
      "label. Every place on the map decodes to a picture: move, and watch it change.";
    const calls = { moved: decode, locked: lock, unlocked: unlock, drawn: follow };
    if (!plot) plot = explorer.planePlot(element("map-plot"), model.plane.bounds, calls);
    else plot.setBounds(model.plane.bounds);
    plot.setMarks({ nearest: null, pin: null, path: [], cursor: null });
    plot.setLabels(new Set(), null);
    plot.setData(data);
    explorer.legend(element("map-legend"), explorer.labelsOf(data), (hidden, chosen) => plot.setLabels(hidden, chosen));
    await showBackdrop();
    return true;
  }

  function begin() {
    const middle = model.plane.center.map(explorer.rounded);
    plot.setMarks({ cursor: middle });
    decode(...middle);
  }

  // Where a link points to.
  function place(parameters) {
    const x = parseFloat(parameters.get("x")), y = parseFloat(parameters.get("y"));
    if (!Number.isFinite(x) || !Number.isFinite(y)) return;
    if (["inverse", "nearest"].includes(parameters.get("mode"))) element("map-mode").value = parameters.get("mode");
    plot.setMarks({ cursor: [x, y], pin: [x, y] });
    lock(x, y);
  }

  return {
    async start(parameters) {
      element("map-mode").addEventListener("change", () => {
        const inverse = element("map-mode").value === "inverse";
        element("map-decoded-caption").textContent = inverse ? "decoded at the cursor" : "nearest image, decoded";
        if (locked) lock(...locked);
        else if (last) decode(...last);
      });
      element("map-background").addEventListener("change", showBackdrop);
      element("map-frames").addEventListener("change", () => follow(drawnPath));
      element("map-unlock").addEventListener("click", () => { plot.setMarks({ pin: null, path: [] }); unlock(); });
      element("map-path").addEventListener("click", (event) => {
        const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
        event.currentTarget.setAttribute("aria-pressed", String(on));
        plot.setDrawing(on);
      });
      explorer.themeListeners.push(showBackdrop);
      if (!await use(explorer.state.active)) return;
      begin();
      place(parameters);
    },
    async modelChanged() {
      unlock();
      if (await use(explorer.state.active)) begin();
    },
    place,
    measured: () => showBackdrop(),
    hide: () => decodes.cancel(),
  };
})();
