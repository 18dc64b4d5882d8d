"""The page of a set of latents: what its plots compare with, and many channels or classes."""

from __future__ import annotations

import math

import numpy as np
import torch

from ldm_vae.evaluation.health_metrics import power_spectrum
from ldm_vae.evaluation.latent_set_page import LEAST_MAP_RANGE, maps, plot_class_counts, plot_correlations, plot_spectra
from ldm_vae.latents.stats import Statistics


def test_white_noise_lies_on_the_dotted_line():
    torch.manual_seed(0)
    frequency, power = power_spectrum(torch.randn(400, 1, 16, 24))
    level = math.prod(3 / 8 * (side + 1) / side for side in (16, 24))
    assert torch.allclose(power[2:], torch.tensor(level, dtype=torch.float64), rtol=0.05)
    report = {"spectra": {"frequency": frequency.tolist(), "power": [power.tolist()], "samples": 400},
              "latent_shape": [1, 16, 24]}  # fmt: skip
    assert "channel 0" in plot_spectra(report)


def test_many_channels_and_classes_are_drawn_without_their_names():
    for count, named in ((4, True), (64, False)):
        matrix = np.full((count, count), 0.25)
        np.fill_diagonal(matrix, 1.0)
        assert (">.25<" in plot_correlations({"correlation": {"matrix": matrix.tolist()}})) is named
    for count, named in ((5, True), (100, False)):
        counts = {f"class {number} $x$": number for number in range(count)}
        assert ("class 3 $x$" in plot_class_counts({"labels": {"counts": counts}})) is named


def test_maps_have_one_scale_and_do_not_amplify_noise():
    mean = np.zeros((2, 4, 4))
    mean[1, 0, 0] = 0.01
    (_, means), (title, _) = maps(Statistics({}, mean, np.ones((2, 4, 4))))
    assert [caption for _, caption in means] == ["channel 0: 0.00 to 0.00", "channel 1: 0.00 to 0.01"]
    assert title == f"Deviation, black {1 - LEAST_MAP_RANGE:.2f} to white {1 + LEAST_MAP_RANGE:.2f}"
