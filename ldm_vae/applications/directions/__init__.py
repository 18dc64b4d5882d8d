"""Controlled edits: directions of the latent space, fitting, applying and judging them."""
