"""An entropy model that was fitted to a set of latents: what it holds, and its safetensors file.

The file is bound to the autoencoder whose latents it knows, and has a fingerprint over everything in it, which every
picture that was compressed with it names. It is made by `fitting`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm_vae.applications.codec.entropy_models import ContextModel, EntropyModel, standard_steps, static_model
from ldm_vae.applications.codec.format import FINGERPRINT_BYTES, MOST_CHANNELS
from ldm_vae.applications.codec.integer_network import IntegerNetwork, weight_count
from ldm_vae.applications.codec.passes import ROLES, input_count
from ldm_vae.errors import UserError
from ldm_vae.files import canonical_json, write_bytes
from ldm_vae.tensor_files import check_tensor_file

Kind = Literal["static", "context"]

FORMAT_VERSION = 1
METADATA = "codec"
MOST_BYTES = 64 << 20
LARGEST_INTEGER = 1 << 31
"""Of a ratio or scale: times step and level it stays below 2**63."""
ADVICE = "restore it from a copy, or fit it again with `ldm-vae codec-fit`"


@dataclass(frozen=True)
class FittedModel:
    """Statistics of a set, and for kind "context" the networks.

    Args:
        autoencoder: `identity` of the autoencoder, `sha256:HEX`.
        mean, unit: of each channel, (c,) float64; see `quantisation.Grid`.
        ratios: units per standard deviation of the set, 16 fractional bits, (c,).
        scales: of a logistic distribution of the levels, in standard deviations, 16 fractional bits, (c,).
        weights: by (channel, role), int16; see `integer_network`.
    """

    kind: Kind
    autoencoder: str
    mean: np.ndarray
    unit: np.ndarray
    ratios: tuple[int, ...]
    scales: tuple[int, ...]
    weights: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return len(self.ratios)

    @cached_property
    def networks(self) -> dict[tuple[int, int], IntegerNetwork]:
        return {key: IntegerNetwork.from_flat(flat, input_count(*key)) for key, flat in self.weights.items()}

    def at(self, step: int) -> EntropyModel:
        """The model for a step in 1/1024 units."""
        if self.kind == "static":
            return static_model(step, self.ratios, self.scales)
        return ContextModel(standard_steps(step, self.ratios), self.networks)

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:HEX` over everything."""
        digest = hashlib.sha256(canonical_json(self._record()).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
            digest.update(array.tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def short_fingerprint(self) -> bytes:
        """As compressed pictures name it."""
        return short_fingerprint(self.fingerprint)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        from safetensors.numpy import save

        metadata = {METADATA: canonical_json(self._record() | {"fingerprint": self.fingerprint})}
        write_bytes(path, save(self._arrays(), metadata))

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "autoencoder": self.autoencoder,
            "channels": self.channels,
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        numbers = {"ratios": self.ratios, "scales": self.scales}
        return {
            "mean": self.mean.astype("<f8"),
            "unit": self.unit.astype("<f8"),
            **{name: np.array(values, "<i8") for name, values in numbers.items()},
            **{f"network.{channel}.{role}": flat.astype("<i2") for (channel, role), flat in self.weights.items()},
        }


def short_fingerprint(fingerprint: str) -> bytes:
    """The first bytes of a `sha256:HEX`."""
    return bytes.fromhex(fingerprint.removeprefix("sha256:"))[:FINGERPRINT_BYTES]


def load_model(path: str | Path) -> FittedModel:
    """The model in a file of `ldm-vae codec-fit`. Raises: UserError when it is no such file, damaged or newer."""
    from safetensors import SafetensorError, safe_open

    location = Path(path)
    if not location.is_file():
        raise UserError(f"{path}: no such file; give one that `ldm-vae codec-fit` wrote")
    if location.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: is larger than {MOST_BYTES} bytes; this is no entropy model")
    check_tensor_file(location)
    try:
        with safe_open(location, "np") as file:
            record = dict(json.loads(file.metadata()[METADATA]))
            version = record["format_version"]
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise UserError(
                    f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; update ldm_vae"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        model = _model(record, arrays)
        problem = None if model.fingerprint == record["fingerprint"] else "its checksum is another one"
    except UserError:
        raise
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no entropy model ({type(error).__name__}: {error}); {ADVICE}") from error
    if problem or model._record() != {key: value for key, value in record.items() if key != "fingerprint"}:
        raise UserError(f"{path}: is damaged ({problem or 'its record differs'}); {ADVICE}")
    return model


def _model(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> FittedModel:
    """Raises: ValueError or KeyError for what cannot be."""
    kind, channels = record["kind"], record["channels"]
    if kind not in ("static", "context") or not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"kind {kind!r} of {channels} channels")
    weights = {}
    if kind == "context":
        for channel in range(channels):
            for role in range(ROLES):
                flat = arrays[f"network.{channel}.{role}"]
                if flat.dtype != np.int16 or flat.shape != (weight_count(input_count(channel, role)),):
                    raise ValueError(f"network {channel}.{role} of shape {flat.shape}")
                weights[channel, role] = flat
    for name, dtype in (("mean", np.float64), ("unit", np.float64), ("ratios", np.int64), ("scales", np.int64)):
        found = arrays[name]
        if found.shape != (channels,) or found.dtype != dtype or not np.isfinite(found).all():
            raise ValueError(f"{name} of shape {found.shape}")
        if name != "mean" and not ((found > 0) & (found < LARGEST_INTEGER)).all():
            raise ValueError(f"{name} out of range")
    if len(arrays) != 4 + len(weights):
        raise ValueError("tensors that do not belong to it")
    ratios, scales = (tuple(map(int, arrays[name])) for name in ("ratios", "scales"))
    return FittedModel(kind, str(record["autoencoder"]), arrays["mean"], arrays["unit"], ratios, scales, weights)
