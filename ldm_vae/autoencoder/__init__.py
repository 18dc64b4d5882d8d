"""Stage 1: autoencoders, their losses, the rate, and how they are trained. Does not depend on latents or diffusion."""
