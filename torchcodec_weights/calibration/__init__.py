"""What calibration measures on a model: inputs of its layers, gradients of its output."""
