// The Training tab: the curves, alarms, verdicts and previews that the run of a model left behind.
"use strict";

explorer.tabs.training = (function () {
  const element = explorer.element;
  const LOGARITHMIC_FROM = 50; // times the least value
  let training = null;

  function drawPanel(panel) {
    const card = explorer.make("div", { class: "card" });
    const title = panel.unit ? `${panel.title} (${panel.unit})` : panel.title;
    const plot = explorer.make("div", { class: "panel-plot", role: "img", "aria-label": title });
    card.append(explorer.make("h2", {}, title), plot);
    element("training-panels").append(card);
    const values = panel.series.flatMap((series) => series.values).filter((value) => value !== null);
    const least = values.reduce((a, b) => Math.min(a, b), Infinity);
    const logarithmic = least > 0 && values.some((value) => value > LOGARITHMIC_FROM * least);
    const traces = panel.series.map((series, index) => ({
      type: "scatter", mode: "lines", name: series.name, x: series.steps, y: series.values,
      line: { width: 2, dash: ["solid", "dash", "dot", "dashdot"][index % 4], color: explorer.labelColor(index) },
    }));
    const base = explorer.plotLayout();
    const layout = {
      ...base, hovermode: "x unified", showlegend: panel.series.length > 1, height: 230,
      margin: { l: 52, r: 10, t: 8, b: 30 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, dragmode: false,
      xaxis: { ...base.xaxis, tickformat: "~s", nticks: 6 },
      yaxis: { ...base.yaxis, ...(logarithmic ? { type: "log", dtick: 1 } : { nticks: 6 }), automargin: true },
      hoverlabel: { bgcolor: explorer.color("surface"), font: { color: explorer.color("ink") } },
    };
    return Plotly.newPlot(plot, traces, layout, { displayModeBar: false, responsive: true });
  }

  function drawPanels() {
    for (const plot of document.querySelectorAll("#training-panels .panel-plot")) Plotly.purge(plot);
    element("training-panels").replaceChildren();
    if (training && !element("panel-training").hidden) training.panels.forEach(drawPanel);
  }

  function finding(status, head, text) {
    const item = explorer.make("li", { class: status });
    item.append(explorer.make("strong", {}, head), ` ${text}`);
    return item;
  }

  function showFindings() {
    const found = [
      ...training.alarms.map(({ step, text }) => finding("alarm", `Step ${step.toLocaleString("en")}.`, text)),
      ...training.verdicts.map(({ name, status, text }) =>
        finding(status, `${name.replaceAll("_", " ")} (${status}).`, text)),
    ];
    const nothing = explorer.make("li", {}, "No alarm while training; no health report of these weights.");
    element("training-findings").replaceChildren(...(found.length ? found : [nothing]));
  }

  function showPreview() {
    const { step } = training.previews[Number(element("preview-step").value)];
    explorer.showImage(element("preview"), explorer.source.preview(explorer.state.active, step));
    element("preview-text").textContent = `held-out images through the model, step ${step.toLocaleString("en")}`;
    element("preview-step").setAttribute("aria-valuetext", `step ${step}`);
  }

  function showTraining() {
    element("training-body").hidden = !training;
    const model = explorer.model(explorer.state.active);
    if (!training) {
      element("training-lead").textContent =
        `${model.name} comes without the run that trained it. Give the directory of a train-vae run as MODEL, and ` +
        "its curves, alarms and previews are here.";
      return;
    }
    element("training-lead").textContent =
      `How ${model.name} was trained: both parts of the loss, the rate and what steered it.`;
    showFindings();
    element("preview-card").hidden = !training.previews.length;
    if (training.previews.length) {
      element("preview-step").max = training.previews.length - 1;
      element("preview-step").value = training.previews.length - 1;
      showPreview();
    }
    drawPanels();
  }

  async function use() {
    const key = explorer.state.active;
    const found = explorer.model(key).training ? await explorer.source.training(key) : null;
    if (key !== explorer.state.active) return;
    training = found;
    showTraining();
  }

  return {
    async start() {
      element("preview-step").addEventListener("input", showPreview);
      explorer.themeListeners.push(drawPanels);
      await use();
    },
    modelChanged: use,
    show: drawPanels,
    hide: () => {},
  };
})();
