"""Latents to train on."""

from __future__ import annotations

from tests.latents.conftest import autoencoder_directory, encode, latents, settings  # noqa: F401
