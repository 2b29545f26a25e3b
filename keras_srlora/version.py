"""The version, which files name as well."""

__version__ = "0.1.0"
