"""Look at, check, mend, extend and exchange sets of latent shards.

`ldm-vae encode` makes them; `ldm-vae latents TOOL --help` explains a tool.
"""

SUMMARY = "look at, check, mend, extend and exchange latent shards"

TOOLS = {
    "info": "info",
    "verify": "verify",
    "repair": "repair",
    "append": "append",
    "stats": "stats",
    "decode": "decode",
    "export": "export",
    "import": "import_",
}
"""Name of a tool -> module beside this file; like commands they have SUMMARY, add_arguments and run."""
