"""Keras's private API, devices, random state, progress, argument checks."""
