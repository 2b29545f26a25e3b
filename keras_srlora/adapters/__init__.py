"""Adapters as files: saved, loaded, switched off, exported."""
