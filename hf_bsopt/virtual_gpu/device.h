/* The virtual device (device.c), on which the other files implement CUDA's interfaces. */
#include "shared_device.h"

#define EXPORTED __attribute__((visibility("default")))
#define API(name) EXPORTED int name
#define API_AS(type, name) EXPORTED type name

enum { INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { UNREGISTERED = 0, PINNED = 1, DEVICE = 2, MANAGED = 3 }; /* kinds of memory, as in enum cudaMemoryType */

static const size_t PAGE = (size_t)2 << 20; /* the driver allocates multiples of 2 MiB */

/* Addresses of device memory, with no memory behind them: those of cudaMalloc start at SEGMENTS, those of
   cuMemAddressReserve at RANGES */
static const uintptr_t SEGMENTS = 0x100000000000, RANGES = 0x300000000000, END = 0x500000000000;

/* ---- functions that are not implemented ---- */

EXPORTED int virtual_device_refuse(const char *name, int status); /* reports the name and returns the status */
const char *last_refusal(void);                                   /* an error message that names the function */

/* ---- driver and context ---- */

int initialize_driver(void); /* status: NOT_INITIALIZED in a process forked after the initialization */
int is_initialized(void);
int is_forked(void); /* whether this process was forked after the initialization */
int has_context(void);
EXPORTED int virtual_device_use(void); /* status; the first call creates the context */

#define RETURN_UNLESS_SUCCESS(call)                                                                                     \
    do {                                                                                                                \
        int status_ = call;                                                                                             \
        if (status_) return status_;                                                                                    \
    } while (0)
#define NEEDS_DRIVER RETURN_UNLESS_SUCCESS(initialize_driver())
#define NEEDS_CUINIT RETURN_UNLESS_SUCCESS(is_initialized() ? SUCCESS : NOT_INITIALIZED) /* fails before cuInit */
#define NEEDS_CONTEXT RETURN_UNLESS_SUCCESS(virtual_device_use())

/* ---- memory ---- */

int allocate_bytes(size_t bytes); /* whether they fit */
void free_bytes(size_t bytes);
int memory_info(size_t *free, size_t *total); /* status */
int kind_of(const void *at);                  /* in memory.c */

/* ---- properties ---- */

int attribute(int which);                /* of enum cudaDeviceAttr */
void fill_properties(char *out);         /* a struct cudaDeviceProp */
int shared_memory_per_block(void);       /* bytes */
int occupancy(int *blocks, int threads); /* status; resident blocks of this many threads per multiprocessor */

/* ---- handles and errors ---- */

void *new_handle(void); /* opaque, never dereferenced */
const char *error_text(int error);
const char *error_name(int error);
