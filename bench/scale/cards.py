"""What a prediction takes for granted of a GPU and of the wires between GPUs. Nothing here was measured by
this project: the peaks are the vendor's, the shares of them and the rates of messages are guesses, to be
replaced by figures of a real machine."""

from dataclasses import dataclass

GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU in a machine of eight."""

    name: str
    free_bytes: float  # what torch finds free on an idle one
    flops_per_s: float  # dense products in bfloat16, the vendor's peak
    bytes_per_s: float  # of its memory, the vendor's peak
    local_bytes_per_s: float  # that it sends to a GPU of its machine, in large messages
    remote_bytes_per_s: float  # that it sends to a GPU of another machine
    host_bytes_per_s: float = 2 * GIGA  # of samples, which go from processor to processor by gloo
    message_s: float = 50e-6  # before the first byte of a collective operation has arrived


CARDS = {
    card.name: card
    for card in (
        Card(
            name="a100",
            free_bytes=79 * GIGA,
            flops_per_s=312e12,
            bytes_per_s=2.04e12,
            local_bytes_per_s=200 * GIGA,
            remote_bytes_per_s=20 * GIGA,
        ),
        Card(
            name="h100",
            free_bytes=79 * GIGA,
            flops_per_s=989e12,
            bytes_per_s=3.35e12,
            local_bytes_per_s=300 * GIGA,
            remote_bytes_per_s=45 * GIGA,
        ),
        Card(
            name="h200",
            free_bytes=140 * GIGA,
            flops_per_s=989e12,
            bytes_per_s=4.8e12,
            local_bytes_per_s=300 * GIGA,
            remote_bytes_per_s=45 * GIGA,
        ),
    )
}
PER_MACHINE = 8
PASS_SHARE = 0.45  # of the peak of products, in passes over packed tokens
DECODE_SHARE = 0.6  # of the peak of the memory, in decoding steps
PROMPT_TOKENS = 128  # of each prompt; every response takes all of its tokens


def assumptions(card: Card) -> list[str]:
    """Says what a prediction for a card takes for granted, in lines."""
    return [
        f"{card.name}: {card.free_bytes / GIGA:.0f} GB free, peaks of {card.flops_per_s / 1e12:.3g} Tflop/s "
        f"in bfloat16 and {card.bytes_per_s / 1e12:.3g} TB/s, as the vendor says",
        f"passes reach {100 * PASS_SHARE:.0f} % of the peak of products, decoding {100 * DECODE_SHARE:.0f} % "
        "of that of the memory; attention, norms and drawing tokens take no time",
        f"a GPU sends {card.local_bytes_per_s / GIGA:.3g} GB/s within its machine of {PER_MACHINE} and "
        f"{card.remote_bytes_per_s / GIGA:.3g} GB/s beyond it; samples go {card.host_bytes_per_s / GIGA:.3g} "
        f"GB/s from processor to processor; each message waits {1e6 * card.message_s:.0f} us",
        "messages go around a ring, and nothing is computed meanwhile",
        f"every prompt has {PROMPT_TOKENS} tokens, and every response takes all of its tokens",
        "scorers are heads on the policy's own states; dual, verdict, report, files and the start take no "
        "time; no iterate is taken back",
    ]
