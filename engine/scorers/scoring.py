"""Scorers: rewards and costs of responses. This file is the only place where a sign changes: a cost becomes a utility by negation.

A scorer is a head on the trunk's hidden states (shipped ones, or made by `python -m engine.train head`), a Hugging Face
sequence-classification model, or a Python function `(prompts, responses) -> floats`. One frozen forward of the trunk gives the scores
of all heads that sit on it and the reference log-probs together.
"""

import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.decoder import Decoder, load, refuse_code, resolve, stored_tensors
from engine.model.packing import Group, LowerStates
from engine.policy.full import FullWeights, Weights, policy_of
from engine.records import Prompts, Rollouts, Scores
from engine.rollout.sampler import States
from engine.run.store import write_whole
from kernels import sequence_logprob

TOKENS_PER_FORWARD = 2048
# What scorers of texts are tried on: answers as unlike as a scorer may meet.
TRIAL = (
    "Yes.", "I am sorry, but I cannot help with that.", "FIRST: break the lock! Then take 3 or 4 of the old keys, you idiot.",
    "Basil likes light and warmth; water it when the soil feels dry, and cut the tips so that it grows bushy.",
)  # fmt: skip

TextFunction = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear score of a response: weight . mean(states of the response's tokens after `layer` decoder layers) + bias."""

    name: str
    layer: int
    weight_D: Tensor  # float64 [D]
    bias: float
    trunk: str  # fingerprint of the checkpoint whose states it reads
    sign: int = 1  # the score is sign x what it says

    def __call__(self, pooled_ND: Tensor) -> Tensor:
        """Scores float64 [N] of pooled states [N, D]."""
        return pooled_ND.double() @ self.weight_D.to(pooled_ND.device) + self.bias

    def save(self, folder: Path) -> None:
        """Write FOLDER/head.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = json.dumps({"name": self.name, "layer": self.layer, "bias": self.bias, "trunk": self.trunk}, sort_keys=True)
        write_whole(folder / "head.safetensors", safetensors.torch.save({"weight": self.weight_D.contiguous()}, metadata={"head": meta}))

    @staticmethod
    def load(folder: Path) -> "Head":
        """Read what `save` wrote. Raises UserError when it is no such file, or a head that says nothing."""
        file = folder / "head.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                head = Head(weight_D=stored.get_tensor("weight").double(), **json.loads(stored.metadata()["head"]))
        except Exception as error:
            raise UserError(f"{file}: not a score head ({type(error).__name__}); make one with python -m engine.train head.") from error
        if not (head.weight_D.isfinite().all() and math.isfinite(head.bias)):
            raise UserError(f"{file}: its weights are not finite; make it again with python -m engine.train head.")
        if not head.weight_D.any():
            raise UserError(f"{file}: its weights are all 0, so that it says nothing; make it again with python -m engine.train head.")
        return head


@dataclass(frozen=True, kw_only=True)
class TextScorer:
    """A scorer of texts: a Python function, or a sequence-classification model."""

    name: str
    function: TextFunction
    sign: int = 1  # the score is sign x what it says

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores float64 [N]. Raises UserError when the scorer fails or returns the wrong count."""
        try:
            scores = [float(x) for x in self.function(prompts, responses)]
        except Exception as error:
            raise UserError(
                f"scorer {self.name} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        if len(scores) != len(responses):
            raise UserError(f"scorer {self.name} returned {len(scores)} scores for {len(responses)} responses; return one per response.")
        return torch.tensor(scores, dtype=torch.float64)


Scorer = Head | TextScorer


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """The run's scorers, and the trunks of heads that sit on another model than the policy."""

    reward: Scorer
    costs: tuple[Scorer, ...]
    audits: tuple[Scorer, ...]

    @property
    def all(self) -> tuple[Scorer, ...]:
        """Reward, costs, audits, in this order."""
        return (self.reward, *self.costs, *self.audits)

    @property
    def layers(self) -> list[int]:
        """The trunk's layers that heads read, ascending."""
        return sorted({s.layer for s in self.all if isinstance(s, Head)})


def utility_of_cost(cost: Tensor) -> Tensor:
    """The utility that a cost stands for: larger is better."""
    return -cost


def load_scorers(reward: str, costs: Sequence[str], audits: Sequence[str], *, folder: Path, trunk: str, device: torch.device) -> Scorers:
    """The scorers that the names stand for (see `find_scorer`). folder, trunk: the policy's checkpoint and its fingerprint.

    Raises: UserError as `find_scorer`, and when two costs have one name, before any of them is loaded.
    """
    found = [find_scorer(spec, folder) for spec in (reward, *costs, *audits)]
    names = [one.name for one in found[1:]]
    for name in names:
        if name == "reward":
            raise UserError("--cost and --audit: reward is what the reward is called in all tables; give another name: NAME=SCORER.")
        if names.count(name) > 1:
            raise UserError(f"--cost and --audit: two scorers are named {name}; give each its own name: NAME=SCORER.")
    shared: Shared = {}
    first, *others = (one.load(trunk, device, shared) for one in found)
    return Scorers(reward=first, costs=tuple(others[: len(costs)]), audits=tuple(others[len(costs) :]))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a --reward, --cost or --audit value stands for, before weights are loaded."""

    name: str
    sign: int = 1
    load_as: Callable[[str, torch.device, "Shared"], "Head | TextFunction"]  # of the policy's fingerprint, the device, models loaded before

    def load(self, trunk: str, device: torch.device, shared: "Shared | None" = None) -> Scorer:
        """Load it; a model in `shared` serves again, another one is added. Raises: UserError where it cannot be."""
        what = self.load_as(trunk, device, {} if shared is None else shared)
        if isinstance(what, Head):
            return replace(what, name=self.name, sign=self.sign)
        return TextScorer(name=self.name, function=what, sign=self.sign)


def find_scorer(spec: str, folder: Path) -> Found:
    """The scorer of one --reward, --cost or --audit value: a head's name (in the policy's `folder` under heads/, or shipped), a head
    folder, module:function, or a sequence-classification model's folder or hub id, with #label where it has several labels. NAME= before it
    gives another name, NAME=- takes its negative as well.

    Raises: UserError naming the value and the forms accepted.
    """
    name, equals, named = spec.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name) and not Path(spec).exists():
        own = find_scorer(named.removeprefix("-"), folder)
        return replace(own, name=name, sign=-own.sign if named.startswith("-") else own.sign)
    shipped = Path(str(files("engine"))) / "assets" / "heads"
    places = [place for place in (folder / "heads" / spec, shipped / spec, Path(spec)) if (place / "head.safetensors").is_file()]
    if places:
        head = Head.load(places[0])
        return Found(name=head.name, load_as=lambda trunk, *where: head if head.trunk == trunk else _on_its_own_trunk(head, *where))
    if ":" in spec and not Path(spec).exists():
        return Found(name=spec.partition(":")[2], load_as=lambda trunk, *where: _python_function(spec))
    path = spec.partition("#")[0]
    if Path(path).is_dir() or spec.count("/") == 1:
        return Found(name=Path(path).name, load_as=lambda trunk, *where: _classifier(spec, *where))
    names = sorted(p.parent.name for p in shipped.glob("*/head.safetensors"))
    raise UserError(
        f"scorer {spec}: not found; give a shipped head ({', '.join(names)}), a head folder, a model folder or hub id, or module:function."
    )


def try_out(scorers: Scorers, prompts: Sequence[str]) -> list[str]:
    """Let every scorer of texts score `TRIAL`, answers to some of the run's `prompts`, so that a broken one is found before anything is
    sampled. Returns: a warning for each that gives all of them one score, as an honest one may.

    Raises: UserError when a scorer fails, returns the wrong count, or a value that is not finite.
    """
    asked, warnings = [prompts[i % len(prompts)] for i in range(len(TRIAL))], []
    for scorer in scorers.all:
        if isinstance(scorer, TextScorer):
            score_N = scorer(asked, list(TRIAL))
            _check_finite(scorer, score_N, asked, 1)
            if score_N.min() == score_N.max():
                warnings.append(
                    f"scorer {scorer.name} gave {float(score_N[0]):g} for each of {len(TRIAL)} trial answers; one that does so for all "
                    "responses ends the run after sampling"
                )
    return warnings


def _check_finite(scorer: Scorer, score_N: Tensor, prompts: Sequence[str], n: int) -> None:
    """prompts [N]: of each response; n: responses per prompt."""
    bad = (~score_N.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"scorer {scorer.name} gave {score_N[row].item()} for response {row % n} to prompt {row // n} ({prompts[row][:60]!r}); let it "
            "give a finite number for every response."
        )


def score(
    model: Decoder,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: Sequence[str],
    scorers: Scorers,
    *,
    temperature: float,
    memory_budget_bytes: int | None = None,
    reference: bool = True,
    states: States | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Score P * n responses; `texts` are the decoded responses, prompt-major. Without `reference` the log-probs are left out (0).
    `states`, where the rollout took them, spare the layers below.

    Raises: UserError when a scorer fails, returns the wrong count, or a value that is not finite.
    """
    if states is None or reference:
        pooled, ref_logprob = frozen_forward(
            model, packing.groups(prompts, rollouts), scorers.layers if states is None else [],
            temperature=temperature if reference else None, memory_budget_bytes=memory_budget_bytes,
            lower=states.lower if states else None, on_tokens=on_tokens,
        )  # fmt: skip
    if states is not None:
        pooled = states.pooled
    if not reference:
        ref_logprob = torch.zeros(len(prompts) * rollouts.n, dtype=torch.float64)
    repeated = [text for text in prompts.text for _ in range(rollouts.n)]
    columns = []
    for scorer in scorers.all:
        column = scorer(pooled[scorer.layer]) if isinstance(scorer, Head) else scorer(repeated, list(texts))
        _check_finite(scorer, column, repeated, rollouts.n)
        columns.append(scorer.sign * column.view(len(prompts), rollouts.n))
    j = 1 + len(scorers.costs)
    shape = (len(prompts), rollouts.n, 0)
    return Scores(
        reward_PG=columns[0],
        utility_PGJ=utility_of_cost(torch.stack(columns[1:j], dim=2)),
        audit_PGA=utility_of_cost(torch.stack(columns[j:], dim=2)) if columns[j:] else torch.zeros(shape, dtype=torch.float64),
        ref_logprob_PG=ref_logprob.view(len(prompts), rollouts.n),
    )


@torch.no_grad()
def frozen_forward(
    model: Decoder,
    all_groups: list[Group],
    layers: list[int],
    *,
    temperature: float | None,
    memory_budget_bytes: int | None = None,
    lower: LowerStates | None = None,
    adapter: Weights | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> tuple[dict[int, Tensor], Tensor]:
    """One forward of the reference, or of the policy `adapter`, over all groups: layer -> mean states of each response [N, D], and
    log-probs float64 [N].

    The log-probs are those at `temperature`; with None the layers above the highest one asked for are skipped and they are 0. With
    `adapter` states and log-probs are those of its policy; whose weights are all trained has no `layers`, as heads read the reference.
    `lower` holds the states of these groups already, so that only the layers above them run. Sequences stand in the order of groups
    and their responses.
    """
    if isinstance(adapter, FullWeights):
        assert not layers and lower is None, "heads read the reference's states"
    model, adapter = policy_of(model, adapter)
    for layer in layers:
        if not 0 <= layer <= model.config.num_layers:
            raise UserError(f"a head reads layer {layer}, the model has {model.config.num_layers}; use a head made for this model.")
    pooled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    logprobs = []
    for batch in packing.batches(all_groups, TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden, done = (lower.of(batch), lower.layer) if lower else (model.embed_tokens(packed.tokens), 0)
        for layer in layers:
            hidden, done = model.run(hidden, packed.layout, done, layer, adapter), layer
            pooled[layer].append(mean_states(hidden, packed))
        if temperature is None:
            logprobs.append(torch.zeros(len(packed.cu_seqlens) - 1, dtype=torch.float64))
        else:
            hidden = model.run(hidden, packed.layout, done, model.config.num_layers, adapter)
            logprobs.append(_logprob(model, hidden, packed, temperature, memory_budget_bytes)[0].double().cpu())
        on_tokens(len(packed.tokens))
    return {layer: torch.cat(parts).cpu() for layer, parts in pooled.items()}, torch.cat(logprobs)


def _logprob(
    model: Decoder, hidden: Tensor, packed: packing.Packed, temperature: float, memory_budget_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] of the responses and [T] of their tokens, from the residual stream after the last layer."""
    return sequence_logprob(
        model.final_norm(hidden)[packed.predict_T], model.head_weight, packed.target_T, packed.cu_seqlens, temperature=temperature,
        softcap=model.config.logit_softcap, memory_budget_bytes=memory_budget_bytes, return_token_logprob=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogprobGap:
    """How far the sampler's log-probs of the tokens that it drew lie from those of the training forward; nats per token."""

    mean: float  # of absolute differences
    max: float
    kl: float  # of the sampler to the training forward: mean of exp(d) - 1 - d, d the difference

    def __str__(self) -> str:
        sizes = f"{self.mean:.0e} nats per token on average, {self.max:.0e} at most, KL {self.kl:.0e}"
        return f"sampled and recomputed log-probs differ by {sizes}"


@torch.no_grad()
def logprob_gap(
    model: Decoder, all_groups: list[Group], rollouts: Rollouts, *, temperature: float, memory_budget_bytes: int | None = None,
    adapter: Weights | None = None,
) -> LogprobGap:  # fmt: skip
    """Of the rollouts at the groups' rows, which have at least one token."""
    model, adapter = policy_of(model, adapter)
    differences = []
    for batch in packing.batches(all_groups, TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden = model.run(model.embed_tokens(packed.tokens), packed.layout, 0, model.config.num_layers, adapter)
        trained = _logprob(model, hidden, packed, temperature, memory_budget_bytes)[1].double().cpu()
        sampled = torch.cat([rollouts.model_logprob[r, : len(t)] for g in batch for r, t in zip(g.rows, g.responses, strict=True)])
        differences.append(trained - sampled.double())
    d = torch.cat(differences)
    return LogprobGap(mean=float(d.abs().mean()), max=float(d.abs().max()), kl=float((d.expm1() - d).mean()))


def mean_states(hidden: Tensor, packed: packing.Packed) -> Tensor:
    """Mean state of each response's tokens [N, D] in float32; zeros for an empty response."""
    length = (packed.cu_seqlens[1:] - packed.cu_seqlens[:-1]).to(hidden.device)
    states = hidden[packed.state_T].float()
    return torch.segment_reduce(states, "sum", lengths=length, unsafe=True) / length.clamp(min=1)[:, None]


class Reading:
    """What a model says of texts, for all the scorers that share it: the last texts' is kept, so that each batch is read once.

    read(prompts, responses): one forward pass over them.
    """

    def __init__(self, read: Callable[[list[str], list[str]], Any]) -> None:
        self._read, self._texts, self._said = read, None, None

    def __call__(self, prompts: list[str], responses: list[str]) -> Any:
        """read(prompts, responses)."""
        if self._texts != (prompts, responses):
            self._said = self._read(prompts, responses)
            self._texts = list(prompts), list(responses)
        return self._said


# Models that read texts, by fingerprint or folder: (their reading, what its scorers take from it).
Shared = dict[str, tuple[Reading, Any]]


def _on_its_own_trunk(head: Head, device: torch.device, shared: Shared) -> TextFunction:
    """A head made for another checkpoint than the policy: that trunk (the quickstart model) is loaded and reads the texts, once for all
    heads on it."""
    if head.trunk not in shared:
        shared[head.trunk] = _trunk(head, device)
    states, layers = shared[head.trunk]
    layers.add(head.layer)
    return lambda prompts, responses: head(states(prompts, responses)[head.layer]).tolist()


def _trunk(head: Head, device: torch.device) -> tuple[Reading, set[int]]:
    """(texts -> layer -> mean states of each response [N, D], the layers wanted: those of the heads that share it)."""
    from engine.data.prompts import chat_ids
    from engine.model import decoder as model
    from engine.model import quickstart

    folder = quickstart.model_folder()
    if model.fingerprint(folder) != head.trunk:
        raise UserError(f"head {head.name} was made for another model (fingerprint {head.trunk}); use it with --model of that model.")
    trunk, tokenizer = load(folder, dtype=torch.float32, device=device), model.load_tokenizer(folder)
    layers: set[int] = set()

    def read(prompts: list[str], responses: list[str]) -> dict[int, Tensor]:
        all_groups = [
            Group(
                chat_ids([{"role": "user", "content": p}], tokenizer, "", "prompt"),
                [tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]],
                [i],
            )
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        return frozen_forward(trunk, all_groups, sorted(layers), temperature=None)[0]

    return Reading(read), layers


def _python_function(spec: str) -> TextFunction:
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"scorer {spec}: {error}; give module:function of something python can import here.") from error


def _classifier(spec: str, device: torch.device, shared: Shared) -> TextFunction:
    """A sequence-classification model: its single logit, or the log-odds of one label (`#label`; of two labels the second). Scorers of
    several labels share the model and its forward pass."""
    path, _, label = spec.partition("#")
    if path not in shared:
        shared[path] = _logits(spec, device)
    logits, labels = shared[path]
    if label and label not in labels:
        raise UserError(f"scorer {spec}: the model has no label {label}; it has {', '.join(labels)}.")
    if not label and len(labels) > 2:
        raise UserError(f"scorer {spec}: the model has {len(labels)} labels ({', '.join(labels)}); name one: {path}#{next(iter(labels))}.")
    chosen = labels[label] if label else len(labels) - 1

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        logits_NL = logits(prompts, responses)
        if logits_NL.shape[1] == 1:
            return logits_NL[:, 0].tolist()
        others = logits_NL.clone()
        others[:, chosen] = -math.inf
        return (logits_NL[:, chosen] - others.logsumexp(dim=1)).tolist()

    return function


def _logits(spec: str, device: torch.device) -> tuple[Reading, dict[str, int]]:
    """(texts -> logits float32 [N, labels] of a sequence-classification model, its labels)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve(spec.partition("#")[0])
    refuse_code(folder)
    stored_tensors(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"scorer {spec}: an adapter and a model in one folder; merge the adapter into the model, or remove one of them.")
    try:
        network, found = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        network = network.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"scorer {spec}: no sequence-classification model could be loaded ({reason}); give its local folder.") from error
    if found["missing_keys"]:
        raise UserError(f"scorer {spec}: it lacks tensor {min(found['missing_keys'])}; give a complete sequence-classification model.")
    length = min(tokenizer.model_max_length, 4096)

    @torch.inference_mode()
    def read(prompts: list[str], responses: list[str]) -> Tensor:
        if tokenizer.chat_template:
            pairs = zip(prompts, responses, strict=True)
            chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
            joined = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            inputs = tokenizer(joined, add_special_tokens=False, truncation=True, max_length=length)
        else:
            inputs = tokenizer(prompts, responses, truncation=True, max_length=length)
        found = torch.empty(len(prompts), network.config.num_labels)
        for chosen in packing.of_like_length(list(map(len, inputs["input_ids"])), TOKENS_PER_FORWARD):
            batch = tokenizer.pad({name: [values[i] for i in chosen] for name, values in inputs.items()}, return_tensors="pt")
            found[chosen] = network(**batch.to(device)).logits.float().cpu()
        return found

    return Reading(read), {str(name): index for index, name in network.config.id2label.items()}
