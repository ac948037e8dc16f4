"""Findings in, pages out; and the command line that runs it all."""

from .render import render

__all__ = ["render"]
