// Where the page gets everything from: `explorer.source`, here the server of `ldm-vae explore`. The self-contained
// export puts another object with the same functions in its place; no other file knows addresses.
//
//   tabs                                          names of the tabs that this source can serve
//   describe() -> description                     models, images, channels, directions (see /api/explorer)
//   map(model) -> {x, y, label, id}               lists of one length, in plane units
//   roundTrip(model) -> {share, share_in_holes, tolerance, grid, bounds, errors, inside}     rows: y ascending
//   decode(model, x, y, {mode, slot, signal}) -> {picture, nearest}   picture: ImageBitmap or canvas
//   image(index) -> address of a picture          path(model, points, frames, signal) -> address of the strip
//   reconstruction(model, {index, noise, sample, seed, channels, directions}, {slot, signal}) -> picture
//   stages(model), activation(model, {index, stage, noise, sample, seed}, signal), training(model)
//   preview(model, step) -> address of a picture
//
// Failures are Errors whose message is a sentence for people; "StaleError": the server had a newer question.
"use strict";

explorer.source = (function () {
  const page = Math.random().toString(36).slice(2, 12);
  let sequence = 0;

  function address(path, parameters = {}) {
    const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== "");
    return given.length ? `api/${path}?${new URLSearchParams(given)}` : `api/${path}`;
  }

  async function get(path, parameters, signal) {
    let response;
    try {
      response = await fetch(address(path, parameters), { signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer: is `ldm-vae explore` still running?");
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({}));
    const error = new Error(answer.error || `The server answered ${response.status}.`);
    if (response.status === 409) error.name = "StaleError";
    throw error;
  }

  const json = async (path, parameters, signal) => (await get(path, parameters, signal)).json();

  // One session a slot: the server keeps only the newest question of each, and two plots ask side by side.
  const ordered = (slot) => ({ session: `${page}-${slot}`, sequence: (sequence += 1) });

  // Neither color management nor alpha may touch a value: the canvas shows the bytes of the decoder.
  const bitmap = async (response) =>
    createImageBitmap(await response.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });

  const pairs = (amounts) => Object.entries(amounts || {}).map(([name, amount]) => `${name}:${amount}`).join(",");

  return {
    tabs: ["map", "compare", "architecture", "sliders", "training"],
    describe: () => json("explorer"),
    map: (model) => json("map", { model }),
    roundTrip: (model) => json("round_trip", { model }),
    image: (index) => address("image", { index }),
    stages: (model) => json("stages", { model }),
    training: (model) => json("training", { model }),
    preview: (model, step) => address("preview", { model, step }),

    async decode(model, x, y, { mode, slot, signal } = {}) {
      const response = await get("decode", { model, x, y, mode, ...ordered(slot || "map") }, signal);
      const nearest = response.headers.get("X-Nearest");
      return { picture: await bitmap(response), nearest: nearest === null ? null : Number(nearest) };
    },

    async path(model, points, frames, signal) {
      const text = points.map(([x, y]) => `${x},${y}`).join(";");
      return URL.createObjectURL(await (await get("path", { model, points: text, frames }, signal)).blob());
    },

    async reconstruction(model, { index, noise, sample, seed, channels, directions }, { slot, signal } = {}) {
      const parameters = {
        model, index, noise, sample: sample ? 1 : 0, seed,
        channels: pairs(channels), directions: pairs(directions), ...ordered(slot || "reconstruction"),
      };
      return bitmap(await get("reconstruction", parameters, signal));
    },

    activation: (model, { index, stage, noise, sample, seed }, signal) =>
      json("activation", { model, index, stage, noise, sample: sample ? 1 : 0, seed }, signal),
  };
})();
