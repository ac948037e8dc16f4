"""Fixtures: tiny models of every architecture, and the real SmolLM2."""

from __future__ import annotations

import os
from pathlib import Path

import architectures
import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile(
    "ci", derandomize=True, deadline=None
)  # the same examples on every CI run
settings.load_profile("ci" if os.environ.get("CI") else "default")
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=list(architectures.CONFIGS))
def tiny(request):
    return architectures.build(request.param)


@pytest.fixture
def llama():
    return architectures.build("llama")


@pytest.fixture(scope="session")
def smollm2():
    from prunescope.probes import load

    return load("smollm2")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("benchmark rows are not beside this checkout")
    return folder
