"""Labelled numbers in, findings out. Imports numpy, scipy and xarray, and nothing of the models."""

from .findings import Finding, diagnose
from .schema import read, write
from .studies import open_study

__all__ = ["Finding", "diagnose", "open_study", "read", "write"]
