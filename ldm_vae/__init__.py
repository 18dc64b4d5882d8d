"""ldm_vae: the compression component of latent diffusion.

Train an 8x-downsampling KL-regularised VAE on your own images, encode datasets into latent shards, train a latent
U-Net on them and generate. Importing this package does nothing and imports nothing heavy.
"""

__version__ = "0.1.0"
