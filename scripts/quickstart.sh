#!/usr/bin/env bash
# The whole chain on the embedded images, on any machine: train an autoencoder, encode, train a latent U-Net,
# generate, evaluate, diagnose, report. About 10 minutes on 2 CPU cores after installation. Interrupt it at any time and run it
# again: each command continues, or says that it is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment

run=runs/quickstart
number=0

step() {
  number=$((number + 1))
  printf '\n[%d/7] %s\n$ ldm-vae %s\n' "$number" "$1" "${*:2}"
  .venv/bin/ldm-vae "${@:2}"
}

step "Train the autoencoder" train-vae configs/vae_quickstart.yaml output=$run/vae
step "Encode the images to latents" encode configs/encode_quickstart.yaml \
  autoencoder=$run/vae/autoencoder output=$run/latents
step "Train the latent U-Net" train-diffusion configs/diffusion_quickstart.yaml \
  latents=$run/latents autoencoder=$run/vae/autoencoder output=$run/diffusion
step "Generate images" generate $run/diffusion/pipeline count=40 seed=0 steps=20 guidance=2 \
  precision=bf16 output=$run/samples
step "Evaluate reconstructions" evaluate autoencoder=$run/vae/autoencoder data.source=synthetic \
  resolution=512 count=24 baseline_images=64 output=$run/evaluation
step "Look for what is wrong with it" diagnose autoencoder=$run/vae/autoencoder data.source=synthetic \
  resolution=256 count=64 output=$run/health
step "Write the report" report $run

printf '\nDone: open %s/report.html, and %s/health/index.html\n' "$PWD/$run" "$PWD/$run"
printf '\nDoes it draw what it is asked for? 500 images, read by a network that knows the truth (10 minutes):\n'
printf '$ .venv/bin/python -m tools.measure_synthetic %s/truth --pipeline %s/diffusion --latents %s/latents --data %s\n' \
  $run $run $run configs/encode_quickstart.yaml
