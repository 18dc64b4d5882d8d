"""Measures of images: PSNR, SSIM, MS-SSIM, sharpness, rate-distortion bounds. Public names of `evaluation.metrics`."""

from ldm_vae.evaluation.metrics import (
    RatePoint,
    bootstrap_interval,
    limited_channels,
    luma,
    ms_ssim,
    paired_difference,
    psnr,
    sharpness_ratio,
    ssim,
    ssim_luma,
    water_filling,
    water_filling_at,
    water_level,
)

__all__ = [
    "RatePoint",
    "bootstrap_interval",
    "limited_channels",
    "luma",
    "ms_ssim",
    "paired_difference",
    "psnr",
    "sharpness_ratio",
    "ssim",
    "ssim_luma",
    "water_filling",
    "water_filling_at",
    "water_level",
]
