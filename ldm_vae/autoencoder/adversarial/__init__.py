"""The adversarial stage: a patch discriminator, the game it plays with the decoder, and what keeps the game safe."""
