"""What the latent space is used for besides diffusion: one module a noun, over any autoencoder directory."""
