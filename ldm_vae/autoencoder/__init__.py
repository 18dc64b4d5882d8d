"""Stage 1: autoencoders, their losses, the rate, and how they are trained. Knows nothing of latents or diffusion."""
