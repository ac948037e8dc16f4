"""The shape of a change of logits, against float64 and against changes whose shape is known."""

import numpy as np
import pytest
import torch
from prunescope.probes import Readout, Recipe, compress
from prunescope.probes.model import encode
from prunescope.probes.shape import _figures, shape, spectrum

PROMPTS = ["The cat sat on the mat", "Water", "One two three four five six seven"]


@torch.no_grad()
def logits(model, prompt):
    return model.module(**encode(model, [prompt])).logits[0].double()


def test_figures_are_those_of_float64_on_every_architecture(tiny):
    other = compress(tiny, Recipe.parse("rtn@int4-g16"))
    found = shape(tiny, other, prompts=PROMPTS)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        z, y = logits(tiny, prompt), logits(other, prompt)
        change = y - z
        mean = change.mean(-1, keepdim=True)
        rest, own = change - mean, z - z.mean(-1, keepdim=True)
        expected = {
            "kurtosis": (rest**4).mean(-1) / (rest**2).mean(-1) ** 2 - 3,
            "common": mean[:, 0] ** 2 / (change**2).mean(-1),
            "along": torch.cosine_similarity(own, rest, dim=-1),
        }
        for name, values in expected.items():
            mine = found[name].values[i]
            np.testing.assert_allclose(mine[: len(z)], values, rtol=2e-3, atol=2e-4)
            assert np.isnan(mine[len(z) :]).all()
        rows.append(rest)
    shares = torch.linalg.svdvals(torch.cat(rows)) ** 2
    np.testing.assert_allclose(found.spectrum, shares / shares.sum(), rtol=1e-2, atol=1e-5)


def test_shapes_that_are_known():
    z = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    shifted = _figures(z, torch.full_like(z, 2.0) + 1e-3 * torch.randn_like(z))
    assert (shifted["common"] > 0.99).all()
    sharper = _figures(z, 0.5 * z)
    torch.testing.assert_close(sharper["along"], torch.ones(4, dtype=torch.float64))
    assert sharper["kurtosis"].abs().max() < 0.2
    spiky = torch.zeros(4, 20_000)
    spiky[:, 7] = 5.0
    assert (_figures(z, spiky)["kurtosis"] > 1000).all()


@pytest.mark.parametrize(("rank", "softcap"), [(1, None), (3, None), (3, 30.0)])
def test_the_spectrum_has_as_many_directions_as_the_change(rank, softcap):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5000, 16, generator=generator)
    h = torch.randn(40, 16, generator=generator)
    basis = torch.randn(rank, 16, generator=generator)
    other = h + 0.01 * torch.randn(40, rank, generator=generator) @ basis
    readout = Readout(weight, softcap=softcap)
    shares = spectrum((readout, readout), torch.stack([h, other]))
    if softcap is None:
        assert float(shares[:rank].sum()) == pytest.approx(1, abs=1e-4)
    assert float(shares.sum()) == pytest.approx(1)
    assert (shares.diff() <= 1e-12).all()


def test_no_change_has_no_shape(llama):
    found = shape(llama, llama, prompts=PROMPTS[:1])
    assert np.isnan(found.kurtosis).all()
    assert np.isnan(found.spectrum).all()
