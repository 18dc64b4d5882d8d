from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae.latents.normalizer import channel_sums, combine

POSITIONS = 5 * 7


def moments(count: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    torch.manual_seed(count)
    mean = torch.randn(count, 3, 5, 7) * torch.tensor([1.0, 0.1, 4.0])[:, None, None] + 2.5
    logvar = torch.randn(count, 3, 5, 7) - 1.0
    return torch.cat([mean, logvar], 1).to(dtype)


def measured(*shards: torch.Tensor) -> dict[str, Any]:
    latents = sum(len(shard) for shard in shards)
    return combine(np.stack([channel_sums([shard], 3) for shard in shards]), latents, latents * POSITIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_equal_the_definition_on_the_stored_values(dtype):
    stored = moments(9, dtype)
    statistics = measured(stored)
    mean, logvar = stored.double().numpy()[:, :3], stored.double().numpy()[:, 3:]
    expected = mean.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3))
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(np.square(statistics["std"]), expected, rtol=1e-12)
    assert statistics["count"] == 9


def test_of_means_alone_they_are_those_of_the_means():
    mean = moments(9)[:, :3]
    np.testing.assert_allclose(measured(mean)["std"], mean.double().numpy().std((0, 2, 3)), rtol=1e-12)


def test_statistics_are_those_of_posterior_samples():
    mean, logvar = moments(16).float().chunk(2, 1)
    torch.manual_seed(1)
    samples = torch.cat([mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) for _ in range(400)])
    statistics = measured(moments(16))
    np.testing.assert_allclose(samples.mean((0, 2, 3)), statistics["mean"], atol=0.01)
    np.testing.assert_allclose(samples.std((0, 2, 3)), statistics["std"], rtol=0.01)


def test_shards_and_order_do_not_matter():
    parts = [moments(count) for count in (3, 5, 1)]
    assert measured(*parts) == measured(*parts[::-1])
    np.testing.assert_allclose(measured(*parts)["std"], measured(torch.cat(parts))["std"], rtol=1e-13)


def test_mirror_images_count_as_latents():
    plain = moments(4)
    both = channel_sums([plain, plain.flip(-1)], 3)
    np.testing.assert_allclose(both, 2 * channel_sums([plain], 3), rtol=1e-13)


def test_a_shard_without_samples_adds_nothing():
    assert measured(moments(2)[:0], moments(2)) == measured(moments(2))
