"""Stage 3: rectified flow on normalized latents: the mathematics, the U-Net, its training and the pipeline."""
