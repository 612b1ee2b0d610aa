"""C kernels for Adagrad and its rules on the CPU: two passes over memory, compiled once by the system compiler."""
