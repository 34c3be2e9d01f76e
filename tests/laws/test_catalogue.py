"""The catalogue and the oracles themselves."""

import re
from pathlib import Path

import numpy as np
import oracle
import pytest
from catalogue import ROWS, by_name, draw


def test_the_oracle_agrees_with_numpy_on_a_masked_row():
    x = np.array([[1.0, 2.0, 3.0, 50.0]])
    truth = oracle.normalize(x, np.zeros((1, 4), int), None, None, epsilon=0.0, mask=np.array([[1, 1, 1, 0]], bool))
    np.testing.assert_allclose(truth.mean[0, 0], 2.0)
    np.testing.assert_allclose(truth.y[0, :3], (x[0, :3] - 2) / np.std(x[0, :3]))
    assert by_name["layer"].labels.max() == 4 * 6 - 1


def analytic(x, params, groups, spec):
    """Standardization, written as a formula is that has no gradient written out."""
    d = x - groups.mean(x)
    return oracle.affine(d / groups.xp.sqrt(groups.mean(d * d) + spec.epsilon), *params)


@pytest.mark.parametrize("name", ["layer-adaptive", "group-nhwc", "batch-flat", "batch-ghost-remainder"])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_complex_steps_give_the_gradients_that_are_written_out(name, mean, rng):
    row = by_name[name]
    params, x, g = row.in_rank(row.params(rng)), draw(rng, row.shape, mean), draw(rng, row.shape)
    groups = oracle.Groups(row.labels, rng.random(row.shape) < 0.7, rng.uniform(0.5, 2, row.shape))
    args = params, g, groups, row.spec
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.abs(b).max())
    got, want = oracle.gradients_of(analytic, x, *args), oracle.gradients_of(oracle.standardize, x, *args)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_a_formula_that_is_not_analytic_is_refused():
    x, params = np.ones((2, 3)), by_name["layer-no-params"].spec.init(3)[0]
    groups = oracle.Groups(np.indices(x.shape)[0])
    magnitude = lambda x, params, groups, spec: np.abs(x) / groups.mean(np.abs(x))
    with pytest.raises(AssertionError, match="not analytic"):
        oracle.gradients_of(magnitude, x, params, x, groups, None)


def test_every_exemption_names_a_law_and_a_reason():
    text = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    laws = {*re.findall(r"^def (test_\w+)\(row\b", text, re.MULTILINE)}
    for row in ROWS:
        assert {*row.exempt} <= laws, row
        assert all(row.exempt.values()), row
