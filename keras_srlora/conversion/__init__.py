"""From plain Keras layers to SRLoRA layers, and back."""
