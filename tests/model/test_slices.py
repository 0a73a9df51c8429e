"""Decoders that ranks hold in slices, against the whole one: what each reads, values, gradients, tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import model
from engine.errors import UserError
from engine.model import folder as model_folder
from engine.model.decoder import Decoder
from engine.model.names import FUSED
from engine.model.slices import sliced
from engine.policy.lora import Adapter
from engine.ranks import Ranks
from engine.rollout.sampler import generate
from tests.helpers.architectures import write_model
from tests.helpers.ranks import on_ranks

PROMPTS = [[1, 70, 75, 80], [1, 90], [5, 6, 7]]
TOKENS, ENDS = torch.tensor([token for prompt in PROMPTS for token in prompt]), torch.tensor([0, 4, 6, 9])
QWEN = "qwen 3, biases, windows, one key head"
# Heads and MLP of odd sizes; Llama has all biases, Gemma norms after the blocks that add one, and caps.
MODELS = {
    "llama, biases": {"num_attention_heads": 6, "hidden_size": 18, "intermediate_size": 74, "head_dim": 10},
    "gemma 2": {"hidden_size": 20, "intermediate_size": 38, "head_dim": 6},
    QWEN: {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 44},
}
LINEARS = {QWEN: ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")}  # those with an adapter, if not all


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    for number, (name, sizes) in enumerate(MODELS.items()):
        write_model(home / str(number), name, **sizes)
    return {name: home / str(number) for number, name in enumerate(MODELS)}


def adapted(network: Decoder, name: str) -> Adapter:
    """Returns an adapter that moves a model, from its second layer on."""
    linears = {"linears": LINEARS[name]} if name in LINEARS else {}
    adapter = Adapter.on(network, rank=3, alpha=4.0, share=0.4, seed=0, **linears)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter.up.values():
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
    return adapter


def passed(folder: Path, name: str, ranks: Ranks, *, checkpointed: bool) -> dict[str, Tensor]:
    """Passes tokens through a model in float64; returns the states before and after its layers and the
    gradients of every matrix of the adapter, summed over the ranks."""
    network = model.load(folder, dtype="float64", slices=ranks)
    adapter, found = adapted(network, name), {}
    states = network(
        TOKENS,
        ENDS,
        adapter=adapter,
        checkpointed=checkpointed,
        tap=lambda layer, x: found.setdefault(f"{layer}", x.detach()),
    )
    found["states"] = states.detach()
    (network.logits(states).log_softmax(1) * torch.linspace(-1, 2, 97)).sum().backward()
    gradients = {key: value.grad for key, value in adapter.named_parameters()}
    ranks.add(list(gradients.values()))
    return found | gradients


@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_of_slices_are_those_of_the_whole(folders, name):
    """Qwen 3 on 4 ranks, whose slices have one key head each."""
    size, checkpointed = (4, True) if name in LINEARS else (2, False)
    whole = passed(folders[name], name, Ranks(), checkpointed=False)
    assert len(whole) == 3 + 1 + 1 + 2 * 2 * (3 if name in LINEARS else 7)
    for own in on_ranks(size, lambda ranks: passed(folders[name], name, ranks, checkpointed=checkpointed)):
        assert own.keys() == whole.keys()
        for key, value in whole.items():
            assert value.norm() > 0, key
            assert (own[key] - value).norm() <= 1e-12 * value.norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_slices_draw_the_tokens_of_the_whole(folders, name):
    options = {"n": 3, "max_new_tokens": 7, "seed": 1, "stop_token_ids": tuple(range(2, 20))}

    def drawn(ranks: Ranks):
        network = model.load(folders[name], slices=ranks)
        return [
            generate(network, PROMPTS, adapter=adapter, **options)
            for adapter in (None, adapted(network, name))
        ]

    whole = drawn(Ranks())
    assert not torch.equal(whole[0].tokens, whole[1].tokens)
    for own in on_ranks(2, drawn):
        for found, expected in zip(own, whole, strict=True):
            assert torch.equal(found.tokens, expected.tokens)
            assert (found.model_logprob - expected.model_logprob).abs().max() < 3e-5


def test_a_rank_reads_and_holds_its_slice_alone(folders, monkeypatch):
    name = "llama, biases"
    whole, read, opened = dict(model.load(folders[name]).named_parameters()), [], model_folder.safe_open

    class Watched:
        """An open file that notes what is read of it as a whole."""

        def __init__(self, *words, **options) -> None:
            self.file = opened(*words, **options)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, tensor: str) -> Tensor:
            read.append(tensor)
            return self.file.get_tensor(tensor)

        def get_slice(self, tensor: str):
            return self.file.get_slice(tensor)

    monkeypatch.setattr(model_folder, "safe_open", Watched)
    d = MODELS[name]["head_dim"]
    # Six heads and two key heads in two slices, and 74 numbers inside the MLP.
    rows = {"qkv": [(3 * d, 6 * d), (7 * d, 8 * d), (9 * d, 10 * d)], "gate_up": [(37, 74), (111, 148)]}
    columns = {"o": (3 * d, 6 * d), "down": (37, 74)}
    network = model.load(folders[name], slices=Ranks(1, 2))
    for key, value in network.named_parameters():
        matrix = key.rpartition(".")[2]
        if matrix.removesuffix("_bias") in rows:
            cuts = rows[matrix.removesuffix("_bias")]
            expected = torch.cat([whole[key][first:end] for first, end in cuts])
        elif matrix in columns:
            expected = whole[key][:, slice(*columns[matrix])]
        else:
            expected = whole[key] * (0 if matrix in ("o_bias", "down_bias") else 1)
        assert torch.equal(value, expected), key
    cut = [linear for matrix in FUSED for linear in FUSED[matrix]]
    assert read and not [key for key in read if any(key.endswith(f"{linear}.weight") for linear in cut)]


def test_dropout_drops_the_same_inputs_of_all_slices_but_others_of_their_own(folders):
    """What all slices see is dropped alike; of what a slice alone computes each drops other numbers."""
    name = "gemma 2"

    def kept(place: int) -> dict[str, Tensor]:
        network = model.load(folders[name], slices=Ranks(place, 2))
        factors = adapted(network, name).with_dropout(0.5, 9).fused(2, 3)[2]
        return {matrix: f.seen(torch.ones(8, 12))[0] for matrix, f in factors.items()}

    first, second = kept(0), kept(1)
    assert {m: torch.equal(first[m], second[m]) for m in first} == {
        "qkv": True, "o": False, "gate_up": True, "down": False,
    }  # fmt: skip


@pytest.mark.parametrize("slices", [3, 4])
def test_slices_that_a_model_does_not_have_are_refused(folders, slices):
    config = model.load(folders["llama, biases"]).config
    with pytest.raises(UserError) as error:
        sliced(config, slices)
    assert str(error.value) == (
        f"--model-ranks {slices} does not divide the model's 2 key heads and its intermediate size of 74; "
        "use 1 or 2."
    )
    assert (sliced(config, 2).num_heads, sliced(config, 2).intermediate_size) == (3, 37)
