"""`ldm-vae evaluate` as a script, for `accelerate launch` and torchrun. The arguments are the command's."""

import sys

from ldm_vae.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
