"""What the compilers make of the GPU kernels, read and counted without a GPU."""
