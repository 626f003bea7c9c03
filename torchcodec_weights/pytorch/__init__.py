"""Integration with PyTorch: operators, functions, views, distributed training."""
