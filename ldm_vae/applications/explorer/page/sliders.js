// The Sliders tab: one image beside what becomes of it when channels or attribute directions of its latents move.
"use strict";

explorer.tabs.sliders = (function () {
  const element = explorer.element;
  const MOST_CHANNELS = 32, CHANNEL_REACH = 3, DIRECTION_REACH = 3;

  const count = () => explorer.state.description.images.count;

  const edits = explorer.newest(
    ({ key, ...asked }, signal) => explorer.source.reconstruction(key, asked, { slot: "sliders", signal }),
    (picture) => explorer.drawPicture(element("slider-edited"), picture),
  );

  const ranges = (name) => [...document.querySelectorAll(`#panel-sliders input[data-${name}]`)];

  function amounts(name) {
    const moved = ranges(name).filter((range) => Number(range.value) !== 0);
    return Object.fromEntries(moved.map((range) => [range.dataset[name], Number(range.value)]));
  }

  function ask() {
    const index = Math.min(Math.max(0, Math.round(Number(element("slider-image").value)) || 0), count() - 1);
    const original = explorer.source.image(index);
    const image = element("slider-original");
    if (image.getAttribute("src") !== original) explorer.showImage(image, original);
    const channels = amounts("channel"), directions = amounts("direction");
    const moved = Object.keys(channels).length + Object.keys(directions).length;
    element("slider-caption").textContent = moved ? `decoded, ${moved} moved` : "decoded, nothing moved";
    edits.ask({ key: explorer.state.active, index, noise: 0, sample: false, seed: 0, channels, directions });
  }

  function slider(title, name, value, reach) {
    const label = explorer.make("label", { class: "range" });
    const output = explorer.make("output", {}, "0");
    const range = explorer.make("input", {
      type: "range", min: -reach, max: reach, step: 0.05, value: 0, [`data-${name}`]: value,
    });
    range.addEventListener("input", () => { output.textContent = range.value; ask(); });
    range.addEventListener("dblclick", () => { range.value = 0; output.textContent = "0"; ask(); });
    label.append(explorer.make("span", {}, title), range, output);
    return label;
  }

  function reset() {
    for (const range of [...ranges("channel"), ...ranges("direction")]) {
      range.value = 0;
      range.parentElement.querySelector("output").textContent = "0";
    }
    ask();
  }

  function fill(container, heading, sliders) {
    container.replaceChildren();
    if (sliders.length) container.append(explorer.make("h2", {}, heading), ...sliders);
  }

  function build() {
    const model = explorer.model(explorer.state.active);
    const directions = model.directions ? explorer.state.description.directions : []; // they fit one encoder
    const channels = Array.from({ length: Math.min(model.latent_channels, MOST_CHANNELS) }, (_, index) => index);
    fill(element("channel-sliders"), "Channels",
      channels.map((index) => slider(`channel ${index}`, "channel", index, CHANNEL_REACH)));
    fill(element("direction-sliders"), "Directions",
      directions.map(({ name }) => slider(name, "direction", name, DIRECTION_REACH)));
    const [, height, width] = model.latent_shape;
    element("sliders-lead").textContent =
      (directions.length ? "A direction changes one attribute; a channel " : "A channel ") +
      (height * width > 1 ? `is moved at all ${height} × ${width} positions at once` : "is one number of the latent") +
      ", in standard deviations over the data. A double click on a slider puts it back.";
  }

  return {
    async start() {
      element("slider-image").max = count() - 1;
      element("slider-image").addEventListener("input", ask);
      element("slider-random").addEventListener("click", () => {
        element("slider-image").value = Math.floor(Math.random() * count());
        ask();
      });
      element("slider-reset").addEventListener("click", reset);
      build();
      ask();
    },
    async modelChanged() { build(); ask(); },
    hide: () => edits.cancel(),
  };
})();
