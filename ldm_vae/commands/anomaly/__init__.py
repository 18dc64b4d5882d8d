"""Find unusual images with an autoencoder that has seen normal ones.

`fit` learns from normal images, `score` looks at others, `evaluate` says on images with known anomalies which scores
work; `ldm-vae anomaly TOOL --help` explains a tool.
"""

SUMMARY = "find unusual images: fit on normal ones, score others"

TOOLS = {
    "fit": "fit",
    "score": "score",
    "evaluate": "evaluate",
}
"""Name of a tool -> module beside this file; like commands they have SUMMARY, add_arguments and run."""
