from __future__ import annotations

import json

import pytest
import torch

from ldm_vae.errors import UserError
from ldm_vae.latents.normalizer import LatentNormalizer

MEAN, STD = [0.3, -1.7, 12.0, 1e-3], [1.1, 0.02, 5.0, 3.3]


def test_normalised_samples_have_mean_zero_and_std_one():
    torch.manual_seed(0)
    z = torch.randn(64, 4, 32, 32) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    x = LatentNormalizer(MEAN, STD).normalize(z)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_round_trip(dtype, tolerance):
    normalizer = LatentNormalizer(MEAN, STD)
    z = torch.randn(2, 4, 8, 8, dtype=dtype)
    back = normalizer.denormalize(normalizer.normalize(z))
    assert back.dtype == dtype
    torch.testing.assert_close(back, z, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(normalizer.normalize(z[0]), normalizer.normalize(z)[0])


def test_constants_survive_json_to_the_last_bit():
    normalizer = LatentNormalizer([1 / 3], [2 / 7])
    again = LatentNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert (again.mean, again.std) == ((1 / 3,), (2 / 7,))


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0], [0.0], "channel 0"),
        ([0.0, float("nan")], [1.0, 1.0], "channel 1"),
        ([0.0, 0.0], [1.0, float("inf")], "channel 1"),
        ([0.0, 0.0], [1.0], "2 means for 1"),
        ([], [], "0 means"),
    ],
)
def test_useless_constants_are_refused(mean, std, message):
    with pytest.raises(UserError, match=message):
        LatentNormalizer(mean, std)


def test_latents_of_another_channel_count_are_refused():
    with pytest.raises(UserError, match="for 4 channels"):
        LatentNormalizer(MEAN, STD).normalize(torch.zeros(1, 8, 4, 4))
