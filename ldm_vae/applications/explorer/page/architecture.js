// The Architecture tab: the stages of the model as a flow, and what one image really is at each of them.
"use strict";

explorer.tabs.architecture = (function () {
  const element = explorer.element;
  const state = { stage: null, seed: 0, stages: [] };

  const count = () => explorer.state.description.images.count;
  const plain = () => explorer.isPlain(explorer.model(explorer.state.active));

  function question() {
    return {
      index: Math.min(Math.max(0, Math.round(Number(element("architecture-image").value)) || 0), count() - 1),
      stage: state.stage, seed: state.seed,
      noise: Number(element("noise").value), sample: element("sample-toggle").checked,
    };
  }

  const activations = explorer.newest(
    ({ key, ...asked }, signal) => explorer.source.activation(key, asked, signal),
    (activation, { stage }) => showActivation(activation, stage),
  );
  const outputs = explorer.newest(
    ({ key, ...asked }, signal) => explorer.source.reconstruction(key, asked, { slot: "architecture", signal }),
    (picture) => explorer.drawPicture(element("architecture-output"), picture),
  );

  function ask() {
    const asked = { key: explorer.state.active, ...question() };
    const original = explorer.source.image(asked.index);
    if (element("architecture-original").getAttribute("src") !== original) {
      explorer.showImage(element("architecture-original"), original);
    }
    const { stage, ...rest } = asked;
    if (stage) activations.ask(asked);
    outputs.ask(rest);
  }

  // Which part of the model a stage belongs to, from its place around the first latent one.
  function partOf(stages, index) {
    const latent = (name) => /^(mu|mean|sigma|deviation|sample|codes?|quanti[sz]ed|latents?)\b/.test(name);
    const name = stages[index].name;
    if (/^(input|output)\b/.test(name)) return "picture";
    if (latent(name)) return "latent";
    return index < stages.findIndex((stage) => latent(stage.name)) ? "encoder" : "decoder";
  }

  // A block as high as the picture is (in doublings) and as wide as it has channels.
  function block([channels, height = 1]) {
    const shape = explorer.make("span", { class: "block", "aria-hidden": "true" });
    shape.style.height = `${12 + 9 * Math.log2(Math.max(height, 1))}px`;
    shape.style.width = `${8 + 5 * Math.log2(Math.max(channels, 1))}px`;
    return shape;
  }

  function drawStages() {
    const most = Math.max(...state.stages.map((stage) => stage.gmacs || 0), 1e-12);
    const buttons = state.stages.map((stage, index) => {
      const part = partOf(state.stages, index);
      const button = explorer.make("button", { class: `stage-button ${part}`, "data-stage": stage.name });
      const cost = explorer.make("span", { class: "cost", "aria-hidden": "true" });
      cost.style.width = `${100 * (stage.gmacs || 0) / most}%`;
      const holder = explorer.make("span", { class: "blocks" });
      holder.append(block(stage.shape_out));
      button.append(
        holder, explorer.make("span", { class: "stage-title" }, stage.title),
        explorer.make("span", { class: "stage-shape" }, stage.shape_out.join("×")), cost,
      );
      button.addEventListener("click", () => { choose(stage.name); ask(); });
      return button;
    });
    element("stages").replaceChildren(...buttons);
  }

  function choose(name) {
    state.stage = name;
    for (const button of element("stages").children) {
      button.setAttribute("aria-pressed", String(button.dataset.stage === name));
    }
  }

  function showActivation(activation, name) {
    const stage = state.stages.find((one) => one.name === name);
    if (!stage) return;
    const image = element("activation");
    image.dataset.stage = name;
    explorer.showImage(image, activation.picture);
    element("activation-title").textContent = stage.title;
    element("activation-what").textContent = stage.what;
    const total = (field) => state.stages.reduce((sum, one) => sum + (one[field] || 0), 0) || 1;
    const share = (field) => explorer.percent((stage[field] || 0) / total(field));
    const gmacs = stage.gmacs || 0;
    const facts = [
      ["shape in", explorer.shape(stage.shape_in)], ["shape out", explorer.shape(activation.shape)],
      ["parameters", `${explorer.large(stage.parameters || 0)} (${share("parameters")} of all)`],
      ["multiply-adds", `${explorer.large(1e9 * gmacs)} = ${explorer.number(gmacs)} GMACs (${share("gmacs")} of all)`],
      ["values", `mean ${explorer.number(activation.mean)}, deviation ${explorer.number(activation.deviation)}`],
      ["range", `${explorer.number(activation.minimum)} to ${explorer.number(activation.maximum)}`],
    ];
    element("activation-facts").replaceChildren(...facts.flatMap(([term, text]) => [
      explorer.make("dt", {}, term), explorer.make("dd", {}, text),
    ]));
    explorer.announce(`${stage.title}: ${facts[1][1]}, ${facts[4][1]}`);
  }

  function lead() {
    const model = explorer.model(explorer.state.active);
    const sizes = [3, ...model.image_size], values = (shape) => shape.reduce((product, size) => product * size, 1);
    const times = values(sizes) / values(model.latent_shape);
    const change = plain()
      ? "It has no sigma: the encoder names one point, and the decoder gets just that."
      : "The encoder gives a mean (mu) and a deviation (sigma) for every number of the latent; the decoder gets " +
        "a draw from around the mean, or with sampling switched off the mean itself.";
    return `${model.name} (${explorer.kindName(model.kind)}): ${explorer.shape(sizes)} values become ` +
      `${explorer.shape(model.latent_shape)}, ${explorer.number(times)} times fewer, and an image again. ${change}`;
  }

  function showKind() {
    const other = explorer.model(explorer.state.active === "a" ? "b" : "a");
    const toggle = element("kind-toggle"), noisy = !plain();
    element("architecture-lead").textContent = lead();
    for (const id of ["sample-toggle", "noise", "new-seed"]) element(id).disabled = !noisy;
    if (other) toggle.textContent = `Switch to ${other.name} (${explorer.kindName(other.kind)})`;
    else if (element("sample-toggle").checked) toggle.textContent = "As a plain AE: no sampling";
    else toggle.textContent = "As a VAE: sampling";
    toggle.hidden = !other && !noisy;
  }

  function toggleKind() {
    if (explorer.model("b")) explorer.useModel(explorer.state.active === "a" ? "b" : "a");
    else {
      element("sample-toggle").checked = !element("sample-toggle").checked;
      showKind();
      ask();
    }
  }

  async function use() {
    const key = explorer.state.active, answer = await explorer.source.stages(key);
    if (key !== explorer.state.active) return;
    state.stages = answer.stages;
    drawStages();
    const names = state.stages.map((stage) => stage.name);
    choose(names.includes(state.stage) ? state.stage : names[Math.min(1, names.length - 1)]);
    showKind();
    ask();
  }

  return {
    async start() {
      element("architecture-image").max = count() - 1;
      element("architecture-image").addEventListener("input", ask);
      element("architecture-random").addEventListener("click", () => {
        element("architecture-image").value = Math.floor(Math.random() * count());
        ask();
      });
      element("sample-toggle").addEventListener("change", () => { showKind(); ask(); });
      element("noise").addEventListener("input", () => {
        element("noise-text").textContent = element("noise").value;
        ask();
      });
      element("new-seed").addEventListener("click", () => { state.seed += 1; ask(); });
      element("kind-toggle").addEventListener("click", toggleKind);
      await use();
    },
    modelChanged: use,
    hide: () => { activations.cancel(); outputs.cancel(); },
  };
})();
