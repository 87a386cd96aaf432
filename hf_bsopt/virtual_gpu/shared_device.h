/* Which card this is, and who uses it. shared_device.c says how; the virtual driver and the virtual NVML both ask it. */
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
struct virtual_process { /* that has a context on the card */
    uint64_t pid, started;          /* pid 0: nobody. started: ticks since boot, so that a pid may come again */
    uint64_t context_bytes, bytes;  /* bytes: all beside the context */
};

extern struct virtual_gpu gpu; /* within the virtual driver */
const struct virtual_gpu *shared_device(void); /* for others */

/* The rest is for a card that is shared. What returns an int returns a status as above. */
int shared_device_is_shared(void);
int shared_device_take(size_t bytes); /* the context too, if this process has none yet */
void shared_device_give_back(size_t bytes);
int shared_device_processes(struct virtual_process out[PROCESSES], unsigned *count);
int shared_device_used(size_t *bytes); /* by all of them */
