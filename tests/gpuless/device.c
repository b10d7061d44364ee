/* One H100 that can be asked and never computes: enough of the CUDA runtime and driver for torch and Triton to
 * plan, compile and check shapes for sm_90 on a machine without a GPU.
 *
 * Built by pretended.py into one library. Preloaded, its cuda* functions stand before the real runtime; under the
 * name libcuda.so.1 it is the driver. Memory is the host's, streams and events are numbers, a launch does nothing:
 * whatever needs a result of a kernel is wrong here, and whatever only needs shapes, layouts and code is right.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <driver_types.h> /* the shape of cudaDeviceProp; declarations of the driver would bind our signatures */

enum { MAJOR = 9, MINOR = 0, PROCESSORS = 132, WARP = 32, REGISTERS = 65536, VERSION = 13020 };
static const size_t MEMORY = 80ull << 30, SHARED = 48 << 10, SHARED_MOST = 227 << 10, SHARED_ALL = 228 << 10;
static const char NAME[] = "NVIDIA H100 80GB HBM3";
static void *const HANDLE = (void *)64; /* of contexts, modules, functions, events: never followed */
static __thread int current;
static long last_stream = 1 << 12;

/* Calls that change nothing and succeed. */
#define SUCCEEDS(name) int name() { return 0; }
SUCCEEDS(cudaGetLastError) SUCCEEDS(cudaPeekAtLastError) SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaDeviceEnablePeerAccess) SUCCEEDS(cudaStreamQuery) SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamWaitEvent) SUCCEEDS(cudaThreadExchangeStreamCaptureMode) SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventQuery) SUCCEEDS(cudaEventRecord) SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventSynchronize) SUCCEEDS(cudaFuncSetAttribute) SUCCEEDS(cudaLaunchKernel)
SUCCEEDS(cudaLaunchKernelExC) SUCCEEDS(cuInit) SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxPopCurrent_v2) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuLaunchKernel) SUCCEEDS(cuLaunchKernelEx) SUCCEEDS(cuModuleUnload) SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit) SUCCEEDS(cuOccupancyMaxActiveClusters) SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuPointerGetAttributes) SUCCEEDS(cuStreamIsCapturing) SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col) SUCCEEDS(cuLibraryGetKernel) SUCCEEDS(cuLibraryLoadData)

/* Calls that answer with one number, or one handle, through their first argument. */
#define ANSWERS(name, type, value, ...) int name(type *out, ##__VA_ARGS__) { *out = (value); return 0; }
ANSWERS(cudaGetDeviceCount, int, 1)
ANSWERS(cudaGetDevice, int, current)
ANSWERS(cudaDriverGetVersion, int, VERSION)
ANSWERS(cudaRuntimeGetVersion, int, VERSION)
ANSWERS(cudaDeviceCanAccessPeer, int, 1, int a, int b)
ANSWERS(cudaStreamCreateWithPriority, void *, (void *)(last_stream += 16), unsigned flags, int priority)
ANSWERS(cudaEventCreateWithFlags, void *, HANDLE, unsigned flags)
ANSWERS(cudaEventElapsedTime, float, 1, void *from, void *to)
ANSWERS(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 2, const void *f, int b, size_t s, unsigned g)
ANSWERS(cuDriverGetVersion, int, VERSION)
ANSWERS(cuDeviceGetCount, int, 1)
ANSWERS(cuDeviceGet, int, number, int number)
ANSWERS(cuCtxGetCurrent, void *, HANDLE)
ANSWERS(cuCtxGetDevice, int, current)
ANSWERS(cuDevicePrimaryCtxRetain, void *, HANDLE, int device)
ANSWERS(cuModuleLoad, void *, HANDLE, const char *name)
ANSWERS(cuModuleLoadData, void *, HANDLE, const void *image)
ANSWERS(cuModuleLoadDataEx, void *, HANDLE, const void *image, unsigned n, void *options, void *values)
ANSWERS(cuModuleGetFunction, void *, HANDLE, void *module, const char *name)

int cuGetErrorString(int error, const char **text) { *text = "an error of a device that is none"; return 0; }

int cudaSetDevice(int device) { current = device; return 0; }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }

int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

int cudaStreamGetCaptureInfo(void *s, int *status, void *a, void *b, void *c, void *d, void *e) { *status = 0; return 0; }

int cudaMemGetInfo(size_t *unused, size_t *all) { *all = MEMORY; *unused = MEMORY - (1ull << 30); return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, NAME);
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = PROCESSORS;
    p->warpSize = WARP;
    p->totalGlobalMem = MEMORY;
    p->sharedMemPerBlock = SHARED;
    p->sharedMemPerBlockOptin = SHARED_MOST;
    p->sharedMemPerMultiprocessor = SHARED_ALL;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->concurrentKernels = p->unifiedAddressing = 1;
    return 0;
}

/* Runtime and driver number the same attributes alike. */
static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMultiProcessorCount: return PROCESSORS;
    case cudaDevAttrComputeCapabilityMajor: return MAJOR;
    case cudaDevAttrComputeCapabilityMinor: return MINOR;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_MOST;
    case cudaDevAttrMaxRegistersPerBlock: return REGISTERS;
    case cudaDevAttrWarpSize: return WARP;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    default: return 0;
    }
}

int cudaDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, NAME, length); return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

int cuFuncGetAttribute(int *value, int which, void *function) {
    *value = which == 0 ? 1024 : which == 4 ? 64 : 0; /* threads of a block, registers of a thread */
    return 0;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = (void *)pointer;
    return 0;
}

/* Memory of the device is memory of the host. */
static int allocate(void **pointer, size_t bytes) { *pointer = aligned_alloc(512, (bytes + 511) & ~(size_t)511); return 0; }
int cudaMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return allocate(pointer, bytes); }
int cudaFree(void *pointer) { free(pointer); return 0; }
int cudaFreeHost(void *pointer) { free(pointer); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memcpy(to, from, n); return 0; }
int cudaMemsetAsync(void *to, int value, size_t n, void *stream) { memset(to, value, n); return 0; }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, int *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
