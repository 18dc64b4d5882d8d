"""How faithful reconstructions are: the protocol, baselines on the same pixels, distribution metrics, pictures."""
