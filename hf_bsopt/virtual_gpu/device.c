/* A CUDA device that has memory but computes nothing.

   It is preloaded into a process with the CUDA build of PyTorch, on a machine that needs no GPU. Device memory is counted
   but never touched; kernels are accepted but never run; copies to the host are filled with zeros. So the real dispatcher,
   caching allocator and libraries behave as on a real GPU and run out of memory at the same point, without computing.

   The library is named libcuda.so.1, so that it is found in place of the driver. It implements three interfaces: the CUDA
   runtime (runtime.c, memory.c), the driver (driver.c) and cuBLAS (cublas.c). library.py generates stubs for their other
   functions: a stub either reports success (a launch, a matrix product) or refuses the call and names it.

   This file: the context, the count of allocated memory, the properties. shared_device.c: the configuration, and the
   processes that share the device. CUDA_RUNTIME_VERSION is set on the compiler's command line: 12080 is CUDA 12.8.

   No CUDA header is needed. Constants and layouts are from NVIDIA's driver_types.h, cuda.h and cublasLt.h (12.8, 13.0). */
#define _GNU_SOURCE
#include "device.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- functions that are not implemented are refused and reported by name ---- */

static char refused[256] = "operation not supported";
static char refused_names[4096]; /* each name once, followed by a space */

EXPORTED int virtual_device_refuse(const char *name, int status) {
    char entry[128];
    snprintf(entry, sizeof entry, "%s ", name);
    snprintf(refused, sizeof refused, "operation not supported: the virtual CUDA device does not implement %s", name);
    if (!strstr(refused_names, entry)) {
        strncat(refused_names, entry, sizeof refused_names - strlen(refused_names) - 1);
        fprintf(stderr, "virtual CUDA device: %s is not implemented and was refused\n", name);
    }
    return status;
}
EXPORTED const char *virtual_device_refused(void) { return refused_names; }
const char *last_refusal(void) { return refused; }

/* ---- memory ---- */

static size_t in_use; /* bytes of device memory without the context */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for in_use */

int allocate_bytes(size_t bytes) {
    if (shared_device_is_shared()) return shared_device_allocate(bytes) == SUCCESS;
    pthread_mutex_lock(&lock);
    int fits = in_use + bytes <= gpu.total - gpu.context;
    if (fits) in_use += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}
void free_bytes(size_t bytes) {
    if (shared_device_is_shared()) {
        shared_device_free(bytes);
        return;
    }
    pthread_mutex_lock(&lock);
    in_use -= bytes;
    pthread_mutex_unlock(&lock);
}
int memory_info(size_t *free, size_t *total) {
    size_t used = gpu.context + in_use;
    NEEDS_CONTEXT;
    if (shared_device_is_shared()) RETURN_UNLESS_SUCCESS(shared_device_used(&used));
    *total = gpu.total;
    *free = used < gpu.total ? gpu.total - used : 0;
    return SUCCESS;
}

/* ---- driver and context of a shared device; a device that is not shared skips these checks ----

   As on a real GPU: the first call of the runtime (or cuInit) initializes the driver, which takes no memory; in a process
   forked after that, every call fails. The first call that works on the device creates the context. Sources: CUDA
   Programming Guide, initialization (since CUDA 12 cudaSetDevice creates the context, as cudaInitDevice does);
   pytorch/pytorch#190708, triton-lang/triton#10443 (a forked child gets error 3). */

static pid_t initialized_by;
static int context_exists;

int initialize_driver(void) {
    if (!shared_device_is_shared()) return SUCCESS;
    pid_t before = 0, self = getpid();
    __atomic_compare_exchange_n(&initialized_by, &before, self, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return before == 0 || before == self ? SUCCESS : NOT_INITIALIZED;
}
int is_forked(void) { return shared_device_is_shared() && initialized_by && initialized_by != getpid(); }
int is_initialized(void) { return !shared_device_is_shared() || initialized_by == getpid(); }
int has_context(void) { return context_exists || !shared_device_is_shared(); }

int virtual_device_use(void) {
    int status = initialize_driver();
    if (status || context_exists || !shared_device_is_shared()) return status;
    status = shared_device_allocate(0);
    context_exists = status == SUCCESS;
    return status;
}

/* ---- properties ---- */

/* Shared memory per multiprocessor, per block (opt-in above 48 KiB), and resident blocks per multiprocessor.
   Source: CUDA C++ Programming Guide, technical specifications per compute capability. */
static int shared_memory_per_multiprocessor(void) {
    switch (gpu.capability) {
    case 60: case 61: case 75: return 64 << 10;
    case 70: return 96 << 10;
    case 80: case 87: return 164 << 10;
    case 86: case 89: case 120: case 121: return 100 << 10;
    default: return gpu.capability < 75 ? 96 << 10 : 228 << 10;
    }
}
int shared_memory_per_block(void) {
    int shared = shared_memory_per_multiprocessor();
    return gpu.capability < 70 ? 48 << 10 : gpu.capability < 80 ? shared : shared - (1 << 10);
}
static int blocks_per_multiprocessor(void) {
    switch (gpu.capability) {
    case 75: case 86: case 87: return 16;
    case 89: case 120: case 121: return 24;
    default: return 32;
    }
}

enum { /* cudaDeviceAttr and CUdevice_attribute have the same values */
    MAX_THREADS_PER_BLOCK = 1, MAX_BLOCK_X, MAX_BLOCK_Y, MAX_BLOCK_Z, MAX_GRID_X, MAX_GRID_Y, MAX_GRID_Z,
    SHARED_PER_BLOCK = 8, WARP_SIZE = 10, REGISTERS_PER_BLOCK = 12, CLOCK_RATE = 13, TEXTURE_ALIGNMENT = 14,
    MULTIPROCESSORS = 16, CAN_MAP_HOST_MEMORY = 19, CONCURRENT_KERNELS = 31, MEMORY_CLOCK_RATE = 36, MEMORY_BUS_WIDTH = 37,
    L2_BYTES = 38, THREADS_PER_MULTIPROCESSOR = 39, ASYNC_ENGINES = 40, UNIFIED_ADDRESSING = 41, CAPABILITY_MAJOR = 75,
    CAPABILITY_MINOR = 76, SHARED_PER_MULTIPROCESSOR = 81, REGISTERS_PER_MULTIPROCESSOR = 82, MANAGED_MEMORY = 83,
    CONCURRENT_MANAGED_ACCESS = 89, COOPERATIVE_LAUNCH = 95, SHARED_PER_BLOCK_OPTIN = 97, VIRTUAL_MEMORY_MANAGEMENT = 102,
    BLOCKS_PER_MULTIPROCESSOR = 106
};

int attribute(int which) {
    switch (which) {
    case MAX_THREADS_PER_BLOCK: case MAX_BLOCK_X: case MAX_BLOCK_Y: return 1024;
    case MAX_BLOCK_Z: return 64;
    case MAX_GRID_X: return 2147483647;
    case MAX_GRID_Y: case MAX_GRID_Z: return 65535;
    case SHARED_PER_BLOCK: return 48 << 10;
    case WARP_SIZE: return 32;
    case REGISTERS_PER_BLOCK: case REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CLOCK_RATE: case MEMORY_CLOCK_RATE: return 1500000;
    case TEXTURE_ALIGNMENT: return 512;
    case MULTIPROCESSORS: return gpu.multiprocessors;
    case MEMORY_BUS_WIDTH: return 5120;
    case L2_BYTES: return 40 << 20;
    case THREADS_PER_MULTIPROCESSOR: return gpu.threads;
    case ASYNC_ENGINES: return 2;
    case CAPABILITY_MAJOR: return gpu.capability / 10;
    case CAPABILITY_MINOR: return gpu.capability % 10;
    case SHARED_PER_MULTIPROCESSOR: return shared_memory_per_multiprocessor();
    case SHARED_PER_BLOCK_OPTIN: return shared_memory_per_block();
    case BLOCKS_PER_MULTIPROCESSOR: return blocks_per_multiprocessor();
    case CAN_MAP_HOST_MEMORY: case CONCURRENT_KERNELS: case UNIFIED_ADDRESSING: case MANAGED_MEMORY:
    case CONCURRENT_MANAGED_ACCESS: case COOPERATIVE_LAUNCH: case VIRTUAL_MEMORY_MANAGEMENT: return 1;
    default: return 0;
    }
}

/* Offsets in struct cudaDeviceProp of the fields that PyTorch reads. CUDA 13 made it shorter; the first 384 bytes agree. */
#if CUDA_RUNTIME_VERSION >= 13000
enum { PROP_BYTES = 1008, PROP_MULTIPROCESSORS = 384, PROP_INTEGRATED = 388, PROP_CONCURRENT_KERNELS = 560, PROP_UNIFIED = 588,
       PROP_BUS_WIDTH = 592, PROP_L2 = 596, PROP_THREADS = 604, PROP_SHARED = 624, PROP_REGISTERS = 632, PROP_MANAGED = 636,
       PROP_COOPERATIVE = 668, PROP_OPTIN = 672, PROP_BLOCKS = 688 };
#else
enum { PROP_BYTES = 1032, PROP_MULTIPROCESSORS = 388, PROP_INTEGRATED = 396, PROP_CONCURRENT_KERNELS = 576, PROP_UNIFIED = 604,
       PROP_BUS_WIDTH = 612, PROP_L2 = 616, PROP_THREADS = 624, PROP_SHARED = 640, PROP_REGISTERS = 648, PROP_MANAGED = 652,
       PROP_COOPERATIVE = 688, PROP_OPTIN = 696, PROP_BLOCKS = 712 };
#endif
enum { PROP_UUID = 256, PROP_TOTAL = 288, PROP_SHARED_PER_BLOCK = 296, PROP_REGISTERS_PER_BLOCK = 304, PROP_WARP = 308,
       PROP_BLOCK_THREADS = 320, PROP_BLOCK_DIM = 324, PROP_GRID_DIM = 336, PROP_MAJOR = 360, PROP_MINOR = 364 };

static void put_int(char *properties, int at, int value) { memcpy(properties + at, &value, sizeof value); }
static void put_size(char *properties, int at, size_t value) { memcpy(properties + at, &value, sizeof value); }

void fill_properties(char *p) {
    memset(p, 0, PROP_BYTES);
    memcpy(p, gpu.name, 255);
    memcpy(p + PROP_UUID, gpu.uuid, 16);
    put_size(p, PROP_TOTAL, gpu.total);
    put_size(p, PROP_SHARED_PER_BLOCK, attribute(SHARED_PER_BLOCK));
    put_size(p, PROP_SHARED, shared_memory_per_multiprocessor());
    put_size(p, PROP_OPTIN, shared_memory_per_block());
    static const int from_attributes[][2] = {
        {PROP_REGISTERS_PER_BLOCK, REGISTERS_PER_BLOCK}, {PROP_WARP, WARP_SIZE}, {PROP_BLOCK_THREADS, MAX_THREADS_PER_BLOCK},
        {PROP_BLOCK_DIM, MAX_BLOCK_X}, {PROP_BLOCK_DIM + 4, MAX_BLOCK_Y}, {PROP_BLOCK_DIM + 8, MAX_BLOCK_Z},
        {PROP_GRID_DIM, MAX_GRID_X}, {PROP_GRID_DIM + 4, MAX_GRID_Y}, {PROP_GRID_DIM + 8, MAX_GRID_Z},
        {PROP_MAJOR, CAPABILITY_MAJOR}, {PROP_MINOR, CAPABILITY_MINOR}, {PROP_MULTIPROCESSORS, MULTIPROCESSORS},
        {PROP_CONCURRENT_KERNELS, CONCURRENT_KERNELS}, {PROP_UNIFIED, UNIFIED_ADDRESSING}, {PROP_BUS_WIDTH, MEMORY_BUS_WIDTH},
        {PROP_L2, L2_BYTES}, {PROP_THREADS, THREADS_PER_MULTIPROCESSOR}, {PROP_REGISTERS, REGISTERS_PER_MULTIPROCESSOR},
        {PROP_MANAGED, MANAGED_MEMORY}, {PROP_COOPERATIVE, COOPERATIVE_LAUNCH}, {PROP_BLOCKS, BLOCKS_PER_MULTIPROCESSOR}};
    for (size_t i = 0; i < sizeof from_attributes / sizeof *from_attributes; i++)
        put_int(p, from_attributes[i][0], attribute(from_attributes[i][1]));
}

int occupancy(int *blocks, int threads) {
    NEEDS_CONTEXT;
    int resident = threads > 0 ? gpu.threads / threads : 1;
    int most = blocks_per_multiprocessor();
    *blocks = resident < 1 ? 1 : resident > most ? most : resident;
    return SUCCESS;
}

/* ---- handles and errors ---- */

void *new_handle(void) {
    static uintptr_t next = 0x1000;
    return (void *)__atomic_add_fetch(&next, 16, __ATOMIC_RELAXED);
}
const char *error_text(int error) {
    switch (error) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case NOT_INITIALIZED: return "initialization error";
    case UNAVAILABLE: return "CUDA-capable device(s) is/are busy or unavailable";
    case INVALID_DEVICE: return "invalid device ordinal";
    case NOT_SUPPORTED: return refused;
    default: return "unknown error of the virtual CUDA device";
    }
}
const char *error_name(int error) {
    return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : error == INVALID_DEVICE ? "cudaErrorInvalidDevice"
         : error == NOT_INITIALIZED ? "cudaErrorInitializationError" : error == UNAVAILABLE ? "cudaErrorDevicesUnavailable"
         : error == NOT_SUPPORTED ? "cudaErrorNotSupported" : error ? "cudaErrorUnknown" : "cudaSuccess";
}
