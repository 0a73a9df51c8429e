"""The definitions of the ops against textbook formulas, by hand where that is short;
and that they share no code."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from tests.helpers.decode import problem as decode_problem
from tests.helpers.losses import LENGTHS, PAIRS, problem


def test_it_imports_nothing_of_kernels():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(node.module.split(".")[0])
    assert imported == {"torch", "typing"}


def test_log_probs_are_negative_cross_entropies():
    data, _ = problem(torch.float64, bias=True, weighted=True)
    logits = F.linear(data["hidden"], data["weight"], data["bias"])
    logits = 3 * torch.tanh(logits / 3) / 0.7
    want = -F.cross_entropy(logits, data["target"], reduction="none")
    logprob, token = reference.sequence_logprob(
        **data, temperature=0.7, softcap=3.0, return_token_logprob=True
    )
    torch.testing.assert_close(token, want, rtol=1e-12, atol=1e-12)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    sums = torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(0, owner, want * data["token_weight"])
    torch.testing.assert_close(logprob, sums, rtol=1e-12, atol=1e-12)


def test_preference_loss_of_certain_labels_is_that_of_dpo():
    data, labels = problem(torch.float64)
    ratio = reference.sequence_logprob(**data) - labels["ref_logprob"]
    want = -F.logsigmoid(0.4 * (ratio[PAIRS[:, 0]] - ratio[PAIRS[:, 1]])).mean()
    given = {"labels": "given", "preference": torch.ones(len(PAIRS))}
    result = reference.lagrangian_preference_loss(**data, **labels, beta=0.4, **given)
    torch.testing.assert_close(result.loss, want, rtol=1e-12, atol=1e-12)
    score = labels["reward"].double() + labels["utility"].double() @ labels["lam"].double()
    soft = reference.lagrangian_preference_loss(**data, **labels, beta=0.4)
    q = torch.sigmoid(score[PAIRS[:, 0]] - score[PAIRS[:, 1]])
    torch.testing.assert_close(soft.preference, q, rtol=1e-12, atol=1e-12)
    sampled = reference.lagrangian_preference_loss(
        **data, **labels, beta=0.4, labels="sampled", uniform=torch.full((len(PAIRS),), 0.5)
    )
    assert sampled.preference.tolist() == (q > 0.5).double().tolist()


def test_least_squares_and_listwise_losses_by_hand():
    """There are three sequences of one token: L - ref is 0, 1 and 3, and s is 2, 1 and 1."""
    hidden, weight = torch.zeros(3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    rows = {"hidden": hidden, "weight": weight, "target": torch.arange(3), "cu_seqlens": torch.arange(4)}
    rows |= {
        "pairs": torch.tensor([[2, 0], [0, 1]]),
        "ref_logprob": torch.tensor([0.0, -1, -3]) - math.log(5),
    }
    rows |= {"reward": torch.tensor([1.0, 1.0, -1.0]), "utility": torch.tensor([[2.0], [0.0], [4.0]])}
    rows |= {"lam": torch.tensor([0.5]), "beta": 0.5}

    def loss(**labels):
        return reference.lagrangian_preference_loss(**rows, **labels).loss.item()

    assert loss(labels="regression") == pytest.approx(((1.5 + 1) ** 2 + (-0.5 - 1) ** 2) / 2 / 2)
    value = torch.tensor([1.0, 0.0, 2.0])
    squares = (0 - 1) ** 2 + (0.5 - 1) ** 2 + (1.5 + 1) ** 2
    assert loss(labels="single", value=value) == pytest.approx(squares / 3 / 2)
    # Sequences 0 and 2 are a group: softmax(4, 2) against softmax(0, 3). Sequence 1 is one, and adds 0.
    p, log_p = 1 / (1 + math.exp(-2)), [-math.log1p(math.exp(3)), -math.log1p(math.exp(-3))]
    entropy = -p * log_p[0] - (1 - p) * log_p[1]
    assert loss(labels="listwise", group=torch.tensor([8, -1, 8])) == pytest.approx(entropy / 2)


def test_advantages_by_hand():
    group, reward = torch.tensor([4, 4, 4, 1]), torch.tensor([1.0, 2.0, 6.0, 5.0])
    utility, lam = torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.tensor([2.0])
    rloo = reference.group_advantage(group, reward, utility, lam, "rloo")
    assert rloo.tolist() == [3 - 4, 2 - 4.5, 6 - 2.5, 0]
    whole = reference.group_advantage(group, reward, utility, lam, "group_norm")
    z = [(x - 3) / math.sqrt(14 / 3) for x in (1, 2, 6)]
    w = [(x - 1 / 3) / math.sqrt(2 / 9) for x in (1, 0, 0)]
    assert whole.tolist() == pytest.approx([a + 2 * b for a, b in zip(z, w, strict=True)] + [0])


def test_policy_loss_on_policy_is_reinforce():
    """Without old log-probs the gradient is that of -mean A log p; clipping is done
    by hand where the ratio is e."""
    data, labels = problem(torch.float64)
    scores = {k: labels[k] for k in ("reward", "utility", "lam")} | {"group": torch.arange(10) % 3}
    data["hidden"].requires_grad_()
    result = reference.lagrangian_policy_loss(**data, **scores)
    a = reference.group_advantage(*(scores[k] for k in ("group", "reward", "utility", "lam")), "rloo")
    a = a.repeat_interleave(torch.tensor(LENGTHS))
    token = reference.sequence_logprob(**data, return_token_logprob=True)[1]
    (got,) = torch.autograd.grad(result.loss, data["hidden"])
    (want,) = torch.autograd.grad(-(a * token).mean(), data["hidden"])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    clipped = reference.lagrangian_policy_loss(
        **data, **scores, old_logprob=token.detach() - 1, ref_logprob=token.detach() + 2, clip=(0.2, 0.5)
    )
    torch.testing.assert_close(clipped.loss, -torch.where(a > 0, 1.5 * a, math.e * a).mean())
    assert clipped.kl.item() == pytest.approx(2.0)
    assert clipped.clip_fraction == (a > 0).double().mean()


def test_dual_moments_by_hand():
    """There are two responses of one prompt."""
    reward, utility = torch.tensor([[0.0, 1.0]]), torch.tensor([[[1.0], [-1.0]]])
    moments = reference.dual_moments(reward, utility, torch.tensor([0.5]), 2.0, utility_mean=0.0)
    a, b = 0.5 / 2, (1 - 0.5) / 2
    weight = [math.exp(x) / (math.exp(a) + math.exp(b)) for x in (a, b)]
    mean = weight[0] - weight[1]
    assert moments.value.item() == pytest.approx(2 * math.log((math.exp(a) + math.exp(b)) / 2))
    assert moments.gradient.item() == pytest.approx(mean, abs=1e-12)
    assert moments.hessian.item() == pytest.approx((1 - mean**2) / 2)
    assert moments.ess.item() == pytest.approx(1 / sum(w**2 for w in weight))


def test_samples_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    slow = torch.tensor([[9.0, 2.0, 1.0]])
    token, logprob, model_logprob = reference.sample(logits, slow)
    assert token.item() == 2 and [x.exp().item() for x in (logprob, model_logprob)] == pytest.approx(
        [0.2, 0.2]
    )
    token, logprob, model_logprob = reference.sample(logits, slow, top_k=2)
    assert token.item() == 1
    assert (logprob.exp().item(), model_logprob.exp().item()) == pytest.approx((0.375, 0.3))
    assert reference.sample(logits, slow, top_p=0.5)[0].item() == 0
    assert reference.sample(logits, slow, temperature=0.5)[2].exp().item() == pytest.approx(0.09 / 0.38)


def test_decode_attention_is_torch_s_attention():
    data = decode_problem(groups=(1, 2), length=(4, 3), room=3, used=2, dtype=torch.float64)
    out = reference.decode_attention(**data).view(3, 4, 16)
    for r, p in ((0, 0), (1, 1), (2, 1)):
        n = int(data["prompt_length"][p])
        k, v = (
            torch.cat([data[f"prompt_{x}"][p, :, :n], data[f"own_{x}"][r, :, :2]], 1).repeat_interleave(2, 0)
            for x in ("keys", "values")
        )
        want = F.scaled_dot_product_attention(data["query"][r][:, None], k, v)[:, 0]
        torch.testing.assert_close(out[r], want, rtol=1e-12, atol=1e-12)
