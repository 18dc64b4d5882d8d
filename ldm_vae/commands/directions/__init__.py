"""Find directions of the latent space that change one thing, move pictures along them, and measure what moves.

`ldm-vae directions TOOL --help` explains a tool.
"""

SUMMARY = "controlled edits: fit directions in the latent space, apply and judge them"

TOOLS = {
    "fit": "fit",
    "apply": "apply",
    "evaluate": "evaluate",
}
"""Name of a tool -> module beside this file; like commands they have SUMMARY, add_arguments and run."""
