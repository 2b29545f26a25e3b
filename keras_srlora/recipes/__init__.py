"""What a run does: its choices, its gate, its schedule."""
