/* The CUDA runtime, except for memory (memory.c): the device, kernels, streams, events, errors. */
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* ---- the device ---- */

/* cuDNN needs a real driver, so PyTorch's use of it is disabled, as by torch.backends.cudnn.enabled = False and
   torch.backends.cuda.enable_cudnn_sdp(False). If these functions are not found, cudnnCreate is refused (driver.c). */
static void disable_cudnn(void) {
    void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    void *(*context)(void) = dlsym(torch, "_ZN2at13globalContextEv");
    void (*attention)(void *, char) = dlsym(torch, "_ZN2at7Context14setSDPUseCuDNNEb");
    void (*everything)(void *, char) = dlsym(torch, "_ZN2at7Context19setUserEnabledCuDNNEb");
    if (context && attention) attention(context(), 0);
    if (context && everything) everything(context(), 0);
    dlclose(torch);
}

API(cudaGetDeviceProperties)(char *out, int device) {
    NEEDS_DRIVER;
    if (device) return INVALID_DEVICE;
    fill_properties(out);
    return SUCCESS;
}
API(cudaGetDeviceProperties_v2)(char *out, int device) { return cudaGetDeviceProperties(out, device); }
API(cudaDeviceGetAttribute)(int *value, int which, int device) {
    NEEDS_DRIVER;
    *value = attribute(which);
    return device ? INVALID_DEVICE : SUCCESS;
}
API(cudaGetDevice)(int *device) { NEEDS_DRIVER; *device = 0; return SUCCESS; }
API(cudaSetDevice)(int device) { return device ? INVALID_DEVICE : virtual_device_use(); }
API(cudaGetDeviceCount)(int *count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    NEEDS_DRIVER;
    pthread_once(&once, disable_cudnn);
    *count = 1;
    return SUCCESS;
}
API(cudaDriverGetVersion)(int *version) { *version = CUDA_RUNTIME_VERSION; return SUCCESS; }
API(cudaRuntimeGetVersion)(int *version) { *version = CUDA_RUNTIME_VERSION; return SUCCESS; }
API(cudaDeviceCanAccessPeer)(int *can, int device, int peer) { (void)device, (void)peer; NEEDS_DRIVER; *can = 0; return SUCCESS; }
API(cudaDeviceGetPCIBusId)(char *out, int length, int device) {
    (void)device;
    NEEDS_DRIVER;
    snprintf(out, length, "0000:00:00.0");
    return SUCCESS;
}
API(cudaDeviceGetStreamPriorityRange)(int *least, int *greatest) { NEEDS_CONTEXT; *least = 0; *greatest = -5; return SUCCESS; }
API(cudaDeviceGetLimit)(size_t *value, int limit) { (void)limit; NEEDS_CONTEXT; *value = 0; return SUCCESS; }

API(cudaGetLastError)(void) { return is_forked() ? NOT_INITIALIZED : SUCCESS; }
API(cudaPeekAtLastError)(void) { return is_forked() ? NOT_INITIALIZED : SUCCESS; }
API_AS(const char *, cudaGetErrorString)(int error) { return error_text(error); }
API_AS(const char *, cudaGetErrorName)(int error) { return error_name(error); }

/* ---- kernels ---- */

/* The architecture that a kernel was built for: the newest one that PyTorch is built for and the device runs. CUB compares
   it with its own list. */
static int built_for(void) {
    static const int architectures[] = {120, 100, 90, 86, 80, 75, 70, 60, 50};
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++)
        if (architectures[i] <= gpu.capability) return architectures[i];
    return gpu.capability;
}

API(cudaFuncGetAttributes)(int *out, const void *function) { /* struct cudaFuncAttributes, 144 bytes */
    (void)function;
    NEEDS_CONTEXT;
    memset(out, 0, 144);
    out[6] = 1024;                       /* maxThreadsPerBlock */
    out[7] = 32;                         /* numRegs */
    out[8] = built_for();                /* ptxVersion */
    out[9] = built_for();                /* binaryVersion */
    out[11] = shared_memory_per_block(); /* maxDynamicSharedSizeBytes */
    return SUCCESS;
}
API(cudaOccupancyMaxActiveBlocksPerMultiprocessor)(int *out, const void *f, int threads, size_t shared) {
    (void)f, (void)shared;
    return occupancy(out, threads);
}
API(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)(int *out, const void *f, int threads, size_t shared, unsigned flags) {
    (void)f, (void)shared, (void)flags;
    return occupancy(out, threads);
}
/* ---- streams and events ---- */

API(cudaLaunchHostFunc)(void *stream, void (*function)(void *), void *data) { (void)stream; function(data); return SUCCESS; }
API(cudaStreamAddCallback)(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) {
    (void)flags;
    function(stream, SUCCESS, data);
    return SUCCESS;
}
API(cudaStreamCreate)(void **stream) { NEEDS_CONTEXT; *stream = new_handle(); return SUCCESS; }
API(cudaStreamCreateWithFlags)(void **stream, unsigned flags) { (void)flags; NEEDS_CONTEXT; *stream = new_handle(); return SUCCESS; }
API(cudaStreamCreateWithPriority)(void **stream, unsigned flags, int priority) { (void)flags, (void)priority; NEEDS_CONTEXT; *stream = new_handle(); return SUCCESS; }
API(cudaStreamGetPriority)(void *stream, int *priority) { (void)stream; *priority = 0; return SUCCESS; }
API(cudaStreamGetFlags)(void *stream, unsigned *flags) { (void)stream; *flags = 1; return SUCCESS; }
API(cudaStreamGetDevice)(void *stream, int *device) { (void)stream; *device = 0; return SUCCESS; }
API(cudaStreamGetId)(void *stream, unsigned long long *id) { *id = (uintptr_t)stream; return SUCCESS; }
API(cudaStreamIsCapturing)(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API(cudaStreamGetCaptureInfo)(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API(cudaStreamGetCaptureInfo_v2)(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API(cudaStreamGetCaptureInfo_v3)(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
API(cudaThreadExchangeStreamCaptureMode)(int *mode) { (void)mode; return SUCCESS; }
API(cudaEventCreate)(void **event) { NEEDS_CONTEXT; *event = new_handle(); return SUCCESS; }
API(cudaEventCreateWithFlags)(void **event, unsigned flags) { (void)flags; NEEDS_CONTEXT; *event = new_handle(); return SUCCESS; }
API(cudaEventElapsedTime)(float *milliseconds, void *from, void *to) { (void)from, (void)to; *milliseconds = 1; return SUCCESS; }
API(cudaEventElapsedTime_v2)(float *milliseconds, void *from, void *to) { (void)from, (void)to; *milliseconds = 1; return SUCCESS; }

/* ---- registration and launch of kernels by compiled code ---- */

struct dim3 { unsigned x, y, z; };
API_AS(void **, __cudaRegisterFatBinary)(void *image) { static void *registered[8]; (void)image; return registered; }
API_AS(unsigned, __cudaPushCallConfiguration)(struct dim3 grid, struct dim3 block_, size_t shared, void *stream) {
    (void)grid, (void)block_, (void)shared, (void)stream;
    return SUCCESS;
}
API(__cudaPopCallConfiguration)(struct dim3 *grid, struct dim3 *block_, size_t *shared, void **stream) {
    *grid = *block_ = (struct dim3){1, 1, 1};
    *shared = 0;
    *stream = 0;
    return SUCCESS;
}
API(__cudaGetKernel)(void **kernel, void *function) { *kernel = function; return SUCCESS; }
API(cudaGetKernel)(void **kernel, void *function) { *kernel = function; return SUCCESS; }
API(cudaGetFuncBySymbol)(void **function, void *symbol) { *function = symbol; return SUCCESS; }
