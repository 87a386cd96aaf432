/* Memory of the CUDA runtime: device, pinned and managed memory, copies. */
#define _GNU_SOURCE
#include "device.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int on_device(const void *at) { return (uintptr_t)at >= SEGMENTS && (uintptr_t)at < END; }

typedef struct block { /* a segment of device memory, or pinned or managed host memory */
    char *at;
    size_t bytes;
    int kind;
    struct block *next;
} block;
static block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for blocks */

static void add_block(void *at, size_t bytes, int kind) {
    block *new = malloc(sizeof *new);
    pthread_mutex_lock(&lock);
    *new = (block){at, bytes, kind, blocks};
    blocks = new;
    pthread_mutex_unlock(&lock);
}
static block remove_block(void *at) { /* {0} if it is not in the list */
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
int kind_of(const void *at) {
    if (on_device(at)) return DEVICE;
    int kind = UNREGISTERED;
    pthread_mutex_lock(&lock);
    for (block *b = blocks; b && !kind; b = b->next)
        if (b->kind != DEVICE && (char *)at >= b->at && (char *)at < b->at + b->bytes) kind = b->kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

/* ---- device memory ---- */

API(cudaMalloc)(void **out, size_t bytes) {
    static uintptr_t next = SEGMENTS;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    *out = 0;
    NEEDS_CONTEXT;
    if (!allocate_bytes(bytes)) return OUT_OF_MEMORY;
    *out = (void *)__atomic_fetch_add(&next, bytes, __ATOMIC_RELAXED);
    add_block(*out, bytes, DEVICE);
    return SUCCESS;
}
API(cudaFree)(void *at) {
    NEEDS_CONTEXT;
    block gone = remove_block(at);
    if (gone.kind == DEVICE) free_bytes(gone.bytes);
    if (gone.kind == MANAGED) munmap(gone.at, gone.bytes);
    return SUCCESS;
}
API(cudaMallocAsync)(void **out, size_t bytes, void *stream) { (void)stream; return cudaMalloc(out, bytes); }
API(cudaFreeAsync)(void *at, void *stream) { (void)stream; return cudaFree(at); }
API(cudaMemGetInfo)(size_t *free, size_t *total) { return memory_info(free, total); }

/* ---- pinned and managed memory ---- */

static int allocate_pinned(void **out, size_t bytes) {
    NEEDS_CONTEXT;
    if (posix_memalign(out, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
    add_block(*out, bytes, PINNED);
    return SUCCESS;
}
API(cudaHostAlloc)(void **out, size_t bytes, unsigned flags) { (void)flags; return allocate_pinned(out, bytes); }
API(cudaMallocHost)(void **out, size_t bytes) { return allocate_pinned(out, bytes); }
API(cudaFreeHost)(void *at) { if (remove_block(at).kind == PINNED) free(at); return SUCCESS; }
API(cudaHostRegister)(void *at, size_t bytes, unsigned flags) { (void)flags; NEEDS_CONTEXT; add_block(at, bytes, PINNED); return SUCCESS; }
API(cudaHostUnregister)(void *at) { remove_block(at); return SUCCESS; }
API(cudaHostGetDevicePointer)(void **out, void *at, unsigned flags) { (void)flags; *out = at; return SUCCESS; }
API(cudaMallocManaged)(void **out, size_t bytes, unsigned flags) { /* not counted: the driver can move it to the host */
    (void)flags;
    NEEDS_CONTEXT;
    *out = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*out == MAP_FAILED) return OUT_OF_MEMORY;
    add_block(*out, bytes, MANAGED);
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

/* ---- copies: what is read from the device is zero ---- */

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
