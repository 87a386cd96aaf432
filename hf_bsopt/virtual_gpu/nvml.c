/* A replacement for the management library (NVML), for a device that several processes share. It has the functions that
   nvidia-ml-py (pynvml), PyTorch's NVML-based check (PYTORCH_NVML_BASED_CUDA_CHECK) and its out-of-memory message need.
   All others are missing, which callers have to expect of an older driver anyway.

   Like the real one, it creates no context, does not initialize the driver and does not prevent a later fork. It has the
   real one's name, by which callers open it. Constants and layouts are those of nvml.h, as in pynvml.py. */
#define _GNU_SOURCE
#include "shared_device.h"
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define API(name) __attribute__((visibility("default"))) int name

enum { UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9,
       GPU_IS_LOST = 15 };

static int users; /* nvmlInit less nvmlShutdown */
static char device[1];

/* The oldest driver that runs this version of CUDA. Source: CUDA Toolkit release notes, minor version compatibility. */
#define DRIVER (CUDA_RUNTIME_VERSION >= 13000 ? "580.65.06" : "525.60.13")

static int started(void) {
    if (!shared_device_is_shared()) return DRIVER_NOT_LOADED;
    __atomic_add_fetch(&users, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}
API(nvmlInit)(void) { return started(); }
API(nvmlInit_v2)(void) { return started(); }
API(nvmlInitWithFlags)(unsigned flags) { (void)flags; return started(); }
API(nvmlShutdown)(void) {
    if (!users) return UNINITIALIZED;
    __atomic_sub_fetch(&users, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

static int check(const void *handle) { return !users ? UNINITIALIZED : handle != device ? INVALID_ARGUMENT : SUCCESS; }

#define FOR_THE_DEVICE(handle)                                                                                          \
    do {                                                                                                                \
        int wrong = check(handle);                                                                                      \
        if (wrong) return wrong;                                                                                        \
    } while (0)

static int copy_text(char *out, unsigned size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}
static const char *uuid(void) { /* the UUID in cudaDeviceProp, formatted as NVIDIA does */
    static char text[48];
    const unsigned char *of = (const unsigned char *)shared_device()->uuid;
    char *at = text + sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++) at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", of[i]);
    return text;
}

__attribute__((visibility("default"))) const char *nvmlErrorString(int error) {
    switch (error) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}
API(nvmlSystemGetDriverVersion)(char *out, unsigned capacity) { return users ? copy_text(out, capacity, DRIVER) : UNINITIALIZED; }
API(nvmlSystemGetCudaDriverVersion_v2)(int *version) { *version = CUDA_RUNTIME_VERSION; return SUCCESS; }

/* ---- the device ---- */

static int handle_if(int is_it, void **handle, int otherwise) {
    if (!users) return UNINITIALIZED;
    *handle = is_it ? device : NULL;
    return is_it ? SUCCESS : otherwise;
}
API(nvmlDeviceGetCount_v2)(unsigned *count) { *count = 1; return users ? SUCCESS : UNINITIALIZED; }
API(nvmlDeviceGetHandleByIndex_v2)(unsigned index, void **handle) { return handle_if(index == 0, handle, INVALID_ARGUMENT); }
API(nvmlDeviceGetHandleByUUID)(const char *text, void **handle) { return handle_if(!strcasecmp(text, uuid()), handle, NOT_FOUND); }
API(nvmlDeviceGetHandleByPciBusId_v2)(const char *text, void **handle) { /* PyTorch uses this; cudaDeviceProp has zeros */
    unsigned domain, bus, slot;
    int is_it = sscanf(text, "%x:%x:%x", &domain, &bus, &slot) == 3 && !(domain | bus | slot);
    return handle_if(is_it, handle, NOT_FOUND);
}
API(nvmlDeviceGetUUID)(void *handle, char *out, unsigned capacity) { FOR_THE_DEVICE(handle); return copy_text(out, capacity, uuid()); }
API(nvmlDeviceGetName)(void *handle, char *out, unsigned capacity) { FOR_THE_DEVICE(handle); return copy_text(out, capacity, shared_device()->name); }
API(nvmlDeviceGetCudaComputeCapability)(void *handle, int *major, int *minor) {
    FOR_THE_DEVICE(handle);
    *major = shared_device()->capability / 10;
    *minor = shared_device()->capability % 10;
    return SUCCESS;
}

/* PyTorch looks these up together with the ones it needs, and requires all of them */
API(nvmlDeviceGetNvLinkRemoteDeviceType)(void) { return NOT_SUPPORTED; }
API(nvmlDeviceGetNvLinkRemotePciInfo_v2)(void) { return NOT_SUPPORTED; }

/* ---- its memory and the processes that use it ---- */

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

API(nvmlDeviceGetMemoryInfo)(void *handle, struct memory *out) {
    size_t used, total = shared_device()->total;
    FOR_THE_DEVICE(handle);
    if (shared_device_used(&used)) return GPU_IS_LOST;
    used = used < total ? used : total;
    *out = (struct memory){total, total - used, used};
    return SUCCESS;
}
API(nvmlDeviceGetMemoryInfo_v2)(void *handle, struct memory_v2 *out) { /* the driver reserves nothing on this device */
    struct memory memory;
    int status = nvmlDeviceGetMemoryInfo(handle, &memory);
    if (status == SUCCESS) *out = (struct memory_v2){out->version, memory.total, 0, memory.free, memory.used};
    return status;
}

struct process { unsigned pid; unsigned long long bytes; };
struct process_v2 { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; }; /* and v3 */

/* capacity: in, the number of entries in out; out, the number of processes. The two layouts have a common prefix. */
static int list(void *handle, unsigned *capacity, void *out, size_t each) {
    struct virtual_process found[PROCESSES];
    unsigned count, fits = *capacity;
    FOR_THE_DEVICE(handle);
    if (shared_device_processes(found, &count)) return GPU_IS_LOST;
    *capacity = count;
    if (count > fits) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < count; i++) {
        struct process_v2 one = {(unsigned)found[i].pid, found[i].context_bytes + found[i].bytes, ~0u, ~0u};
        memcpy((char *)out + i * each, &one, each);
    }
    return SUCCESS;
}
static int no_processes(void *handle, unsigned *capacity) {
    FOR_THE_DEVICE(handle);
    *capacity = 0;
    return SUCCESS;
}
API(nvmlDeviceGetComputeRunningProcesses)(void *handle, unsigned *capacity, struct process *out) { return list(handle, capacity, out, sizeof *out); }
API(nvmlDeviceGetComputeRunningProcesses_v2)(void *handle, unsigned *capacity, struct process_v2 *out) { return list(handle, capacity, out, sizeof *out); }
API(nvmlDeviceGetComputeRunningProcesses_v3)(void *handle, unsigned *capacity, struct process_v2 *out) { return list(handle, capacity, out, sizeof *out); }
API(nvmlDeviceGetGraphicsRunningProcesses_v3)(void *handle, unsigned *capacity, struct process_v2 *out) { (void)out; return no_processes(handle, capacity); }
