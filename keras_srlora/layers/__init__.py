"""The SRLoRA layers, and what each of them remembers."""
