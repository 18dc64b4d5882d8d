"""Anomaly detection: what an autoencoder, fitted on normal images only, finds unusual in others.

`scores` names what is measured, `measurement` measures it. `fitting` makes a `detector`, `scoring` uses it on images of
one's own, `evaluation` says on labeled images which scores work, which fail, and why.
"""
