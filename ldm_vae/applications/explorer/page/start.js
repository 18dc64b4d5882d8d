// Begins the page: what the source describes, the tabs with their keys and addresses, and which model is looked at.
"use strict";

(function () {
  const element = explorer.element;
  const MEASURING_SECONDS = 2;
  const started = new Set(), stale = new Set();
  let current = null;

  const buttons = () => explorer.source.tabs.map((name) => element(`tab-${name}`));

  function fromHash() {
    const [name, query = ""] = location.hash.slice(1).split("?");
    const { tabs } = explorer.source;
    return { name: tabs.includes(name) ? name : tabs[0], parameters: new URLSearchParams(query) };
  }

  async function show(name, parameters = new URLSearchParams()) {
    if (name === current) return;
    if (current) explorer.tabs[current].hide();
    current = name;
    explorer.say("");
    for (const tab of explorer.source.tabs) {
      const chosen = tab === name;
      element(`panel-${tab}`).hidden = !chosen;
      element(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
      element(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    }
    element("model-choice").hidden = !explorer.model("b") || name === "compare";
    await entered(name, parameters);
  }

  async function entered(name, parameters) {
    const tab = explorer.tabs[name];
    try {
      if (!started.has(name)) {
        started.add(name);
        await tab.start(parameters);
      } else if (stale.delete(name)) await tab.modelChanged();
      else if (tab.show) tab.show();
    } catch (error) { explorer.failed(error); }
  }

  function openTab(name) {
    history.replaceState(null, "", `#${name}`);
    show(name);
  }

  function onTabKey(event) {
    const all = buttons(), place = all.indexOf(event.target);
    const goal = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
    if (goal === undefined || place < 0) return;
    event.preventDefault();
    const next = (goal + all.length) % all.length;
    all[next].focus();
    openTab(explorer.source.tabs[next]);
  }

  // Every tab that has begun looks at the model again: the open one now, the others when they are opened.
  explorer.useModel = function (key) {
    explorer.state.active = key;
    element("model").value = key;
    for (const name of started) if (explorer.tabs[name].modelChanged && name !== current) stale.add(name);
    if (explorer.tabs[current].modelChanged) explorer.tabs[current].modelChanged().catch(explorer.failed);
  };

  function describe() {
    const { models, images } = explorer.state.description;
    element("title").textContent = models.map((model) => model.name).join(" and ");
    document.title = `${element("title").textContent} · ldm-vae explorer`;
    const latents = [...new Set(models.map((model) => `${explorer.shape(model.latent_shape)} latents`))]
      .map((text) => text.replaceAll(" ", "\u00a0")); // not broken in the middle
    element("subtitle").textContent = [
      ...models.map((model) => `${explorer.kindName(model.kind)} of ${explorer.large(model.parameters)} parameters`),
      ...latents, `${images.count.toLocaleString("en")} images`,
    ].join(" · ");
    element("model").replaceChildren(...models.map((model) =>
      explorer.make("option", { value: model.key }, `${model.name} (${explorer.kindName(model.kind)})`)));
    element("model").addEventListener("change", (event) => explorer.useModel(event.target.value));
  }

  async function awaitMeasurements() {
    while (explorer.state.description.models.some((model) => !model.round_trip)) {
      await new Promise((resolve) => setTimeout(resolve, 1000 * MEASURING_SECONDS));
      explorer.state.description = await explorer.source.describe();
      for (const name of started) if (explorer.tabs[name].measured) explorer.tabs[name].measured();
    }
  }

  async function begin() {
    for (const button of element("tabs").children) {
      const name = button.id.slice("tab-".length);
      button.hidden = !explorer.source.tabs.includes(name);
      button.addEventListener("click", () => openTab(name));
    }
    element("tabs").addEventListener("keydown", onTabKey);
    try {
      explorer.state.description = await explorer.source.describe();
    } catch (error) {
      explorer.failed(error);
      return;
    }
    describe();
    const { name, parameters } = fromHash();
    const linked = parameters.get("model");
    if (explorer.model(linked)) explorer.state.active = element("model").value = linked;
    window.addEventListener("hashchange", () => {
      const to = fromHash();
      if (to.name !== current) show(to.name, to.parameters);
      else if (explorer.tabs[current].place) explorer.tabs[current].place(to.parameters);
    });
    await show(name, parameters);
    awaitMeasurements().catch(explorer.failed);
  }

  begin();
})();
