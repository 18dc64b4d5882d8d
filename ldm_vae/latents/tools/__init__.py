"""What is done with a set of latents once it is there, one module each. Reading it is `latents.dataset`'s business."""
