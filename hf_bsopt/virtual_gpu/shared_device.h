/* The properties of the virtual device and the processes that use it: for the virtual driver and the virtual NVML. */
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, UNAVAILABLE = 46 };
enum { PROCESSES = 127 }; /* so that the table is one page */

struct virtual_gpu {
    size_t total, context;
    int capability, multiprocessors, threads;
    char name[256], uuid[16];
};
struct virtual_process { /* with a context on the device */
    uint64_t pid, started;          /* pid 0: an empty slot. started: ticks since boot, which identify a reused pid */
    uint64_t context_bytes, bytes;  /* bytes: without the context */
};

extern struct virtual_gpu gpu; /* inside the virtual driver */
const struct virtual_gpu *shared_device(void); /* for other libraries */

/* The rest is for a shared device. An int is a status as above. */
int shared_device_is_shared(void);
int shared_device_allocate(size_t bytes); /* also the context, if this process has none yet */
void shared_device_free(size_t bytes);
int shared_device_processes(struct virtual_process out[PROCESSES], unsigned *count);
int shared_device_used(size_t *bytes); /* by all processes */
