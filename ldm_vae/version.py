"""The version of the package, in a module of its own: it is read without the public list of `ldm_vae`."""

__version__ = "0.1.0"
