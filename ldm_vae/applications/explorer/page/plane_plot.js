// One plane that can be touched: plotly's axes, zoom and panning, canvases for points and marks, and a cursor by
// mouse, finger or keys. The map has one, the comparison two. What a point means is the caller's business.
//
//   explorer.planePlot(plotElement, bounds, {moved(x, y), locked(x, y), unlocked(), drawn(points)})
//     -> {setData, setBounds, setBackdrop, setLabels, setMarks, setDrawing}
"use strict";

explorer.planePlot = function (plot, bounds, calls) {
  const MARGIN = { l: 46, r: 12, t: 12, b: 34 };
  const CLICK_PIXELS = 5, KEY_STEP = 1 / 50, ZOOM = 0.7;
  const frame = plot.parentElement;
  const layer = (element, name) => frame.appendChild(explorer.make(element, { class: `plot-${name}` }));
  const canvases = [layer("canvas", "points"), layer("canvas", "marks")], surface = layer("div", "surface");
  const marks = { cursor: null, nearest: null, pin: null, path: [] };
  const shown = { data: { x: [], y: [], label: [] }, backdrop: null, hidden: new Set(), chosen: null };
  let drawing = false, shift = false, pressed = null, due = { points: false, marks: false };

  // --- the view

  function layout() {
    const base = explorer.plotLayout(), [x0, x1, y0, y1] = bounds;
    Object.assign(base.xaxis, { range: [x0, x1], nticks: 8 });
    Object.assign(base.yaxis, { range: [y0, y1], nticks: 8 });
    return { ...base, margin: MARGIN, dragmode: "pan", uirevision: "kept" };
  }

  function view() {
    const { xaxis, yaxis } = plot._fullLayout;
    return {
      x0: xaxis.range[0], x1: xaxis.range[1], y0: yaxis.range[0], y1: yaxis.range[1],
      width: xaxis._length, height: yaxis._length,
    };
  }

  function draw(what) {
    if (!due.points && !due.marks) requestAnimationFrame(drawNow);
    due[what] = true;
  }

  function drawNow() {
    const wanted = due;
    due = { points: false, marks: false };
    if (!plot._fullLayout || !plot.clientWidth) return;
    const now = view();
    for (const canvas of canvases) {
      Object.assign(canvas.style, { width: `${now.width}px`, height: `${now.height}px` });
    }
    if (wanted.points) {
      const zoom = (bounds[1] - bounds[0]) / (now.x1 - now.x0);
      explorer.points.drawPoints(canvases[0], now, shown.data, { ...shown, zoom });
    }
    explorer.points.drawMarks(canvases[1], now, marks);
  }

  const drawAll = () => draw("points");

  function zoomBy(factor) {
    const now = view(), center = marks.pin || marks.cursor || [(now.x0 + now.x1) / 2, (now.y0 + now.y1) / 2];
    const range = (low, high, middle) => [middle - (middle - low) * factor, middle + (high - middle) * factor];
    Plotly.relayout(plot, {
      "xaxis.range": range(now.x0, now.x1, center[0]), "yaxis.range": range(now.y0, now.y1, center[1]),
    });
  }

  const showAll = () => Plotly.relayout(plot, { "xaxis.range": bounds.slice(0, 2), "yaxis.range": bounds.slice(2) });

  function addButtons() {
    const bar = layer("div", "buttons");
    const actions = [
      ["+", "Zoom in", () => zoomBy(ZOOM)], ["−", "Zoom out", () => zoomBy(1 / ZOOM)], ["◻", "Show all", showAll],
    ];
    for (const [text, label, action] of actions) {
      const button = bar.appendChild(explorer.make("button", { "aria-label": label, title: label }, text));
      button.addEventListener("click", action);
    }
  }

  // --- the cursor

  function pointAt(event) {
    if (!plot._fullLayout) return null;
    const area = frame.getBoundingClientRect(), now = view();
    const left = event.clientX - area.left - MARGIN.l, top = event.clientY - area.top - MARGIN.t;
    if (left < 0 || top < 0 || left > now.width || top > now.height) return null;
    return [
      explorer.rounded(now.x0 + left / now.width * (now.x1 - now.x0)),
      explorer.rounded(now.y1 - top / now.height * (now.y1 - now.y0)),
    ];
  }

  function move(point) {
    marks.cursor = point;
    draw("marks");
    if (!marks.pin) calls.moved(...point);
  }

  function lock(point) {
    marks.cursor = marks.pin = point;
    draw("marks");
    calls.locked(...point);
  }

  function unlock() {
    marks.pin = null;
    marks.path = [];
    draw("marks");
    calls.unlocked();
  }

  // The surface lies above plotly only while a path is drawn: otherwise dragging belongs to plotly and moves the plane.
  function setMode() {
    surface.classList.toggle("drawing", drawing || shift);
  }

  function onMove(event) {
    if (shift !== event.shiftKey && !pressed) { shift = event.shiftKey; setMode(); }
    const point = pointAt(event);
    if (!point) return;
    if (pressed && pressed.draws) {
      if (!pressed.path.length) pressed.path.push(pressed.point);
      pressed.path.push(point);
      if (Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > CLICK_PIXELS) marks.path = pressed.path;
      marks.cursor = point;
      draw("marks");
    } else if (!pressed) move(point);
  }

  function onDown(event) {
    const point = pointAt(event);
    if (!point || event.button > 0 || event.target.closest("button")) return;
    plot.focus({ preventScroll: true });
    const draws = event.target === surface;
    pressed = { point, draws, x: event.clientX, y: event.clientY, path: [] };
    if (draws) surface.setPointerCapture(event.pointerId);
  }

  function onUp(event) {
    if (!pressed) return;
    const { draws, point, x, y } = pressed;
    const dragged = Math.hypot(event.clientX - x, event.clientY - y) > CLICK_PIXELS;
    pressed = null;
    if (!draws && !dragged) lock(point);
    if (!draws) return;
    if (!dragged) marks.path = [...marks.path, point];
    draw("marks");
    calls.drawn(marks.path);
  }

  function onKey(event) {
    const now = view(), steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const step = steps[event.key];
    if (step) {
      const from = marks.pin || marks.cursor || [(now.x0 + now.x1) / 2, (now.y0 + now.y1) / 2];
      const to = [from[0] + step[0] * KEY_STEP * (now.x1 - now.x0), from[1] + step[1] * KEY_STEP * (now.y1 - now.y0)];
      const point = to.map(explorer.rounded);
      if (marks.pin) lock(point);
      else move(point);
    } else if (event.key === "Enter" && marks.cursor && drawing) {
      marks.path = [...marks.path, marks.cursor];
      draw("marks");
      calls.drawn(marks.path);
    } else if (event.key === "Enter" && marks.cursor) lock(marks.cursor);
    else if (event.key === "+") zoomBy(ZOOM);
    else if (event.key === "-") zoomBy(1 / ZOOM);
    else return;
    event.preventDefault();
  }

  function start() {
    const config = { scrollZoom: true, displayModeBar: false, responsive: false, doubleClick: false, showTips: false };
    const nothing = { type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip" };
    Plotly.newPlot(plot, [nothing], layout(), config).then(drawAll);
    for (const name of ["plotly_relayouting", "plotly_relayout", "plotly_afterplot"]) plot.on(name, drawAll);
    addButtons();
    frame.addEventListener("pointermove", onMove);
    frame.addEventListener("pointerdown", onDown, { capture: true });
    window.addEventListener("pointerup", onUp);
    frame.addEventListener("pointercancel", () => { pressed = null; });
    surface.addEventListener("mousedown", (event) => event.preventDefault()); // or the plane loses the focus
    plot.addEventListener("keydown", onKey);
    frame.closest("[role=tabpanel]").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target.tagName !== "SELECT") unlock();
    });
    window.addEventListener("keyup", (event) => { if (event.key === "Shift") { shift = false; setMode(); } });
    new ResizeObserver(() => { if (plot.clientWidth) Plotly.Plots.resize(plot).then(drawAll); }).observe(frame);
    explorer.themeListeners.push(() => {
      const next = layout(), changed = { "font.color": next.font.color };
      for (const axis of ["xaxis", "yaxis"]) {
        for (const name of ["gridcolor", "zerolinecolor", "linecolor"]) changed[`${axis}.${name}`] = next[axis][name];
      }
      Plotly.relayout(plot, changed).then(drawAll);
    });
  }

  start();
  return {
    setData(data) { shown.data = data; drawAll(); },
    setBounds(next) { bounds = next; return showAll(); },
    setBackdrop(backdrop) { shown.backdrop = backdrop; drawAll(); },
    setLabels(hidden, chosen) { Object.assign(shown, { hidden, chosen }); drawAll(); },
    setMarks(changed) { Object.assign(marks, changed); draw("marks"); },
    setDrawing(on) { drawing = on; setMode(); },
  };
};

// A legend of buttons: each shows or hides its label, and points at it while the hand or focus is on it.
explorer.legend = function (container, labels, changed) {
  const hidden = new Set();
  container.replaceChildren();
  if (labels.length < 2) return;
  const report = (chosen) => changed(hidden, chosen);
  const buttons = labels.map((label) => {
    const button = explorer.make("button", { class: "label", "aria-pressed": "true" });
    button.append(explorer.make("span", { class: `swatch ${explorer.labelShape(label)}` }), explorer.labelName(label));
    button.addEventListener("click", () => {
      if (!hidden.delete(label)) hidden.add(label);
      button.setAttribute("aria-pressed", String(!hidden.has(label)));
      report(null);
    });
    const chosen = () => report(hidden.has(label) ? null : label);
    for (const name of ["pointerenter", "focus"]) button.addEventListener(name, chosen);
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => report(null));
    return button;
  });
  const all = explorer.make("button", { class: "label all" }, "all / none");
  all.addEventListener("click", () => {
    const hide = hidden.size === 0;
    hidden.clear();
    if (hide) labels.forEach((label) => hidden.add(label));
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(!hide)));
    report(null);
  });
  container.append(...buttons, all);
  const paint = () => buttons.forEach((button, index) => {
    button.firstChild.style.background = explorer.labelColor(labels[index]);
  });
  paint();
  explorer.themeListeners.push(paint);
};
