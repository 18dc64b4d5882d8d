"""An image collection becomes tensors: sources, safe decoding, splits, crops, the synthetic set."""
