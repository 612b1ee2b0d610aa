"""C kernels for Adagrad's family on the CPU: two passes over memory, compiled once by the system's compiler."""
