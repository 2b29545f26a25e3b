"""The SRLoRA layers, and the record of each."""
