"""The shared engine: `fit()` owns resume, accumulation, learning rate, EMA, logging, previews, saving and signals.

It knows no model. A model brings one visible `update()`: all the mathematics of one optimizer step.
"""
