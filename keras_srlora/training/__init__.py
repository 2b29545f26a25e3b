"""Scoring pairs while training, and recomposing them."""
