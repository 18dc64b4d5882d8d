// What all tabs share: the one global `explorer`, elements, numbers, colors of labels, pictures on canvases,
// the quiet line for messages, and asking for the newest only. It knows neither the server nor any tab.
"use strict";

var explorer = { tabs: {}, state: { description: null, active: "a" }, themeListeners: [] };

explorer.element = (id) => document.getElementById(id);

explorer.make = function (name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};

// --- numbers and words

explorer.number = function (value, digits = 3) {
  if (!Number.isFinite(value)) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-5 || size >= 1e6)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size + 1))))));
};

explorer.large = function (value) {
  for (const [unit, name] of [[1e9, "billion"], [1e6, "million"]]) {
    if (value >= unit) return `${Number((value / unit).toPrecision(3))} ${name}`;
  }
  return Math.round(value).toLocaleString("en");
};

explorer.percent = function (share) {
  return share > 0 && share < 0.01 ? "under 1 %" : `${Math.round(100 * share)} %`;
};

explorer.shape = (sizes) => sizes.join(" × ");

// What is decoded is what is shown: a point goes to the decoder with the digits that people read.
explorer.rounded = (value) => Number(value.toPrecision(5));

explorer.model = (key) => explorer.state.description.models.find((model) => model.key === key);

explorer.isPlain = (model) => model.kind === "ae" || model.deterministic;

const KINDS = { kl: "VAE", ae: "plain AE", vq: "VQ", fsq: "FSQ", frozen: "frozen encoder" };
explorer.kindName = (kind) => KINDS[kind] || kind;

explorer.labelName = function (label) {
  const names = explorer.state.description.images.label_names || [];
  if (label < 0) return "no label";
  return names[label] === undefined ? String(label) : String(names[label]);
};

// --- the quiet line, and what a screen reader says when the hand rests

explorer.say = function (text) {
  const line = explorer.element("message");
  line.textContent = text;
  line.hidden = !text;
};

let announcement = 0;
explorer.announce = function (text) {
  clearTimeout(announcement);
  announcement = setTimeout(() => { explorer.element("announcer").textContent = text; }, 600);
};

explorer.failed = function (error) {
  if (error.name !== "AbortError" && error.name !== "StaleError") explorer.say(error.message);
};

// Runs `work(argument, signal)` one at a time; of what is asked meanwhile only the newest is kept, and begun with
// the next frame. `cancel` forgets what waits and drops what runs.
explorer.newest = function (work, done) {
  let controller = null, waiting = null, busy = false;
  async function next() {
    if (!waiting) { busy = false; return; }
    const { argument } = waiting;
    const mine = controller = new AbortController();
    waiting = null;
    try {
      const result = await work(argument, mine.signal);
      if (!mine.signal.aborted) { explorer.say(""); done(result, argument); }
    } catch (error) {
      if (!mine.signal.aborted) explorer.failed(error);
    }
    requestAnimationFrame(next);
  }
  return {
    ask(argument) {
      waiting = { argument };
      if (!busy) { busy = true; requestAnimationFrame(next); }
    },
    cancel() { waiting = null; if (controller) controller.abort(); },
  };
};

// --- pictures

const SMALL_SIDE = 160; // a picture up to this side is enlarged with visible pixels

// Puts a picture (ImageBitmap, canvas or image) on a canvas of the picture's own size, pixel by pixel.
explorer.drawPicture = function (canvas, picture) {
  if (canvas.width !== picture.width) canvas.width = picture.width;
  if (canvas.height !== picture.height) canvas.height = picture.height;
  canvas.classList.toggle("pixels", picture.width <= SMALL_SIDE);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0);
  canvas.dataset.drawn = String(Number(canvas.dataset.drawn || 0) + 1);
};

explorer.showImage = function (image, address) {
  image.onload = () => image.classList.toggle("pixels", image.naturalHeight <= SMALL_SIDE);
  image.onerror = () => explorer.say("A picture could not be loaded.");
  image.src = address;
};

// --- colors

explorer.color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Ten colors told apart with every kind of color vision, in similar lightness (Petroff, arXiv:2107.02270), here a
// little lighter where the page is dark. More than ten labels change the shape of the mark.
const LABEL_COLORS = {
  light: ["#3f90da", "#e89400", "#bd1f01", "#7d8d8b", "#832db6", "#a96b59", "#e76300", "#9c9040", "#717581", "#35aebb"],
  dark: ["#5aa5ea", "#ffb52e", "#e5533a", "#a9b8b6", "#b36be0", "#c78d7b", "#ff8534", "#cfc482", "#9296a4", "#92dadd"],
};
explorer.shapes = ["circle", "square", "triangle", "diamond"];

const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
explorer.isDark = () => darkScheme.matches;

explorer.labelColor = function (label) {
  if (label < 0) return explorer.color("muted");
  const colors = LABEL_COLORS[explorer.isDark() ? "dark" : "light"];
  return colors[label % colors.length];
};

explorer.labelShape = (label) => explorer.shapes[Math.floor(Math.max(label, 0) / 10) % explorer.shapes.length];

darkScheme.addEventListener("change", () => explorer.themeListeners.forEach((listener) => listener()));

// What plotly needs to look like the page.
explorer.plotLayout = function () {
  const line = explorer.color("line");
  const axis = { gridcolor: line, zerolinecolor: explorer.color("line-strong"), linecolor: line, ticks: "" };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: false,
    font: { family: "system-ui, sans-serif", size: 12, color: explorer.color("muted") },
    xaxis: { ...axis }, yaxis: { ...axis },
  };
};
