"""The integers of a context network: exact in any order of summation, and near the floats they come from."""

from __future__ import annotations

import numpy as np
import torch

from ldm_vae.applications.codec.entropy_models import (
    LARGEST_ACTIVATION,
    LARGEST_VALUE,
    IntegerNetwork,
    flat_weights,
    input_count,
    shapes,
    weight_count,
)
from ldm_vae.applications.codec.fitting import ContextNetworks


def by_hand(network: IntegerNetwork, row: list[int]) -> list[int]:
    """The definition, in Python's integers."""
    t = {name: [[int(x) for x in line] for line in np.atleast_2d(tensor)] for name, tensor in network.tensors.items()}

    def layer(values, weights):
        return [sum(v * w for v, w in zip(values, column)) for column in zip(*weights)]

    def scaled(sums, bias):
        return [(s + (b << 10) + 2048) >> 12 for s, b in zip(sums, bias[0])]

    hidden = row
    for name in ("first", "second"):
        hidden = [min(max(x, 0), LARGEST_ACTIVATION) for x in scaled(layer(hidden, t[name]), t[f"{name}_bias"])]
    sums = [a + b for a, b in zip(layer(hidden, t["last"]), layer(row, t["direct"]))]
    return scaled(sums, t["last_bias"])


def test_the_largest_numbers_are_exact_too():
    inputs = input_count(63, 3)
    rng = np.random.default_rng(0)
    extreme = np.where(rng.random(weight_count(inputs)) < 0.5, -32767, 32767).astype(np.int16)
    for weights in (extreme, rng.integers(-3000, 3000, weight_count(inputs)).astype(np.int16)):
        network = IntegerNetwork.from_flat(weights, inputs)
        values = rng.integers(-LARGEST_VALUE, LARGEST_VALUE + 1, (6, inputs))
        values[0] = LARGEST_VALUE
        found = network(values)
        assert found.tolist() == [by_hand(network, [int(x) for x in row]) for row in values]
        assert (network(np.asfortranarray(values)[::-1]) == found[::-1]).all()


def test_the_integers_are_near_the_floats_that_were_trained():
    networks = ContextNetworks(3, np.full(3, 0.5), torch.Generator().manual_seed(0))
    floats = {name: tensor.detach().numpy() for name, tensor in networks.of(2, 6).items()}
    inputs = input_count(2, 6)
    assert {name: tensor.shape for name, tensor in floats.items()} == shapes(inputs)
    network = IntegerNetwork.from_flat(flat_weights(floats, inputs), inputs)
    values = torch.randint(-3000, 3000, (50, inputs), generator=torch.Generator().manual_seed(1))
    expected = networks(values / 1024, 2, 6).detach().numpy()
    assert np.abs(network(values.numpy()) / 1024 - expected).max() < 0.02
