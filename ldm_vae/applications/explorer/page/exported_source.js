// `explorer.source` of an exported page: the same functions as source.js, answered from the page itself. The data is
// in the element #exported, written by ldm_vae/applications/explorer/export.py; points are decoded by decoder.js.
//
// Only the tabs that need no encoder are here: Map, and Compare where there are two models.
"use strict";

explorer.source = (function () {
  const data = JSON.parse(explorer.element("exported").textContent);
  const decoders = {};
  const latents = {};
  for (const [model, description] of Object.entries(data.decoders)) {
    decoders[model] = new explorer.Decoder(description);
    latents[model] = explorer.floats(description.latents);
  }

  function canvas(width, height) {
    const made = document.createElement("canvas");
    made.width = width;
    made.height = height;
    return made;
  }

  const sprite = new Image();
  const ready = new Promise((resolve, reject) => {
    sprite.onload = resolve;
    sprite.onerror = () => reject(new Error("The images of this page cannot be read."));
  });
  sprite.src = data.sprite.address;

  function nearest(model, x, y) {
    const points = data.maps[model];
    let best = null;
    let least = Infinity;
    for (let index = 0; index < points.x.length; index += 1) {
      const distance = (points.x[index] - x) ** 2 + (points.y[index] - y) ** 2;
      if (distance < least) [best, least] = [index, distance];
    }
    return best;
  }

  function latentAt(model, x, y) {
    const { origin, axes } = data.decoders[model];
    return origin.map((value, channel) => value + x * axes[0][channel] + y * axes[1][channel]);
  }

  function latentOf(model, index) {
    const channels = data.decoders[model].origin.length;
    return latents[model].subarray(index * channels, (index + 1) * channels);
  }

  // `count` points at equal distances along the line through `points`, both ends with it.
  function along(points, count) {
    const lengths = points.slice(1).map(([x, y], index) => Math.hypot(x - points[index][0], y - points[index][1]));
    const total = lengths.reduce((sum, length) => sum + length, 0);
    return Array.from({ length: count }, (_, frame) => {
      let rest = (total * frame) / (count - 1);
      let part = 0;
      while (part < lengths.length - 1 && rest >= lengths[part]) rest -= lengths[part++];
      const share = Math.min(1, rest / Math.max(lengths[part], 1e-12));
      return [0, 1].map((axis) => points[part][axis] + share * (points[part + 1][axis] - points[part][axis]));
    });
  }

  return {
    tabs: data.description.models.length > 1 ? ["map", "compare"] : ["map"],
    map: async (model) => data.maps[model],
    roundTrip: async (model) => data.round_trips[model],

    async describe() {
      await ready;
      return data.description;
    },

    async decode(model, x, y, { mode } = {}) {
      const index = nearest(model, x, y);
      const pixels = decoders[model].picture(mode === "nearest" ? latentOf(model, index) : latentAt(model, x, y));
      const picture = canvas(pixels.width, pixels.height);
      picture.getContext("2d").putImageData(pixels, 0, 0);
      return { picture, nearest: index };
    },

    image(index) {
      const { columns, width, height } = data.sprite;
      const picture = canvas(width, height);
      picture.getContext("2d").drawImage(sprite, -(index % columns) * width, -Math.floor(index / columns) * height);
      return picture.toDataURL();
    },

    async path(model, points, frames) {
      const side = decoders[model].side;
      const strip = canvas(side * frames, side);
      along(points, frames).forEach(([x, y], frame) => {
        strip.getContext("2d").putImageData(decoders[model].picture(latentAt(model, x, y)), frame * side, 0);
      });
      return strip.toDataURL();
    },
  };
})();
