"""What surrounds the model in a training step: no padding, no logits without a label, no layer computed twice without
need."""
