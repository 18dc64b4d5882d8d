"""The autoencoder beyond this package: CompVis checkpoints, stock diffusers directories, ONNX, TorchScript."""
