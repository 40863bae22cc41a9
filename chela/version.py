"""The one place where the version is said."""

__version__ = "0.1.0"
