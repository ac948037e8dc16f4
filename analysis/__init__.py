"""Labelled numbers in, findings out. Imports numpy, scipy and xarray, and nothing of the models."""

from .findings import Finding, diagnose
from .schema import read, write

__all__ = ["Finding", "diagnose", "read", "write"]
