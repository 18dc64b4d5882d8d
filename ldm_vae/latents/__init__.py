"""Stage 2: a dataset becomes latent shards, once: format, encoding, statistics, reading. Independent of diffusion."""
