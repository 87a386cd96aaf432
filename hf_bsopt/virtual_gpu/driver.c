/* The functions of the CUDA driver that PyTorch uses, their lookup by name, and functions that are refused. */
#define _GNU_SOURCE
#include "device.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory: expandable segments are address ranges into which pages are mapped ---- */

static struct { size_t *bytes; uint64_t count, capacity; } pages; /* bytes: for each handle that cuMemCreate returned */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for pages */

API(cuMemAddressReserve)(uintptr_t *at, size_t bytes, size_t alignment, uintptr_t hint, unsigned long long flags) {
    static uintptr_t next = RANGES;
    NEEDS_CUINIT;
    (void)alignment, (void)hint, (void)flags;
    *at = __atomic_fetch_add(&next, (bytes + PAGE - 1) / PAGE * PAGE, __ATOMIC_RELAXED);
    return *at + bytes < END ? SUCCESS : OUT_OF_MEMORY;
}
API(cuMemCreate)(unsigned long long *handle, size_t bytes, const void *properties_, unsigned long long flags) {
    (void)properties_, (void)flags;
    NEEDS_CONTEXT;
    if (!allocate_bytes(bytes)) return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    if (pages.count == pages.capacity) {
        pages.capacity = pages.capacity ? 2 * pages.capacity : 1024;
        pages.bytes = realloc(pages.bytes, pages.capacity * sizeof *pages.bytes);
    }
    pages.bytes[pages.count++] = bytes;
    *handle = pages.count; /* the first handle is 1 */
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
API(cuMemRelease)(unsigned long long handle) {
    if (!handle || handle > pages.count) return INVALID_VALUE;
    free_bytes(pages.bytes[handle - 1]);
    pages.bytes[handle - 1] = 0;
    return SUCCESS;
}
API(cuMemGetAllocationGranularity)(size_t *out, const void *properties_, int option) { (void)properties_, (void)option; *out = PAGE; return SUCCESS; }
API(cuMemAddressFree)(uintptr_t at, size_t bytes) { (void)at, (void)bytes; return SUCCESS; }
API(cuMemMap)(void) { return SUCCESS; }
API(cuMemUnmap)(void) { return SUCCESS; }
API(cuMemSetAccess)(void) { return SUCCESS; }
API(cuMemsetD32Async)(void) { return SUCCESS; }
API(cuMemGetInfo_v2)(size_t *free, size_t *total) { return memory_info(free, total); }

/* ---- the device and its context ---- */

API(cuInit)(unsigned flags) { (void)flags; return initialize_driver(); }
API(cuDriverGetVersion)(int *version) { *version = CUDA_RUNTIME_VERSION; return SUCCESS; }
API(cuDeviceGetCount)(int *count) { NEEDS_CUINIT; *count = 1; return SUCCESS; }
API(cuDeviceGet)(int *device, int ordinal) { NEEDS_CUINIT; *device = 0; return ordinal ? INVALID_DEVICE : SUCCESS; }
API(cuDeviceGetName)(char *out, int length, int device) { (void)device; NEEDS_CUINIT; snprintf(out, length, "%s", gpu.name); return SUCCESS; }
API(cuDeviceGetUuid)(char *out, int device) { (void)device; NEEDS_CUINIT; memcpy(out, gpu.uuid, 16); return SUCCESS; }
API(cuDeviceGetUuid_v2)(char *out, int device) { return cuDeviceGetUuid(out, device); }
API(cuDeviceTotalMem_v2)(size_t *bytes, int device) { (void)device; NEEDS_CUINIT; *bytes = gpu.total; return SUCCESS; }
API(cuDeviceGetAttribute)(int *value, int which, int device) { (void)device; NEEDS_CUINIT; *value = attribute(which); return SUCCESS; }
API(cuDevicePrimaryCtxGetState)(int device, unsigned *flags, int *active) {
    (void)device;
    NEEDS_CUINIT;
    *flags = 0;
    *active = has_context();
    return SUCCESS;
}
API(cuDevicePrimaryCtxRetain)(void **context, int device) { (void)device; NEEDS_CUINIT; NEEDS_CONTEXT; *context = (void *)1; return SUCCESS; }
API(cuDevicePrimaryCtxRelease_v2)(int device) { (void)device; return SUCCESS; }
API(cuCtxGetCurrent)(void **context) {
    NEEDS_CUINIT;
    *context = has_context() ? (void *)1 : 0;
    return SUCCESS;
}
API(cuCtxSetCurrent)(void *context) { (void)context; return SUCCESS; }
API(cuCtxPushCurrent_v2)(void *context) { (void)context; return SUCCESS; }
API(cuCtxPopCurrent_v2)(void **context) { *context = (void *)1; return SUCCESS; }
API(cuCtxGetDevice)(int *device) { *device = 0; return SUCCESS; }
API(cuGetErrorString)(int error, const char **out) { *out = error_text(error); return SUCCESS; }
API(cuGetErrorName)(int error, const char **out) { *out = error_name(error); return SUCCESS; }
API(cuPointerGetAttribute)(void *out, int which, const void *at) {
    enum { CONTEXT = 1, MEMORY_TYPE, DEVICE_POINTER, HOST_POINTER, BUFFER = 7 };
    int wide = which == CONTEXT || which == DEVICE_POINTER || which == HOST_POINTER || which == BUFFER;
    memset(out, 0, wide ? sizeof(void *) : sizeof(int));
    if (which == DEVICE_POINTER) *(const void **)out = at;
    if (which == MEMORY_TYPE) *(int *)out = kind_of(at) == DEVICE ? 2 : 1;
    return SUCCESS;
}

/* ---- kernels that PyTorch compiles at run time (jiterator): it loads and launches them through the driver ---- */

API(cuModuleLoadData)(void **module, const void *image) { (void)image; *module = new_handle(); return SUCCESS; }
API(cuModuleLoadDataEx)(void **module, const void *image) { (void)image; *module = new_handle(); return SUCCESS; }
API(cuModuleUnload)(void *module) { (void)module; return SUCCESS; }
API(cuModuleGetFunction)(void **function, void *module, const char *name) { (void)module, (void)name; *function = new_handle(); return SUCCESS; }
API(cuLaunchKernel)(void) { return SUCCESS; }
API(cuLaunchCooperativeKernel)(void) { return SUCCESS; }
API(cuFuncSetAttribute)(void *function, int which, int value) { (void)function, (void)which, (void)value; return SUCCESS; }
API(cuFuncGetAttribute)(int *value, int which, void *function) { (void)which, (void)function; *value = 0; return SUCCESS; }
API(cuOccupancyMaxActiveBlocksPerMultiprocessor)(int *out, void *f, int threads, size_t shared) { (void)f, (void)shared; return occupancy(out, threads); }
API(cuTensorMapEncodeTiled)(void) { return SUCCESS; }

/* ---- functions that are refused ---- */

#define REFUSED(name) API(name)(void) { return virtual_device_refuse(#name, NOT_SUPPORTED); }
REFUSED(cuMemExportToShareableHandle) REFUSED(cuMemImportFromShareableHandle) REFUSED(cuMemGetHandleForAddressRange)
REFUSED(cuMemRetainAllocationHandle) REFUSED(cuMemGetAllocationPropertiesFromHandle) REFUSED(cuMemGetAddressRange_v2)
REFUSED(cuStreamWriteValue32) REFUSED(cuStreamWriteValue32_v2) REFUSED(cuMulticastCreate) REFUSED(cuMulticastAddDevice)
REFUSED(cuMulticastBindMem) REFUSED(cuMulticastUnbind) REFUSED(cuLinkCreate_v2) REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkComplete) REFUSED(cuGreenCtxCreate) REFUSED(cuCtxFromGreenCtx) REFUSED(cuLaunchKernelEx)

/* Libraries other than cuBLAS and NVRTC are not replaced. They would look for a real driver, so the functions that create their
   handles are refused. */
REFUSED(cudnnCreate) REFUSED(cusparseCreate) REFUSED(cusolverDnCreate) REFUSED(cufftCreate) REFUSED(curandCreateGenerator)
REFUSED(cusparseLtInit) REFUSED(ncclGetUniqueId) REFUSED(ncclCommInitRank) REFUSED(ncclCommInitRankConfig) REFUSED(ncclCommInitAll)
API_AS(const char *, cudnnGetErrorString)(int status) { (void)status; return last_refusal(); }

/* ---- functions looked up by name ---- */

static void *find_symbol(const char *symbol) {
    char versioned[128];
    void *at = dlsym(RTLD_DEFAULT, symbol);
    for (int version = 2; !at && version <= 3; version++) {
        snprintf(versioned, sizeof versioned, "%s_v%d", symbol, version);
        at = dlsym(RTLD_DEFAULT, versioned);
    }
    return at;
}
static int entry_point(const char *symbol, void **at, int *status) {
    *at = find_symbol(symbol);
    if (status) *status = *at ? 0 : 1;
    return SUCCESS;
}
API(cudaGetDriverEntryPoint)(const char *symbol, void **at, unsigned long long flags, int *status) {
    (void)flags;
    return entry_point(symbol, at, status);
}
API(cudaGetDriverEntryPoint_ptsz)(const char *symbol, void **at, unsigned long long flags, int *status) {
    (void)flags;
    return entry_point(symbol, at, status);
}
API(cudaGetDriverEntryPointByVersion)(const char *symbol, void **at, unsigned version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    return entry_point(symbol, at, status);
}
API(cuGetProcAddress_v2)(const char *symbol, void **at, int version, unsigned long long flags, int *status) {
    (void)version, (void)flags;
    entry_point(symbol, at, status);
    return *at ? SUCCESS : NOT_FOUND;
}
API(cuGetProcAddress)(const char *symbol, void **at, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(symbol, at, version, flags, 0);
}
