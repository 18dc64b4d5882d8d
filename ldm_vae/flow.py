"""The mathematics of rectified flow: times, interpolation, targets, the loss; noise between two noises."""

from ldm_vae.diffusion.editing import slerp
from ldm_vae.diffusion.flow import (
    as_column,
    clean_from_velocity,
    interpolate,
    resolution_shift,
    sample_times,
    shift_times,
    velocity_from_clean,
    velocity_from_clean_head,
    velocity_loss,
    velocity_target,
)

__all__ = [
    "as_column",
    "clean_from_velocity",
    "interpolate",
    "resolution_shift",
    "sample_times",
    "shift_times",
    "slerp",
    "velocity_from_clean",
    "velocity_from_clean_head",
    "velocity_loss",
    "velocity_target",
]
