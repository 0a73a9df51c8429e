"""How likely responses are under the reference, beside how likely its own ones would be."""

from dataclasses import dataclass

import torch

from engine.model import packing
from engine.model.decoder import Decoder
from engine.model.packing import TOKENS_PER_FORWARD, Group
from kernels.gather import take

# Logits of so many tokens are in memory at once.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Surprise:
    """Log-probs of responses under the reference, in nats per token.

    A response that the model samples has, in expectation, the log-prob minus the entropies of the
    distributions from which its tokens are drawn.
    """

    logprob: float  # mean over the tokens
    entropy: float  # mean of these distributions, behind the same tokens
    se: float  # standard error of logprob + entropy, clustered by response


@torch.no_grad()
def surprise(model: Decoder, groups: list[Group], temperature: float) -> Surprise:
    """Measures the responses of some groups, at the sampling temperature and without --top-p and --top-k."""
    logprob_R, entropy_R, length_R = [], [], []
    for batch in packing.batches(groups, TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden = take(model(packed.tokens, packed.layout), packed.predict)
        logprobs, entropies = [], []
        for states, target in zip(
            hidden.split(TOKENS_AT_ONCE), packed.target_T.split(TOKENS_AT_ONCE), strict=True
        ):
            logits = model.logits(states).float() / temperature
            logprob_TV = logits.log_softmax(dim=1)
            logprobs.append(logprob_TV.gather(1, target[:, None])[:, 0].double().cpu())
            entropies.append(-(logprob_TV.exp() * logprob_TV).sum(dim=1).double().cpu())
        lengths = packed.cu_seqlens.diff().tolist()
        length_R += lengths
        logprob_R += [part.sum() for part in torch.cat(logprobs).split(lengths)]
        entropy_R += [part.sum() for part in torch.cat(entropies).split(lengths)]
    logprob, entropy, length = torch.stack(logprob_R), torch.stack(entropy_R), torch.tensor(length_R)
    total = length.sum()
    excess = (logprob + entropy) - length * ((logprob + entropy).sum() / total)
    return Surprise(
        logprob=float(logprob.sum() / total),
        entropy=float(entropy.sum() / total),
        se=float(excess.square().sum().sqrt() / total),
    )
