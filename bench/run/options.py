"""Options that several cases share, with their help."""

from typing import Annotated

import tyro

Model = Annotated[
    str, tyro.conf.arg(help="Hugging Face folder; the quickstart's model where it is left out.")
]
Shape = Annotated[
    str,
    tyro.conf.arg(
        help="Instead of a model random weights in the sizes of a published one: smollm2-135m, "
        "qwen2.5-0.5b, qwen3-0.6b, llama-3.2-1b, qwen2.5-1.5b or llama-3.1-8b."
    ),
]
Dtype = Annotated[str, tyro.conf.arg(help="float32 or bfloat16.")]
Device = Annotated[str, tyro.conf.arg(help="cpu or cuda.")]
KeepPages = Annotated[
    bool,
    tyro.conf.arg(
        help="Freed memory stays with the process, for all candidates, as engine.train arranges it on a "
        "CPU; else as the allocator comes."
    ),
]
Repeats = Annotated[int, tyro.conf.arg(help="Rounds; every candidate runs once in each.")]
Save = Annotated[
    bool, tyro.conf.arg(help="Add the figures to bench/results.jsonl and write bench/RESULTS.md anew.")
]
