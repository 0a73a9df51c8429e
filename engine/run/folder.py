"""Where everything of a run folder stands.

RUN/config.json                                    algorithm, settings, versions, the model's fingerprint
RUN/inputs.safetensors                             prompts, pairs and digests of all that the run was made
                                                   from, and a copy of config.json
RUN/model                                          the model's files but its weights: tokenizer, templates
RUN/stages/NN-NAME.safetensors                     the result of a stage
RUN/stages/NN-NAME.partial[.previous].safetensors  the last two states inside an unfinished stage
RUN/stages/NN-NAME.DIGEST.shards                   tensors of one of these that are spread over ranks
RUN/metrics.jsonl                                  the rows of all stages, in order
RUN/timing.jsonl                                   seconds and speeds, which alone differ in equal runs
RUN/adapters/iteration-T                           the weights of iterate T: a PEFT folder, or a
                                                   Hugging Face folder with --tune full
RUN/outputs.json                                   digests of what was written outside stages/
RUN/accepted.jsonl                                 changes of scorers that --accept-changes let pass
RUN/adapters/rejected-T                            an iterate past --max-kl
RUN/evaluation.json                                the verdict
RUN/heldout.jsonl                                  the responses that the verdict judged
RUN/report.png, report.html                        the report
RUN/certificate.json, certificate.html             what the verdict says, and on what it rests
RUN/evaluation-N                                   what `engine.evaluate` wrote
RUN/profile-N                                      what it wrote with --profile
RUN/judged.jsonl                                   the prompts that have judged the run
RUN/judge-cache.jsonl                              what judges behind HTTP have answered
RUN/tensorboard, wandb, trackers.jsonl             what --trackers wrote, and how many rows each has
RUN/nonfinite.safetensors                          the batch that stopped the run
"""

from dataclasses import dataclass
from pathlib import Path

ITERATE = "iteration-"
REJECTED = "rejected-"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    >>> RunFolder(Path("runs/a")).iterate(3).as_posix()
    'runs/a/adapters/iteration-3'
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def outputs(self) -> Path:
        return self.path / "outputs.json"

    @property
    def accepted(self) -> Path:
        return self.path / "accepted.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.jsonl"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def heldout(self) -> Path:
        return self.path / "heldout.jsonl"

    @property
    def report_png(self) -> Path:
        return self.path / "report.png"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.json"

    @property
    def certificate_html(self) -> Path:
        return self.path / "certificate.html"

    @property
    def judged(self) -> Path:
        return self.path / "judged.jsonl"

    @property
    def judge_cache(self) -> Path:
        return self.path / "judge-cache.jsonl"

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite.safetensors"

    def stage_stem(self, number: int, name: str) -> str:
        """Returns the beginning of the names of a stage's files; stages are counted from 1."""
        return f"{number:02d}-{name.replace('/', '-')}"

    def iterate(self, iteration: int) -> Path:
        """Returns the folder of an iterate's weights."""
        return self.adapters / f"{ITERATE}{iteration}"

    def rejected(self, iteration: int) -> Path:
        """Returns the folder of an iterate that went past --max-kl."""
        return self.adapters / f"{REJECTED}{iteration}"

    def iterates(self) -> dict[int, Path]:
        """Lists the folders of iterates by number, ascending; their contents may be half written."""
        named = {path.name.removeprefix(ITERATE): path for path in self.adapters.glob(f"{ITERATE}*")}
        return {int(number): named[number] for number in sorted(filter(str.isdecimal, named), key=int)}

    def next_evaluation(self) -> Path:
        """Returns the first folder evaluation-N that does not exist yet."""
        return self._next("evaluation")

    def next_profile(self) -> Path:
        """Returns the first folder profile-N that does not exist yet."""
        return self._next("profile")

    def _next(self, name: str) -> Path:
        number = 1
        while (self.path / f"{name}-{number}").exists():
            number += 1
        return self.path / f"{name}-{number}"
