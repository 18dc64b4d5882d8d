"""Measures of images: PSNR, SSIM, MS-SSIM, sharpness, rate-distortion bounds; the use of a codebook."""

from ldm_vae.autoencoder.quantized import codebook_usage
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
    "codebook_usage",
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
