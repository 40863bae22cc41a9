"""The one place where the version is said."""

__version__ = "0.2.0"
