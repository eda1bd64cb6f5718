// Replaces libtorch_cuda.so at link time where the installed PyTorch has none: the one function
// that ops.cu needs from it.
int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  (void)device;
  *stream = 0;
  return 0;
}
