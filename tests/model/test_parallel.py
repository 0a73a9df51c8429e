"""Decoders that are spread over ranks: the rows of each, what it reads of the files, and what is gathered."""

from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401, imported before the forks
import torch.distributed.fsdp  # noqa: F401
from safetensors.torch import load_file, save_file

from engine import model
from engine.errors import UserError
from engine.model.parallel import first_row, gathered, is_spread, load_spread, rows_here
from engine.policy.sharded import ShardedWeights, gathered_weights
from engine.ranks import Ranks
from engine.rollout.sampler import generate
from tests.helpers.architectures import write_model
from tests.helpers.ranks import on_ranks

CPU = torch.device("cpu")
# No number of ranks divides these; on 4 ranks the last ones have no row of a norm of 2.
ODD = {"hidden_size": 21, "intermediate_size": 37, "head_dim": 2, "num_attention_heads": 3}
ODD |= {"num_key_value_heads": 1}
PROMPTS = [[1, 70, 75, 80], [1, 90], [5, 6, 7]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Writes a model with an own head, norms of queries and keys, and biases, and one with a tied head."""
    home = tmp_path_factory.mktemp("models")
    write_model(home / "own", "qwen 3, biases, windows, one key head", **ODD)
    write_model(home / "tied", "gemma 2", **ODD)
    return [home / "own", home / "tied"]


def load(folder: Path, ranks: Ranks, dtype=torch.float32, copies: int = 1):
    return load_spread(folder, dtype=dtype, device=CPU, ranks=ranks, copies=copies)


@pytest.mark.parametrize(("size", "copies"), [(4, 1), (4, 2)])
def test_ranks_have_the_rows_of_the_checkpoint_and_gather_its_decoder(folders, size, copies):
    dtypes = [torch.float32, torch.bfloat16]

    def work(ranks: Ranks) -> list[str]:
        wrong = []
        for folder, dtype in zip(folders, dtypes, strict=True):
            plain, network = model.load(folder, dtype=dtype), load(folder, ranks, dtype, copies)
            weights = dict(plain.named_parameters())
            for name, value in network.named_parameters():
                chunks = weights[name].chunk(size // copies)
                place = ranks.rank % (size // copies)
                expected = chunks[place] if place < len(chunks) else weights[name][:0]
                if not (value.dtype == dtype and torch.equal(rows_here(value), expected)):
                    wrong.append(f"{name}: other rows")
                if first_row(value) != sum(map(len, chunks[:place])):
                    wrong.append(f"{name}: other first row")
            policy = ShardedWeights(network)
            if not all(value.dtype == torch.float32 for value in policy.parameters()):
                wrong.append("masters are not float32")
            options = {"n": 2, "max_new_tokens": 6, "seed": 1}
            # Ranks may sample other numbers of prompts while the weights are gathered.
            own = slice(0, 1 + ranks.rank % 3)
            expected = generate(plain, PROMPTS[own], **options)
            with gathered(network) as reference, gathered_weights(policy) as whole:
                found = [
                    generate(reference, PROMPTS[own], **options),
                    generate(network, PROMPTS[own], adapter=whole, **options),
                ]
            for sampled in found:
                if not torch.equal(sampled.tokens, expected.tokens):
                    wrong.append(f"other tokens in {dtype}")
                if not torch.equal(sampled.model_logprob, expected.model_logprob):
                    wrong.append(f"other log-probs in {dtype}")
            try:
                with gathered(network):
                    raise KeyError
            except KeyError:
                pass
            if not all(hasattr(value, "to_local") for value in network.parameters()):
                wrong.append("weights stay gathered")
        return wrong

    assert on_ranks(size, work) == [[]] * size


def test_weights_that_are_not_finite_on_one_rank_are_refused_on_all(folders, tmp_path):
    """The number stands in the last rows of the last layer's keys, which rank 1 reads alone."""
    name = "model.layers.2.self_attn.k_proj.weight"
    weights = load_file(folders[0] / "model.safetensors")
    weights[name][-1, -1] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders[0] / "config.json").read_bytes())

    for error in on_ranks(2, lambda ranks: load(tmp_path, ranks)):
        assert isinstance(error, UserError) and f"numbers of tensor {name} are not finite" in str(error)


def test_a_plain_decoder_is_given_as_it_is(folders):
    network = model.load(folders[0])
    with gathered(network) as same:
        assert same is network and not is_spread(network)
