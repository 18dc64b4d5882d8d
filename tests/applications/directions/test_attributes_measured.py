"""What pixels tell: known colors have known attributes, and each attribute ignores what it is not about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_vae.applications.directions.attributes import MEASURED, measure_attributes, oklab


def plain(red: float, green: float, blue: float) -> Tensor:
    """A picture of one color, given in [0, 1]."""
    return (2 * torch.tensor([red, green, blue]) - 1).view(1, 3, 1, 1).expand(1, 3, 16, 16)


def test_known_colors() -> None:
    grays = torch.cat([plain(level, level, level) for level in (0, 0.5, 1)])
    lightness = oklab(grays)[:, 0].mean(dim=(1, 2))  # of encoded 0.5: the cube root of the light 0.2140
    torch.testing.assert_close(lightness, torch.tensor([0.0, 0.5982, 1.0]), atol=1e-4, rtol=0)
    red = oklab(plain(1, 0, 0))[0, :, 0, 0]  # Ottosson's table: L 0.628, a 0.225, b 0.126
    torch.testing.assert_close(red, torch.tensor([0.6280, 0.2249, 0.1258]), atol=2e-4, rtol=0)


def test_each_attribute_follows_its_name() -> None:
    found = measure_attributes(
        torch.cat([plain(0.5, 0.5, 0.5), plain(0.8, 0.3, 0.3), plain(0.3, 0.3, 0.8), plain(0.9, 0.9, 0.9)])
    )
    assert tuple(found) == MEASURED
    gray, red, blue, bright = range(4)
    assert found["brightness"][bright] > found["brightness"][gray]
    assert found["saturation"][gray] == pytest.approx(0, abs=1e-4)
    assert found["red_green"][red] > 0.1 > found["red_green"][gray]
    assert found["yellow_blue"][blue] < -0.1 < found["yellow_blue"][gray]
    assert found["contrast"].max() == pytest.approx(0, abs=1e-4)
    assert found["sharpness"].eq(0).all()  # nothing there to be sharp


def test_sharpness_is_not_contrast() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(1, 1, 64, 64, generator=rng).clamp(-1, 1).expand(1, 3, 64, 64)
    blurred = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    found = measure_attributes(torch.cat([noise, 0.5 * noise, blurred]))
    assert found["contrast"][1] < 0.6 * found["contrast"][0]
    assert float(found["sharpness"][1]) == pytest.approx(float(found["sharpness"][0]), rel=0.1)
    assert found["sharpness"][2] < 0.6 * found["sharpness"][0]
