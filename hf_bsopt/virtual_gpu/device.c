/* A CUDA device that has memory but computes nothing.

   It is preloaded into a process with the CUDA build of PyTorch, on a machine that needs no GPU. Device memory is counted
   but never touched; kernels are accepted but never run; copies to the host are filled with zeros. So the real dispatcher,
   caching allocator and libraries behave as on a real GPU and run out of memory at the same point, without computing.

   This library is named libcuda.so.1, so that it is found in place of the driver. It implements three interfaces, in this
   order: the CUDA runtime, the driver, cuBLAS. library.py generates stubs for their other functions: a stub either reports
   success (a launch, a matrix product) or refuses the call and names it.

   The device's properties and the processes that share it: shared_device.c. CUDA_RUNTIME_VERSION is set on the compiler's
   command line: 12080 is CUDA 12.8.

   No CUDA header is needed. Constants and layouts are from NVIDIA's driver_types.h, cuda.h and cublasLt.h (12.8, 13.0). */
#define _GNU_SOURCE
#include "shared_device.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define API(name) EXPORTED int name
#define API_AS(type, name) EXPORTED type name

enum { INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { UNREGISTERED = 0, PINNED = 1, DEVICE = 2, MANAGED = 3 };

static const size_t PAGE = (size_t)2 << 20; /* the driver allocates multiples of 2 MiB */

/* ---- functions that are not implemented are reported by name ---- */

static char refused[256] = "operation not supported";
static char refused_names[4096]; /* each once, followed by a space */

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

/* ---- the device ---- */

static size_t in_use; /* bytes of device memory without the context */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int take(size_t bytes) {
    if (shared_device_is_shared()) return shared_device_take(bytes) == SUCCESS;
    pthread_mutex_lock(&lock);
    int fits = in_use + bytes <= gpu.total - gpu.context;
    if (fits) in_use += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}
static void give_back(size_t bytes) {
    if (shared_device_is_shared()) {
        shared_device_give_back(bytes);
        return;
    }
    pthread_mutex_lock(&lock);
    in_use -= bytes;
    pthread_mutex_unlock(&lock);
}

/* ---- driver and context of a shared device; a device that is not shared skips these checks ----

   As on a real GPU: the first call of the runtime (or cuInit) initializes the driver, which takes no memory; in a process
   forked after that, every call fails. The first call that works on the device creates the context. Sources: CUDA
   Programming Guide, initialization (since CUDA 12 cudaSetDevice creates the context, as cudaInitDevice does);
   pytorch/pytorch#190708, triton-lang/triton#10443 (a forked child gets error 3). */

static pid_t initialized_by;
static int has_context;

static int driver(void) { /* NOT_INITIALIZED in a process forked after the initialization */
    if (!shared_device_is_shared()) return SUCCESS;
    pid_t before = 0, self = getpid();
    __atomic_compare_exchange_n(&initialized_by, &before, self, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return before == 0 || before == self ? SUCCESS : NOT_INITIALIZED;
}
static int is_forked(void) { return shared_device_is_shared() && initialized_by && initialized_by != getpid(); }
static int is_initialized(void) { return !shared_device_is_shared() || initialized_by == getpid(); }

EXPORTED int virtual_device_use(void) { /* creates the context in the first call */
    int status = driver();
    if (status || has_context || !shared_device_is_shared()) return status;
    status = shared_device_take(0);
    has_context = status == SUCCESS;
    return status;
}

#define RETURN_UNLESS_SUCCESS(call)                                                                                     \
    do {                                                                                                                \
        int status_ = call;                                                                                             \
        if (status_) return status_;                                                                                    \
    } while (0)
#define NEEDS_DRIVER RETURN_UNLESS_SUCCESS(driver())                                        /* initializes it */
#define NEEDS_CUINIT RETURN_UNLESS_SUCCESS(is_initialized() ? SUCCESS : NOT_INITIALIZED)   /* fails before cuInit */
#define NEEDS_CONTEXT RETURN_UNLESS_SUCCESS(virtual_device_use())

/* Shared memory per multiprocessor, per block (opt-in above 48 KiB), and resident blocks per multiprocessor.
   Source: CUDA C++ Programming Guide, technical specifications per compute capability. */
static int shared_of_multiprocessor(void) {
    switch (gpu.capability) {
    case 60: case 61: case 75: return 64 << 10;
    case 70: return 96 << 10;
    case 80: case 87: return 164 << 10;
    case 86: case 89: case 120: case 121: return 100 << 10;
    default: return gpu.capability < 75 ? 96 << 10 : 228 << 10;
    }
}
static int shared_of_block(void) {
    int shared = shared_of_multiprocessor();
    return gpu.capability < 70 ? 48 << 10 : gpu.capability < 80 ? shared : shared - (1 << 10);
}
static int blocks_of_multiprocessor(void) {
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

static int attribute(int which) {
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
    case SHARED_PER_MULTIPROCESSOR: return shared_of_multiprocessor();
    case SHARED_PER_BLOCK_OPTIN: return shared_of_block();
    case BLOCKS_PER_MULTIPROCESSOR: return blocks_of_multiprocessor();
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

static void put(char *properties, int at, int value) { memcpy(properties + at, &value, sizeof value); }
static void put_size(char *properties, int at, size_t value) { memcpy(properties + at, &value, sizeof value); }

static int properties(char *p, int device) {
    NEEDS_DRIVER;
    if (device) return INVALID_DEVICE;
    memset(p, 0, PROP_BYTES);
    memcpy(p, gpu.name, 255);
    memcpy(p + PROP_UUID, gpu.uuid, 16);
    put_size(p, PROP_TOTAL, gpu.total);
    put_size(p, PROP_SHARED_PER_BLOCK, attribute(SHARED_PER_BLOCK));
    put_size(p, PROP_SHARED, shared_of_multiprocessor());
    put_size(p, PROP_OPTIN, shared_of_block());
    static const int from_attributes[][2] = {
        {PROP_REGISTERS_PER_BLOCK, REGISTERS_PER_BLOCK}, {PROP_WARP, WARP_SIZE}, {PROP_BLOCK_THREADS, MAX_THREADS_PER_BLOCK},
        {PROP_BLOCK_DIM, MAX_BLOCK_X}, {PROP_BLOCK_DIM + 4, MAX_BLOCK_Y}, {PROP_BLOCK_DIM + 8, MAX_BLOCK_Z},
        {PROP_GRID_DIM, MAX_GRID_X}, {PROP_GRID_DIM + 4, MAX_GRID_Y}, {PROP_GRID_DIM + 8, MAX_GRID_Z},
        {PROP_MAJOR, CAPABILITY_MAJOR}, {PROP_MINOR, CAPABILITY_MINOR}, {PROP_MULTIPROCESSORS, MULTIPROCESSORS},
        {PROP_CONCURRENT_KERNELS, CONCURRENT_KERNELS}, {PROP_UNIFIED, UNIFIED_ADDRESSING}, {PROP_BUS_WIDTH, MEMORY_BUS_WIDTH},
        {PROP_L2, L2_BYTES}, {PROP_THREADS, THREADS_PER_MULTIPROCESSOR}, {PROP_REGISTERS, REGISTERS_PER_MULTIPROCESSOR},
        {PROP_MANAGED, MANAGED_MEMORY}, {PROP_COOPERATIVE, COOPERATIVE_LAUNCH}, {PROP_BLOCKS, BLOCKS_PER_MULTIPROCESSOR}};
    for (size_t i = 0; i < sizeof from_attributes / sizeof *from_attributes; i++)
        put(p, from_attributes[i][0], attribute(from_attributes[i][1]));
    return SUCCESS;
}

/* cuDNN needs a real driver, so PyTorch's use of it is disabled, as by torch.backends.cudnn.enabled = False and
   torch.backends.cuda.enable_cudnn_sdp(False). If these functions are not found, cudnnCreate is refused below. */
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

API(cudaGetDeviceProperties)(char *p, int device) { return properties(p, device); }
API(cudaGetDeviceProperties_v2)(char *p, int device) { return properties(p, device); }
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

static const char *error_text(int error) {
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
API_AS(const char *, cudaGetErrorString)(int error) { return error_text(error); }
API_AS(const char *, cudaGetErrorName)(int error) {
    return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : error == INVALID_DEVICE ? "cudaErrorInvalidDevice"
         : error == NOT_INITIALIZED ? "cudaErrorInitializationError" : error == UNAVAILABLE ? "cudaErrorDevicesUnavailable"
         : error == NOT_SUPPORTED ? "cudaErrorNotSupported" : error ? "cudaErrorUnknown" : "cudaSuccess";
}

/* ---- device memory: addresses without memory behind them ---- */

static const uintptr_t SEGMENTS = 0x100000000000, RANGES = 0x300000000000, END = 0x500000000000;

static int on_device(const void *at) { return (uintptr_t)at >= SEGMENTS && (uintptr_t)at < END; }

typedef struct block { /* a segment of device memory, or pinned or managed host memory */
    char *at;
    size_t bytes;
    int kind;
    struct block *next;
} block;
static block *blocks;

static void remember(void *at, size_t bytes, int kind) {
    block *new = malloc(sizeof *new);
    pthread_mutex_lock(&lock);
    *new = (block){at, bytes, kind, blocks};
    blocks = new;
    pthread_mutex_unlock(&lock);
}
static block forget(void *at) { /* {0} if it is not in the list */
    block found = {0};
    pthread_mutex_lock(&lock);
    for (block **link = &blocks; *link; link = &(*link)->next)
        if ((*link)->at == at) {
            block *gone = *link;
            *link = gone->next;
            found = *gone;
            free(gone);
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}
static int kind_of(const char *at) {
    if (on_device(at)) return DEVICE;
    int kind = UNREGISTERED;
    pthread_mutex_lock(&lock);
    for (block *b = blocks; b && !kind; b = b->next)
        if (b->kind != DEVICE && at >= b->at && at < b->at + b->bytes) kind = b->kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

API(cudaMalloc)(void **out, size_t bytes) {
    static uintptr_t next = SEGMENTS;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    *out = 0;
    NEEDS_CONTEXT;
    if (!take(bytes)) return OUT_OF_MEMORY;
    *out = (void *)__atomic_fetch_add(&next, bytes, __ATOMIC_RELAXED);
    remember(*out, bytes, DEVICE);
    return SUCCESS;
}
API(cudaFree)(void *at) {
    NEEDS_CONTEXT;
    block gone = forget(at);
    if (gone.kind == DEVICE) give_back(gone.bytes);
    if (gone.kind == MANAGED) munmap(gone.at, gone.bytes);
    return SUCCESS;
}
API(cudaMallocAsync)(void **out, size_t bytes, void *stream) { (void)stream; return cudaMalloc(out, bytes); }
API(cudaFreeAsync)(void *at, void *stream) { (void)stream; return cudaFree(at); }
API(cudaMemGetInfo)(size_t *left, size_t *total) {
    size_t used = gpu.context + in_use;
    NEEDS_CONTEXT;
    if (shared_device_is_shared()) RETURN_UNLESS_SUCCESS(shared_device_used(&used));
    *total = gpu.total;
    *left = used < gpu.total ? gpu.total - used : 0;
    return SUCCESS;
}

static int pinned(void **out, size_t bytes) {
    NEEDS_CONTEXT;
    if (posix_memalign(out, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
    remember(*out, bytes, PINNED);
    return SUCCESS;
}
API(cudaHostAlloc)(void **out, size_t bytes, unsigned flags) { (void)flags; return pinned(out, bytes); }
API(cudaMallocHost)(void **out, size_t bytes) { return pinned(out, bytes); }
API(cudaFreeHost)(void *at) { if (forget(at).kind == PINNED) free(at); return SUCCESS; }
API(cudaHostRegister)(void *at, size_t bytes, unsigned flags) { (void)flags; NEEDS_CONTEXT; remember(at, bytes, PINNED); return SUCCESS; }
API(cudaHostUnregister)(void *at) { forget(at); return SUCCESS; }
API(cudaHostGetDevicePointer)(void **out, void *at, unsigned flags) { (void)flags; *out = at; return SUCCESS; }
API(cudaMallocManaged)(void **out, size_t bytes, unsigned flags) { /* the driver migrates it: not counted */
    (void)flags;
    NEEDS_CONTEXT;
    *out = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*out == MAP_FAILED) return OUT_OF_MEMORY;
    remember(*out, bytes, MANAGED);
    return SUCCESS;
}
struct pointer_attributes { int type, device; void *on_device, *on_host; };
API(cudaPointerGetAttributes)(struct pointer_attributes *out, const void *at) {
    NEEDS_CONTEXT;
    int kind = kind_of(at);
    out->type = kind;
    out->device = 0;
    out->on_device = kind ? (void *)at : 0;
    out->on_host = kind && kind != DEVICE ? (void *)at : 0;
    return SUCCESS;
}

static int copy(void *to, const void *from, size_t bytes) {
    NEEDS_CONTEXT;
    if (on_device(to)) return SUCCESS;
    if (on_device(from)) memset(to, 0, bytes);
    else memmove(to, from, bytes);
    return SUCCESS;
}
API(cudaMemcpy)(void *to, const void *from, size_t bytes, int direction) { (void)direction; return copy(to, from, bytes); }
API(cudaMemcpyAsync)(void *to, const void *from, size_t bytes, int direction, void *stream) {
    (void)direction, (void)stream;
    return copy(to, from, bytes);
}
static int copy_rows(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height) {
    for (size_t row = 0; row < height; row++) copy(to + row * to_pitch, from + row * from_pitch, width);
    return SUCCESS;
}
API(cudaMemcpy2D)(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height, int direction) {
    (void)direction;
    return copy_rows(to, to_pitch, from, from_pitch, width, height);
}
API(cudaMemcpy2DAsync)(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height, int direction, void *stream) {
    (void)direction, (void)stream;
    return copy_rows(to, to_pitch, from, from_pitch, width, height);
}
API(cudaMemcpyFromSymbol)(void *to, const void *symbol, size_t bytes, size_t offset, int direction) {
    (void)symbol, (void)offset, (void)direction;
    NEEDS_CONTEXT;
    memset(to, 0, bytes);
    return SUCCESS;
}
static int set(void *at, int value, size_t bytes) { NEEDS_CONTEXT; if (!on_device(at)) memset(at, value, bytes); return SUCCESS; }
API(cudaMemset)(void *at, int value, size_t bytes) { return set(at, value, bytes); }
API(cudaMemsetAsync)(void *at, int value, size_t bytes, void *stream) { (void)stream; return set(at, value, bytes); }
API(cudaGetSymbolAddress)(void **out, const void *symbol) { (void)symbol; *out = (void *)(END - PAGE); return SUCCESS; }

/* ---- kernels, streams, events ---- */

static void *new_handle(void) { /* an opaque handle that is never dereferenced */
    static uintptr_t next = 0x1000;
    return (void *)__atomic_add_fetch(&next, 16, __ATOMIC_RELAXED);
}

/* The architecture that a kernel was built for, which CUB compares with its own list: PyTorch is built for these. */
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
    out[6] = 1024;               /* maxThreadsPerBlock */
    out[7] = 32;                 /* numRegs */
    out[8] = built_for();        /* ptxVersion */
    out[9] = built_for();        /* binaryVersion */
    out[11] = shared_of_block(); /* maxDynamicSharedSizeBytes */
    return SUCCESS;
}
static int occupancy(int *blocks_out, int threads) {
    NEEDS_CONTEXT;
    int resident = threads > 0 ? gpu.threads / threads : 1;
    int most = blocks_of_multiprocessor();
    *blocks_out = resident < 1 ? 1 : resident > most ? most : resident;
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

/* ---- the driver functions that PyTorch uses. Expandable segments are address ranges with pages mapped into them ---- */

static struct { size_t *bytes; uint64_t count, capacity; } pages; /* of each handle that cuMemCreate returned */

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
    if (!take(bytes)) return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    if (pages.count == pages.capacity) {
        pages.capacity = pages.capacity ? 2 * pages.capacity : 1024;
        pages.bytes = realloc(pages.bytes, pages.capacity * sizeof *pages.bytes);
    }
    pages.bytes[pages.count++] = bytes;
    *handle = pages.count; /* the first is 1 */
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
API(cuMemRelease)(unsigned long long handle) {
    if (!handle || handle > pages.count) return INVALID_VALUE;
    give_back(pages.bytes[handle - 1]);
    pages.bytes[handle - 1] = 0;
    return SUCCESS;
}
API(cuMemGetAllocationGranularity)(size_t *out, const void *properties_, int option) { (void)properties_, (void)option; *out = PAGE; return SUCCESS; }
API(cuMemAddressFree)(uintptr_t at, size_t bytes) { (void)at, (void)bytes; return SUCCESS; }
API(cuMemMap)(void) { return SUCCESS; }
API(cuMemUnmap)(void) { return SUCCESS; }
API(cuMemSetAccess)(void) { return SUCCESS; }
API(cuMemsetD32Async)(void) { return SUCCESS; }
API(cuMemGetInfo_v2)(size_t *left, size_t *total) { return cudaMemGetInfo(left, total); }

API(cuInit)(unsigned flags) { (void)flags; return driver(); }
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
    *active = has_context || !shared_device_is_shared();
    return SUCCESS;
}
API(cuDevicePrimaryCtxRetain)(void **context, int device) { (void)device; NEEDS_CUINIT; NEEDS_CONTEXT; *context = (void *)1; return SUCCESS; }
API(cuDevicePrimaryCtxRelease_v2)(int device) { (void)device; return SUCCESS; }
API(cuCtxGetCurrent)(void **context) {
    NEEDS_CUINIT;
    *context = has_context || !shared_device_is_shared() ? (void *)1 : 0;
    return SUCCESS;
}
API(cuCtxSetCurrent)(void *context) { (void)context; return SUCCESS; }
API(cuCtxPushCurrent_v2)(void *context) { (void)context; return SUCCESS; }
API(cuCtxPopCurrent_v2)(void **context) { *context = (void *)1; return SUCCESS; }
API(cuCtxGetDevice)(int *device) { *device = 0; return SUCCESS; }
API(cuGetErrorString)(int error, const char **out) { *out = error_text(error); return SUCCESS; }
API(cuGetErrorName)(int error, const char **out) { *out = cudaGetErrorName(error); return SUCCESS; }
API(cuPointerGetAttribute)(void *out, int which, const void *at) { 
    enum { CONTEXT = 1, MEMORY_TYPE, DEVICE_POINTER, HOST_POINTER, BUFFER = 7 };
    int wide = which == CONTEXT || which == DEVICE_POINTER || which == HOST_POINTER || which == BUFFER;
    memset(out, 0, wide ? sizeof(void *) : sizeof(int));
    if (which == DEVICE_POINTER) *(const void **)out = at;
    if (which == MEMORY_TYPE) *(int *)out = kind_of(at) == DEVICE ? 2 : 1;
    return SUCCESS;
}
/* Kernels that PyTorch compiles at run time (jiterator) are loaded and launched through the driver */
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

#define REFUSED(name) API(name)(void) { return virtual_device_refuse(#name, NOT_SUPPORTED); }
REFUSED(cuMemExportToShareableHandle) REFUSED(cuMemImportFromShareableHandle) REFUSED(cuMemGetHandleForAddressRange)
REFUSED(cuMemRetainAllocationHandle) REFUSED(cuMemGetAllocationPropertiesFromHandle) REFUSED(cuMemGetAddressRange_v2)
REFUSED(cuStreamWriteValue32) REFUSED(cuStreamWriteValue32_v2) REFUSED(cuMulticastCreate) REFUSED(cuMulticastAddDevice)
REFUSED(cuMulticastBindMem) REFUSED(cuMulticastUnbind) REFUSED(cuLinkCreate_v2) REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkComplete) REFUSED(cuGreenCtxCreate) REFUSED(cuCtxFromGreenCtx) REFUSED(cuLaunchKernelEx)

/* Other libraries than cuBLAS are the real ones and would look for a real driver: the functions that create their handles
   are refused here */
REFUSED(cudnnCreate) REFUSED(cusparseCreate) REFUSED(cusolverDnCreate) REFUSED(cufftCreate) REFUSED(curandCreateGenerator)
REFUSED(cusparseLtInit) REFUSED(ncclGetUniqueId) REFUSED(ncclCommInitRank) REFUSED(ncclCommInitRankConfig) REFUSED(ncclCommInitAll)
API_AS(const char *, cudnnGetErrorString)(int status) { (void)status; return refused; }

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

/* ---- cuBLAS: handles and descriptors exist, products are not computed. 1: CUBLAS_STATUS_NOT_INITIALIZED ---- */

API(cublasCreate_v2)(void **handle) { if (virtual_device_use()) return 1; *handle = new_handle(); return SUCCESS; }
API(cublasLtCreate)(void **handle) { if (virtual_device_use()) return 1; *handle = new_handle(); return SUCCESS; }
API(cublasLtMatmulDescCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasLtMatrixLayoutCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasLtMatmulPreferenceCreate)(void **out) { *out = new_handle(); return SUCCESS; }
API(cublasGetVersion_v2)(void *handle, int *version) { (void)handle; *version = CUDA_RUNTIME_VERSION * 10; return SUCCESS; }
API_AS(size_t, cublasLtGetVersion)(void) { return CUDA_RUNTIME_VERSION * 10; }
API(cublasGetStream_v2)(void *handle, void **stream) { (void)handle; *stream = 0; return SUCCESS; }
API(cublasGetPointerMode_v2)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetMathMode)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetAtomicsMode)(void *handle, int *mode) { (void)handle; *mode = 0; return SUCCESS; }
API(cublasGetSmCountTarget)(void *handle, int *count) { (void)handle; *count = 0; return SUCCESS; }
API_AS(const char *, cublasGetStatusName)(int status) { return status ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_SUCCESS"; }
API_AS(const char *, cublasGetStatusString)(int status) { return status ? refused : "the operation completed"; }

struct heuristic { unsigned long long algorithm[8]; size_t workspace_bytes; int state; float waves; int reserved[4]; };
API(cublasLtMatmulAlgoGetHeuristic)(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                    int asked, struct heuristic *out, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *found = asked > 0;
    if (asked > 0) memset(out, 0, sizeof *out);
    return SUCCESS;
}
