"""C kernels for Adagrad's family on the CPU: two passes over memory, compiled once by the system's compiler."""

from optim.native.kernels import NATIVE, is_available

__all__ = ["NATIVE", "is_available"]
