// Stands in for libtorch_cuda.so at link time, where the installed PyTorch has none: what ops.cu
// takes from it and from no other library.
int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  (void)device;
  *stream = 0;
  return 0;
}
