"""Image compression: quantized latents in a real file, coded with integer tables so that any machine decodes them."""
