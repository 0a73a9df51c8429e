"""dual_moments against finite differences, closed forms and its error messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dual_moments, reference


def scores(prompts=5, responses=7, constraints=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(prompts, responses, generator=g, dtype=torch.float64)
    utility = torch.randn(prompts, responses, constraints, generator=g, dtype=torch.float64)
    return reward, utility, torch.rand(constraints, generator=g, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.floats(0.2, 5), st.integers(0, 999))
def test_gradient_and_hessian_are_finite_differences(prompts, responses, constraints, beta, seed):
    reward, utility, lam = scores(prompts, responses, constraints, seed)
    options = {"threshold": torch.linspace(-0.2, 0.3, constraints, dtype=torch.float64)}
    at = dual_moments(reward, utility, lam, beta, **options)
    step = 1e-5
    for j, unit in enumerate(torch.eye(constraints, dtype=torch.float64) * step):
        up, down = (dual_moments(reward, utility, lam + side * unit, beta, **options) for side in (1, -1))
        assert ((up.value - down.value) / (2 * step)).item() == pytest.approx(at.gradient[j].item(), abs=1e-7)
        torch.testing.assert_close(
            (up.gradient - down.gradient) / (2 * step), at.hessian[:, j], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.2}, {"utility_mean": torch.tensor([0.1, -0.2, 0.3]), "threshold": torch.ones(3)}],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_are_those_of_the_definition(options, dtype):
    arguments = *(x.to(dtype) for x in scores()), 0.6
    for got, want in zip(
        dual_moments(*arguments, **options), reference.dual_moments(*arguments, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_value_is_the_plain_formula():
    reward, utility, lam = scores()
    mean, threshold, beta = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64), 0.25, 0.7
    total = 0.0
    for p in range(5):
        terms = [
            math.exp((reward[p, i] + lam @ (utility[p, i] - mean - threshold)).item() / beta)
            for i in range(7)
        ]
        total += math.log(sum(terms) / 7)
    got = dual_moments(reward, utility, lam, beta, utility_mean=mean, threshold=threshold)
    assert got.value.item() == pytest.approx(beta / 5 * total, rel=1e-12)
    assert all(x.dtype == torch.float64 for x in got)


def test_defaults_centre_on_the_mean_over_prompts_and_responses():
    reward, utility, lam = scores()
    want = dual_moments(reward, utility, lam, 1.0, utility_mean=utility.reshape(-1, 3).mean(0), threshold=0.0)
    for got, expected in zip(dual_moments(reward, utility, lam, 1.0), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_slack_has_a_positive_gradient():
    reward, utility, _ = scores()
    zero = torch.zeros(3, dtype=torch.float64)
    free = dual_moments(torch.zeros_like(reward), utility, zero, 1.0, threshold=-1.0)
    torch.testing.assert_close(free.gradient, torch.ones(3, dtype=torch.float64))
    assert (dual_moments(torch.zeros_like(reward), utility, zero, 1.0, threshold=1.0).gradient < 0).all()


def test_effective_sample_size():
    reward = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1000.0, -1000.0]])
    got = dual_moments(reward, torch.zeros(3, 4, 1), torch.zeros(1), 1.0)
    torch.testing.assert_close(got.ess, torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))


def test_large_scores_do_not_overflow_and_cancel():
    reward, utility, lam = scores()
    near, far = (dual_moments(reward + shift, utility + 1e6, lam, 0.01) for shift in (0.0, 1e5))
    assert far.value.item() == pytest.approx(near.value.item() + 1e5, abs=1e-6)
    torch.testing.assert_close(far.hessian, near.hessian, rtol=1e-6, atol=1e-6)
    assert torch.linalg.eigvalsh(near.hessian).min() > -1e-9


def test_no_constraints_and_single_precision_inputs():
    reward, utility, lam = scores()
    got = dual_moments(reward.float(), utility[..., :0].float(), lam[:0], 1.0)
    assert got.gradient.shape == (0,) and got.hessian.shape == (0, 0)
    torch.testing.assert_close(got.value, reward.float().double().exp().mean(1).log().mean())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"reward_PG": torch.zeros(5)}, r"reward_PG has shape \[5\]"),
        ({"reward_PG": torch.zeros(0, 7)}, "at least one prompt"),
        ({"reward_PG": torch.full((5, 7), math.nan)}, r"reward_PG\[0, 0\] = nan"),
        ({"utility_PGJ": torch.zeros(5, 7)}, r"utility_PGJ has shape \[5, 7\]: expected \[5, 7, any\]"),
        ({"lam_J": torch.zeros(2)}, r"lam_J has shape \[2\]: expected \[3\]"),
        ({"lam_J": torch.full((3,), math.inf)}, r"lam_J\[0\] = inf"),
        ({"beta": 0.0}, "beta = 0.0: expected a finite number above 0"),
        ({"threshold": torch.zeros(2)}, r"threshold has shape \[2\]: expected \[3\]"),
        ({"threshold": "a"}, "threshold = 'a': expected a number or a tensor"),
        ({"utility_mean": math.nan}, r"utility_mean\[\] = nan"),
    ],
)
def test_bad_arguments(change, message):
    reward, utility, lam = scores()
    with pytest.raises(ValueError, match=message):
        dual_moments(**{"reward_PG": reward, "utility_PGJ": utility, "lam_J": lam, "beta": 1.0} | change)


def test_opcheck_and_fullgraph_compile():
    from kernels.moments import dual_moments_op

    torch._dynamo.reset()
    r, g, lam = torch.randn(3, 4), torch.randn(3, 4, 2), torch.tensor([0.5, 0.1])
    arguments = r, g, lam, 0.7, None, torch.tensor(0.2)
    checked = torch.library.opcheck(dual_moments_op, arguments)
    assert set(checked.values()) == {"SUCCESS"}

    def caller(r, g, lam):
        return lam - 0.1 * dual_moments(r * 2, g, lam, 0.7, threshold=0.2).gradient

    torch.testing.assert_close(
        torch.compile(caller, fullgraph=True, backend="aot_eager")(r, g, lam), caller(r, g, lam)
    )
