"""The trainer of every model: resume, accumulation, learning rate, EMA, logging, previews, checkpoints and signals.

It knows no model. A model brings one visible `update()`, all the mathematics of one optimizer step, and with its
configuration `run_directory.ModelKeys`.
"""
