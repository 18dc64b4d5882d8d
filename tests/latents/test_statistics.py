from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_vae.latents.statistics import channel_sums, combine


def moments(count: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    torch.manual_seed(count)
    mean = torch.randn(count, 3, 5, 7) * torch.tensor([1.0, 0.1, 4.0])[:, None, None] + 2.5
    logvar = torch.randn(count, 3, 5, 7) - 1.0
    return torch.cat([mean, logvar], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_equal_the_definition_on_the_stored_values(dtype):
    stored = moments(9, dtype)
    statistics = combine([channel_sums([stored])])
    mean, logvar = stored.double().numpy()[:, :3], stored.double().numpy()[:, 3:]
    expected = mean.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3))
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(np.square(statistics["std"]), expected, rtol=1e-12)
    assert statistics["count"] == 9


def test_statistics_are_those_of_posterior_samples():
    mean, logvar = moments(16).float().chunk(2, 1)
    torch.manual_seed(1)
    samples = torch.cat([mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) for _ in range(400)])
    statistics = combine([channel_sums([moments(16)])])
    np.testing.assert_allclose(samples.mean((0, 2, 3)), statistics["mean"], atol=0.01)
    np.testing.assert_allclose(samples.std((0, 2, 3)), statistics["std"], rtol=0.01)


def test_shards_and_order_do_not_matter():
    parts = [channel_sums([moments(count)]) for count in (3, 5, 1)]
    whole = combine([channel_sums([torch.cat([moments(count) for count in (3, 5, 1)])])])
    assert combine(parts) == combine(parts[::-1])
    np.testing.assert_allclose(combine(parts)["std"], whole["std"], rtol=1e-13)


def test_mirror_images_count_as_latents():
    plain, flipped = moments(4), moments(4).flip(-1)
    assert combine([channel_sums([plain, flipped])])["count"] == 8
    np.testing.assert_allclose(
        combine([channel_sums([plain, flipped])])["std"], combine([channel_sums([plain])])["std"], rtol=1e-13
    )


def test_a_shard_without_samples_adds_nothing():
    empty = channel_sums([moments(2)[:0]])
    assert combine([empty, channel_sums([moments(2)])]) == combine([channel_sums([moments(2)])])
