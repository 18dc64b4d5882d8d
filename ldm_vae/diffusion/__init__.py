"""Stage 3: rectified flow on normalised latents: the mathematics, the U-Net, its training and the pipeline."""
