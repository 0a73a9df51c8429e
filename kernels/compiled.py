"""The compiled module of csrc/, where it was built."""

try:
    from kernels import _native
except ImportError:
    _native = None

# Instruction sets that this processor runs, fastest first.
instructions: tuple[str, ...] = () if _native is None else _native.instructions
