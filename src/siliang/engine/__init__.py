"""The training step around the model: it avoids padding, logits without labels, and repeated computation of layers."""
