"""What PyTorch does with a CodecTensor: operators, functions, views, ranks."""
