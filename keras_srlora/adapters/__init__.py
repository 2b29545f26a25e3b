"""Adapters: saved, loaded, switched, combined, switched off, exported."""
