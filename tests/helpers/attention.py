"""Layouts of packed tokens, ways to attend, and attention run by run, to compare with."""

import torch

from engine.model.attention import Layout

LAYOUTS = {
    "sequences": lambda: Layout.packed(torch.tensor([0, 5, 5, 6, 17])),
    "groups": lambda: Layout.shared_prompt([6, 1, 3], [[4, 9, 1], [], [0, 5]]),
}
HOW = [{}, {"window": 1}, {"window": 4}, {"window": 30}, {"window": 4, "softcap": 0.8, "scale": 0.3}]


def by_runs(query, key, value, cu_query, cu_key, scale=None, softcap=None, window=None):
    """Attends run by run, in the order of the packed queries; a run's last query
    sees all of the run's keys."""
    group, out = query.shape[1] // key.shape[1], []
    for run in range(len(cu_query) - 1):
        q = query[cu_query[run] : cu_query[run + 1]]
        k, v = (x[cu_key[run] : cu_key[run + 1]].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)
