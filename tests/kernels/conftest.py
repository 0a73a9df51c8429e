"""Fixtures of the kernel tests."""

import pytest
import torch

from kernels import compiled
from kernels.loss_head import passes
from tests.helpers.schemes import Taken


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return torch.device(request.param)


@pytest.fixture
def taken(monkeypatch, device):
    """Records the letters of the schemes that calls take.

    So a case of one scheme cannot turn into one of another unseen.
    """
    letters, plan, parts, policy_terms = Taken(), passes.plan, passes.parts_of, passes.policy_terms
    letters.device = device

    def planned(workspace, hidden, *rest):
        p = plan(workspace, hidden, *rest)
        letters.add(
            {"values": "A", "product": "C"}.get(p.kind) or ("B" if p.kept == len(hidden) else "part of B")
        )
        return p

    def parted(pairs, lengths, chunk):
        result = parts(pairs, lengths, chunk)
        letters.add("E" if any(part.opposite for part in result) else "D")
        return result

    monkeypatch.setattr(passes, "plan", planned)
    monkeypatch.setattr(passes, "parts_of", parted)
    monkeypatch.setattr(passes, "policy_terms", lambda *x: letters.add("F") or policy_terms(*x))
    return letters


@pytest.fixture(params=["compiled", "plain torch"])
def either_rows(request, monkeypatch):
    """Does the rows by compiled code where there is some, and by plain torch."""
    if request.param == "plain torch":
        monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
