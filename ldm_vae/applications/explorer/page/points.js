// Draws what lies on a plane: thousands of points, the density or the round-trip error behind them, and the marks
// above them (cursor, nearest point, pin, path). Canvases, not plotly traces: 20,000 SVG marks are slow, and
// plotly's WebGL traces build code from strings, which the page's content security policy forbids.
//
// `view` is {x0, x1, y0, y1, width, height}: the visible part of the plane and its size in CSS pixels.
"use strict";

explorer.points = (function () {
  const DENSITY_CELLS = 112, FEW_POINTS = 500, MOST_STENCILS = 100, BEYOND = 20;
  const CORNERS = { // in radii
    triangle: [[0, -1.2], [1.1, 0.8], [-1.1, 0.8]], diamond: [[0, -1.3], [1.1, 0], [0, 1.3], [-1.1, 0]],
  };
  const across = (view, x) => (x - view.x0) / (view.x1 - view.x0) * view.width;
  const down = (view, y) => (view.y1 - y) / (view.y1 - view.y0) * view.height;

  // Sizes a canvas for the screen's real pixels and gives its context in CSS pixels, wiped.
  function prepared(canvas, view) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(view.width * ratio), height = Math.round(view.height * ratio);
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  function shapePath(context, shape, x, y, radius) {
    context.beginPath();
    if (shape === "circle") context.arc(x, y, radius, 0, 2 * Math.PI);
    else if (shape === "square") context.rect(x - radius * 0.9, y - radius * 0.9, radius * 1.8, radius * 1.8);
    else {
      CORNERS[shape].forEach(([a, b], index) => context[index ? "lineTo" : "moveTo"](x + a * radius, y + b * radius));
      context.closePath();
    }
  }

  // The pixels of one mark: how much of each a shape covers, {across, down, cover} of those that it touches at all.
  const stencils = new Map();
  function stencil(shape, radius, ratio) {
    const name = `${shape} ${radius} ${ratio}`;
    if (!stencils.has(name)) {
      const reach = Math.ceil((radius * 1.4 + 1) * ratio), side = 2 * reach + 1;
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = side;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.scale(ratio, ratio);
      shapePath(context, shape, side / ratio / 2, side / ratio / 2, radius);
      context.fill();
      const { data } = context.getImageData(0, 0, side, side), across = [], down = [], cover = [];
      for (let index = 0; index < side * side; index += 1) {
        if (data[4 * index + 3] === 0) continue;
        across.push(index % side - reach);
        down.push(Math.floor(index / side) - reach);
        cover.push(data[4 * index + 3] / 255);
      }
      if (stencils.size > MOST_STENCILS) stencils.clear();
      stencils.set(name, { across, down, cover });
    }
    return stencils.get(name);
  }

  // Lays one mark over the pixels, rows of `width`: the color at `strength`, over what is there already.
  function lay(pixels, width, height, left, top, { across, down, cover }, [red, green, blue], strength) {
    for (let index = 0; index < cover.length; index += 1) {
      const column = left + across[index], row = top + down[index];
      if (column < 0 || row < 0 || column >= width || row >= height) continue;
      const place = 4 * (row * width + column), above = cover[index] * strength;
      const below = pixels[place + 3] / 255 * (1 - above), whole = above + below;
      pixels[place] = (red * above + pixels[place] * below) / whole;
      pixels[place + 1] = (green * above + pixels[place + 1] * below) / whole;
      pixels[place + 2] = (blue * above + pixels[place + 2] * below) / whole;
      pixels[place + 3] = 255 * whole;
    }
  }

  // `hidden`: a set of labels; `chosen`: a label that stands out, or null. Pixels are laid by hand: twenty thousand
  // calls of the canvas take a hundred times longer where no graphics card helps.
  function drawPoints(canvas, view, data, { backdrop, zoom, hidden, chosen }) {
    const context = prepared(canvas, view), { width, height } = canvas, count = data.x.length;
    const radius = Math.min(6, (count > 8000 ? 1.6 : count > 1500 ? 2.3 : 3.4) * Math.sqrt(Math.max(zoom, 0.5)));
    const scale = width / (view.x1 - view.x0), rise = height / (view.y1 - view.y0), styles = new Map();
    const image = context.createImageData(width, height);
    for (let index = 0; index < count; index += 1) {
      const label = data.label[index];
      if (hidden.has(label)) continue;
      const left = Math.round((data.x[index] - view.x0) * scale), top = Math.round((view.y1 - data.y[index]) * rise);
      if (left < -BEYOND || top < -BEYOND || left > width + BEYOND || top > height + BEYOND) continue;
      if (!styles.has(label)) {
        const strength = chosen === null ? (count > 8000 ? 0.6 : 0.8) : chosen === label ? 1 : 0.1;
        const marks = stencil(explorer.labelShape(label), Math.round(4 * radius) / 4, width / view.width);
        styles.set(label, { marks, strength, color: channels(explorer.labelColor(label)) });
      }
      const { marks, strength, color } = styles.get(label);
      lay(image.data, width, height, left, top, marks, color, strength);
    }
    context.putImageData(image, 0, 0);
    context.globalCompositeOperation = "destination-over";
    if (backdrop) drawBackdrop(context, view, backdrop);
    context.globalCompositeOperation = "source-over";
  }

  function drawBackdrop(context, view, { picture, bounds, smooth }) {
    const [x0, x1, y0, y1] = bounds;
    const left = across(view, x0), top = down(view, y1);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, left, top, across(view, x1) - left, down(view, y0) - top);
  }

  function painted(size, paint) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), pixels = context.createImageData(size, size);
    for (let row = 0; row < size; row += 1) {
      for (let column = 0; column < size; column += 1) {
        pixels.data.set(paint(row, column), 4 * (row * size + column));
      }
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function channels(color) {
    const number = parseInt(color.slice(1), 16);
    return [number >> 16, (number >> 8) & 255, number & 255];
  }

  // How many points lie where, smoothed by three passes of a short mean; square roots, so that thin parts are seen.
  function densityBackdrop(data, bounds) {
    const size = DENSITY_CELLS, [x0, x1, y0, y1] = bounds;
    let counts = new Float32Array(size * size);
    for (let index = 0; index < data.x.length; index += 1) {
      const column = Math.floor((data.x[index] - x0) / (x1 - x0) * size);
      const row = Math.floor((y1 - data.y[index]) / (y1 - y0) * size);
      if (column >= 0 && row >= 0 && column < size && row < size) counts[row * size + column] += 1;
    }
    const reach = data.x.length > FEW_POINTS ? 2 : 4;
    for (const step of [1, size, 1, size, 1, size]) counts = smoothed(counts, size, step, reach);
    const most = Math.sqrt(counts.reduce((a, b) => Math.max(a, b), 1e-9));
    const color = channels(explorer.color("density"));
    const picture = painted(size, (row, column) =>
      [...color, Math.round(150 * Math.sqrt(counts[row * size + column]) / most)]);
    return { picture, bounds, smooth: true };
  }

  function smoothed(values, size, step, reach) {
    const result = new Float32Array(values.length);
    for (let index = 0; index < values.length; index += 1) {
      const place = step === 1 ? index % size : Math.floor(index / size);
      let sum = 0;
      for (let shift = -reach; shift <= reach; shift += 1) {
        if (place + shift >= 0 && place + shift < size) sum += values[index + shift * step];
      }
      result[index] = sum / (2 * reach + 1);
    }
    return result;
  }

  // Green where a decoded point encodes back to where it was, orange where it lands elsewhere, stronger the farther;
  // faint outside of the images' outline, which counts for nothing.
  function errorBackdrop({ errors, inside, bounds, tolerance }) {
    const size = errors.length, good = channels(explorer.color("good")), bad = channels(explorer.color("bad"));
    const picture = painted(size, (row, column) => {
      const error = errors[size - 1 - row][column], weight = inside[size - 1 - row][column] ? 1 : 0.2;
      const far = Number.isFinite(error) ? Math.min(1, Math.log2(Math.max(error / tolerance, 1)) / 3) : 1;
      const [color, strength] = error !== null && error <= tolerance ? [good, 70] : [bad, 60 + 130 * far];
      return [...color, Math.round(weight * strength)];
    });
    return { picture, bounds, smooth: false };
  }

  // `marks`: {cursor, nearest, pin: [x, y] or null, path: [[x, y], ...]}
  function drawMarks(canvas, view, { cursor, nearest, pin, path }) {
    const context = prepared(canvas, view);
    const place = ([x, y]) => [across(view, x), down(view, y)];
    const ink = explorer.color("ink"), paper = explorer.color("surface"), accent = explorer.color("accent");
    const ring = (point, radius, width, stroke, fill) => {
      shapePath(context, "circle", ...place(point), radius);
      if (fill) { context.fillStyle = fill; context.fill(); }
      context.lineWidth = width;
      context.strokeStyle = stroke;
      context.stroke();
    };
    const line = (points, stroke, width) => {
      context.beginPath();
      points.forEach(([x, y], index) => context[index ? "lineTo" : "moveTo"](x, y));
      context.strokeStyle = stroke;
      context.lineWidth = width;
      context.lineJoin = context.lineCap = "round";
      context.stroke();
    };
    if (path.length) {
      line(path.map(place), paper, 6);
      line(path.map(place), accent, 3);
      [path[0], path[path.length - 1]].forEach((point) => ring(point, 5, 2, accent, paper));
    }
    const at = pin || cursor;
    if (!at) return;
    const [x, y] = place(at);
    context.globalAlpha = 0.35;
    line([[x, 0], [x, view.height]], ink, 1);
    line([[0, y], [view.width, y]], ink, 1);
    context.globalAlpha = 1;
    if (nearest) {
      line([[x, y], place(nearest)], ink, 1);
      ring(nearest, 6, 1.5, ink);
    }
    ring(at, 5, 2, paper, pin ? accent : ink);
    if (pin) ring(pin, 10, 2, accent);
  }

  return { drawPoints, drawMarks, densityBackdrop, errorBackdrop, shapePath };
})();
