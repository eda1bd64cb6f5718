// A libcuda.so.1 whose launches do nothing: Triton's launcher runs on it unchanged, without a GPU.
#include <stddef.h>
typedef int Result;
typedef unsigned long long Pointer;
long launches;

#define OK(name, arguments) \
  Result name arguments { return 0; }
#define GIVES(name, arguments, statement) \
  Result name arguments {                 \
    statement;                            \
    return 0;                             \
  }
GIVES(cuLaunchKernel, (void), ++launches)
GIVES(cuLaunchKernelEx, (const void* config, void* f, void** arguments, void** extra), ++launches)
GIVES(cuPointerGetAttribute, (void* data, int attribute, Pointer p), *(Pointer*)data = p)
GIVES(cuModuleLoadData, (void** module, const void* image), *module = &launches)
GIVES(cuModuleGetFunction, (void** f, void* module, const char* name), *f = &launches)
GIVES(cuFuncGetAttribute, (int* value, int attribute, void* f), *value = attribute ? 0 : 1024)
GIVES(cuDeviceGet, (int* device, int ordinal), *device = ordinal)
GIVES(cuDeviceGetCount, (int* count), *count = 1)
GIVES(cuDeviceGetAttribute, (int* value, int attribute, int device), *value = 232448)
GIVES(cuCtxGetCurrent, (void** context), *context = &launches)
GIVES(cuDevicePrimaryCtxRetain, (void** context, int device), *context = &launches)
GIVES(cuCtxGetLimit, (size_t* value, int limit), *value = 1 << 20)
GIVES(cuDriverGetVersion, (int* version), *version = 13000)
GIVES(cuGetErrorString, (int error, const char** text), *text = "none")
GIVES(cuOccupancyMaxActiveClusters, (int* count, void* f, const void* config), *count = 1)
OK(cuInit, (unsigned flags))
OK(cuCtxSetCurrent, (void* context))
OK(cuCtxSetLimit, (int limit, size_t value))
OK(cuFuncSetAttribute, (void* f, int attribute, int value))
OK(cuFuncSetCacheConfig, (void* f, int config))
OK(cuModuleUnload, (void* module))
OK(cuTensorMapEncodeTiled, (void))
