// The decoder of a vector autoencoder, in the page: what an exported page has in place of a server's torch.
//
// Owns the arithmetic only, layer by layer as ldm_vae/autoencoder/vector.py tells it; ldm_vae/applications/explorer/
// export.py writes the layers and their weights. Feature maps lie channel after channel, row after row.
"use strict";

(() => {
  // Base64 of little-endian 32-bit floats -> Float32Array.
  function floats(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let position = 0; position < text.length; position += 1) bytes[position] = text.charCodeAt(position);
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
  }

  function silu(values) {
    for (let index = 0; index < values.length; index += 1) values[index] /= 1 + Math.exp(-values[index]);
  }

  // weight: (outputs, inputs).
  function linear(input, { inputs, outputs, weight, bias }) {
    const output = Float32Array.from(bias);
    for (let row = 0; row < outputs; row += 1) {
      let sum = 0;
      for (let column = 0; column < inputs; column += 1) sum += weight[row * inputs + column] * input[column];
      output[row] += sum;
    }
    return output;
  }

  // Square maps of `side` pixels with one pixel of zeros around, the maps doubled to `side` first where they are half.
  function padded(input, { inputs, side, doubled }) {
    const width = side + 2;
    const shift = doubled ? 1 : 0;
    const inner = side >> shift;
    const output = new Float32Array(inputs * width * width);
    for (let channel = 0; channel < inputs; channel += 1) {
      for (let y = 0; y < side; y += 1) {
        const from = (channel * inner + (y >> shift)) * inner;
        const to = (channel * width + y + 1) * width + 1;
        for (let x = 0; x < side; x += 1) output[to + x] = input[from + (x >> shift)];
      }
    }
    return output;
  }

  // A 3x3 correlation; weight: (outputs, inputs, row, column). The nine pixels below the kernel slide along a row, so
  // that three are read for nine products: these few lines are nearly all the time of a decode.
  function convolution(input, layer) {
    const { inputs, outputs, side, weight, bias } = layer;
    const maps = padded(input, layer);
    const width = side + 2;
    const area = side * side;
    const output = new Float32Array(outputs * area);
    for (let out = 0; out < outputs; out += 1) {
      output.fill(bias[out], out * area, (out + 1) * area);
      for (let channel = 0; channel < inputs; channel += 1) {
        const kernel = (out * inputs + channel) * 9;
        const [a, b, c, d, e, f, g, h, i] = weight.subarray(kernel, kernel + 9);
        for (let y = 0; y < side; y += 1) {
          const top = (channel * width + y) * width;
          const middle = top + width;
          const bottom = middle + width;
          const to = out * area + y * side;
          let [p, q] = [maps[top], maps[top + 1]];
          let [s, t] = [maps[middle], maps[middle + 1]];
          let [v, w] = [maps[bottom], maps[bottom + 1]];
          for (let x = 0; x < side; x += 1) {
            const r = maps[top + x + 2];
            const u = maps[middle + x + 2];
            const z = maps[bottom + x + 2];
            output[to + x] += a * p + b * q + c * r + d * s + e * t + f * u + g * v + h * w + i * z;
            [p, q, s, t, v, w] = [q, r, t, u, w, z];
          }
        }
      }
    }
    return output;
  }

  // description: {layers: [{kind: "linear" | "convolution", inputs, outputs, side, doubled, silu}], weights: base64,
  // for each layer its weight, then its bias}.
  class Decoder {
    constructor(description) {
      const values = floats(description.weights);
      let start = 0;
      const taken = (count) => values.subarray(start, (start += count));
      this.layers = description.layers.map((layer) => ({
        ...layer,
        weight: taken(layer.outputs * layer.inputs * (layer.kind === "linear" ? 1 : 9)),
        bias: taken(layer.outputs),
      }));
      if (start !== values.length) throw new Error("decoder: weights and layers do not fit");
      this.side = this.layers[this.layers.length - 1].side;
    }

    // A latent of c numbers -> side * side gray values, about [-1, 1], not clamped.
    decode(latent) {
      let values = Float32Array.from(latent);
      for (const layer of this.layers) {
        values = layer.kind === "linear" ? linear(values, layer) : convolution(values, layer);
        if (layer.silu) silu(values);
      }
      return values;
    }

    // The same as a picture; the array clamps and rounds as the server's pictures are rounded.
    picture(latent) {
      const picture = new ImageData(this.side, this.side);
      this.decode(latent).forEach((value, index) => {
        const gray = (value + 1) * 127.5;
        picture.data.set([gray, gray, gray, 255], 4 * index);
      });
      return picture;
    }
  }

  explorer.floats = floats;
  explorer.Decoder = Decoder;
})();
