"""The processes of a run that torchrun starts, one for each device; without torchrun there is one.

All ranks run the same program on the same decisions. What depends on files, clocks or a solver is decided by
rank 0 and told to the others (`first`). Work is shared out (`share`), its results are put together again
(`of_shares`), and gradients are added up (`add`). `Ranks()` is a single process, for which each of these
returns at once. Tensors go from process to process as their bytes; what holds them is pickled, as all ranks
run the same program.

Neighbours may hold one model together (`arranged`), each a slice of it: then they have one share of the work,
and among themselves they are `Ranks` too.
"""

import io
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import LostRank, UserError

T = TypeVar("T")
# How long a rank waits for another one that neither answers nor ends; one that ends is noticed at once.
TIMEOUT = timedelta(minutes=30)
# Ranks that wait for the same one give up within so many seconds of one another.
ALIKE_S = 10.0


def launched() -> int:
    """Counts the processes that torchrun has started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def _starts() -> int:
    """Counts how often torchrun has started the processes of this machine anew (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    >>> Ranks().first(lambda: 3), list(Ranks().share(2)), Ranks().gather("a")
    (3, [0, 1], ['a'])
    """

    rank: int = 0
    size: int = 1
    local: int = 0  # its place among those of its machine
    local_size: int = 1
    store: dist.Store | None = None  # notes which rank has said why all of them end
    group: dist.ProcessGroup | None = None  # None: all processes
    model: "Ranks | None" = None  # those that hold one model together with this one; None: it has a whole one

    @staticmethod
    def start() -> "Ranks":
        """Joins the processes that torchrun has started with this one; where it has started no other, the
        process stays alone. Raises: LostRank where not all of them arrive; UserError for processes of several
        machines that were started anew."""
        if launched() == 1:
            return Ranks()
        place = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        with _connected():
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if _starts() and size > place[1]:
            # Each machine counts for itself (pytorch issue 108158), so the ranks would not find one another.
            raise UserError(
                "torchrun has started the ranks of this machine anew, which works on one machine alone; "
                "start the command again with --resume, and without --max-restarts."
            )
        # The store of torchrun outlives the ranks, and with it what those before these have told one another.
        return Ranks.join(dist.PrefixStore(f"start-{_starts()}", store), rank, size, *place)

    @staticmethod
    def join(store: dist.Store, rank: int, size: int, local: int, local_size: int) -> "Ranks":
        """Joins `size` processes that know one another by `store`."""
        with _connected():
            dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return Ranks(rank, size, local, local_size, store)

    def arranged(self, model_ranks: int) -> "Ranks":
        """Returns the ranks in groups of so many neighbours that hold one model together; with 1 each has a
        whole one. All call it. Raises: UserError where a group would lie on two machines; LostRank."""
        if model_ranks == self.model_size:
            return self
        if self.size == 1:
            raise UserError(
                f"--model-ranks {model_ranks}: one process holds the whole model; start torchrun "
                f"--nproc-per-node {model_ranks}, or leave it out."
            )
        if self.local_size % model_ranks or self.size % model_ranks:
            here = self.local_size
            fits = [str(n) for n in range(1, here + 1) if here % n == self.size % n == 0]
            raise UserError(
                f"--model-ranks {model_ranks} does not divide the {here} ranks of a machine, within which a "
                f"model's slices stay; use {' or '.join(fits)}, or start {model_ranks} ranks on each machine."
            )
        if model_ranks == 1:
            return replace(self, model=None)
        with _connected():
            group, _ = dist.new_subgroups(model_ranks, timeout=TIMEOUT, backend=_backend())
        place = self.rank % model_ranks
        return replace(self, model=Ranks(place, model_ranks, place, model_ranks, group=group))

    @property
    def model_size(self) -> int:
        """The number of ranks that hold one model together."""
        return 1 if self.model is None else self.model.size

    @property
    def shares(self) -> int:
        """The number of shares that work is cut into: ranks that hold one model together have one."""
        return self.size // self.model_size

    @property
    def leads(self) -> bool:
        """Tells whether this rank speaks for those that hold one model together; each of these has computed
        the same."""
        return self.model is None or self.model.is_first

    @property
    def is_first(self) -> bool:
        """Tells whether this is rank 0, which alone writes files and speaks."""
        return self.rank == 0

    def leave(self) -> None:
        """Leaves the others. It waits for nobody."""
        if self.size > 1:
            dist.destroy_process_group()

    def first(self, function: Callable[[], T]) -> T:
        """Returns on all ranks what `function` returns on rank 0, which alone calls it; its tensors are on
        the CPU elsewhere. Raises: on all ranks what it raises there, and LostRank."""
        if self.size == 1:
            return function()
        value, error, message = None, None, b""
        if self.is_first:
            try:
                value = function()
                message = _packed((value, None))
            except BaseException as raised:  # also Ctrl-C, so that the others do not wait for a word
                error, message = raised, _packed_error(raised)
        self._came()
        try:
            message = self._told(message)
        except LostRank:
            if error is None:
                raise
        if not self.is_first:
            value, error = _unpacked(message)
        if error is not None:
            raise error
        return value

    def share(self, n: int) -> range:
        """Returns this rank's part of n things in a row: consecutive ones, as many as any other rank has, or
        one more or less. Ranks that hold one model together have the same part."""
        place = self.rank // self.model_size
        return range(n * place // self.shares, n * (place + 1) // self.shares)

    def of_shares(self, value: T) -> list[T]:
        """Returns the values of all shares, see `gather`."""
        return self.gather(value if self.leads else None)[:: self.model_size]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in their order, on all of them; the tensors of other ranks are on
        the CPU. Raises: LostRank."""
        if self.size == 1:
            return [value]
        self._came()
        own = torch.frombuffer(bytearray(_packed(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            longest = int(max(sizes))
            padded = torch.cat((own, own.new_zeros(longest - len(own))))
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self.group)
        return [
            value if rank == self.rank else _unpacked(message[: int(size)].numpy().tobytes())
            for rank, (message, size) in enumerate(zip(found, sizes, strict=True))
        ]

    @contextmanager
    def only_first(self, context: AbstractContextManager[T]) -> Iterator[T | None]:
        """Enters a context on rank 0 alone; the others get None."""
        if self.is_first:
            with context as value:
                yield value
        else:
            yield None

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Adds tensors up over all ranks, in place: one message for each dtype and device. All ranks get the
        same bits. Raises: LostRank."""
        if self.size == 1:
            return
        self._came()
        kinds: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            with _connected():
                dist.all_reduce(flat, group=self.group)
            for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks, as `add` does; the tensor itself stays."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        with _connected():
            dist.all_reduce(total, group=self.group)
        return total

    def agreed(self, function: Callable[[], T]) -> T:
        """Returns what `function` returns on this rank; all call it. Raises: on all of them the UserError of
        the first rank that meets one, and LostRank."""
        value = error = None
        try:
            value = function()
        except UserError as raised:
            error = raised
        for found in self.gather(error):
            if found is not None:
                raise found
        return value

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Checks that all ranks have the same facts, by name. Raises: UserError naming the first that differs
        from rank 0's, and the rank."""
        first, *others = self.gather(dict(facts))
        for rank, theirs in enumerate(others, start=1):
            for name in first | theirs:
                there, here = first.get(name, "nothing"), theirs.get(name, "nothing")
                if here != there:
                    raise UserError(
                        f"{name}: rank {rank} has {here:.60}, rank 0 has {there:.60}; start all ranks with "
                        "the same command, files and versions."
                    )

    @contextmanager
    def node_first(self) -> Iterator[None]:
        """Runs a block on one rank of each machine before the others there, which then find what it has
        downloaded or made. Raises: LostRank."""
        if self.local:
            self.gather(None)
        yield
        if not self.local:
            self.gather(None)

    def restarted(self) -> bool:
        """Tells whether torchrun has started these processes anew, as one of the first ones has ended
        (--max-restarts). Raises: LostRank."""
        return self.size > 1 and max(self.gather(_starts())) > 0

    def says(self) -> bool:
        """Tells whether this rank is the first that has something to say of the end of all; also where nobody
        can tell, as torchrun itself has ended."""
        try:
            return self.store is None or self.store.add("said", 1) == 1
        except RuntimeError:
            return True

    def missed(self, error: LostRank) -> str:
        """Returns what this rank says of an error, naming the ranks that it has waited for in vain: those
        that have come less far, or else do not give up as well. Those that have ended cannot be told from
        those that are about to."""
        if self.store is None or "Timed out" not in str(error):
            return str(error)
        try:
            came = [self.store.add(f"came {rank}", 0) for rank in range(self.size)]
            late = {rank for rank, count in enumerate(came) if count < came[self.rank]}
            self.store.add(f"gave up {self.rank}", 1)
            deadline = time.monotonic() + ALIKE_S
            silent = set(range(self.size))
            while silent and time.monotonic() < deadline:
                silent = {rank for rank in silent if self.store.add(f"gave up {rank}", 0) == 0}
                time.sleep(0.1)
        except RuntimeError:
            return str(error)
        names = " and ".join(map(str, sorted(late or silent)))
        return str(error).replace("another rank has ended or", f"rank {names}", 1) if names else str(error)

    def _came(self) -> None:
        """Notes that this rank has come to a word that all exchange."""
        if self.store is not None:
            with _connected():
                self.store.add(f"came {self.rank}", 1)

    def _told(self, message: bytes) -> bytes:
        """Returns rank 0's message on all ranks."""
        size = torch.tensor([len(message)])
        with _connected():
            dist.broadcast(size, group=self.group, group_src=0)
            data = torch.frombuffer(bytearray(message or bytes(int(size))), dtype=torch.uint8)
            dist.broadcast(data, group=self.group, group_src=0)
        return data.numpy().tobytes()


# One process, as without torchrun.
ALONE = Ranks()


@contextmanager
def connected() -> Iterator[None]:
    """Raises LostRank where PyTorch says that a message did not get through; its other errors stay."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        with _connected():
            raise


@contextmanager
def _connected() -> Iterator[None]:
    """Raises LostRank where a message does not get through."""
    try:
        yield
    except RuntimeError as error:
        # gloo puts a place in its source before its words, and advice behind them.
        reason = re.sub(r"\[/[^\]]*\]\s*", "", str(error).splitlines()[0]).split(". ")[0]
        raise LostRank(f"another rank has ended or does not answer ({reason:.120}): see to that") from error


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, whose bytes go beside it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[bytes] = []

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Tensor):
            return None
        flat = value.detach().cpu().contiguous().reshape(-1)
        self.tensors.append(flat.view(torch.uint8).numpy().tobytes())
        return len(self.tensors) - 1, value.dtype, tuple(value.shape)

    def reducer_override(self, value: Any) -> Any:
        # An OSError keeps the file's name beside its arguments, and pickles well by itself.
        if isinstance(value, BaseException) and not isinstance(value, OSError):
            return _rebuilt, (type(value), value.args, dict(vars(value)))
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[memoryview]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, which: tuple) -> Tensor:
        number, dtype, shape = which
        data = bytearray(self._tensors[number])
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(shape)


def _packed(value: Any) -> bytes:
    """Returns a value as one message: a table of lengths, then the pickled rest, then the tensors' bytes."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    parts = [file.getvalue(), *packer.tensors]
    table = pickle.dumps([len(part) for part in parts])
    return b"".join([len(table).to_bytes(8, "little"), table, *parts])


def _unpacked(message: bytes) -> Any:
    """Undoes `_packed`."""
    view = memoryview(message)
    start = 8 + int.from_bytes(view[:8], "little")
    parts = []
    for size in pickle.loads(view[8:start]):
        parts.append(view[start : start + size])
        start += size
    return _Unpacker(io.BytesIO(parts[0]), parts[1:]).load()


def _packed_error(error: BaseException) -> bytes:
    """Returns an error as the message that stands for it where there is no value."""
    try:
        return _packed((None, error))
    except Exception:  # a class or a field that no other process can have
        return _packed((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _rebuilt(kind: type[BaseException], args: tuple, fields: dict) -> BaseException:
    """Makes an error anew without its constructor, which may take other arguments than those it keeps."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error
