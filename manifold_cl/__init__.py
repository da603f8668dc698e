"""Geometry-first low-rank continual adaptation."""

__version__ = "0.1.0"
