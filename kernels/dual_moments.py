"""Value, gradient and Hessian of the dual function from sampled scores. Plain torch serves every device: the arrays are small."""

from kernels.reference import dual_moments

__all__ = ["dual_moments"]
