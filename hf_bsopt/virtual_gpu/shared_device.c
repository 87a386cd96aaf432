/* The properties of the virtual device, and the table of the processes that share it.

   HF_BSOPT_VIRTUAL_DEVICE         "total context capability multiprocessors threads name": bytes of the whole device, bytes
                                   of its context, compute capability x 10, multiprocessors, resident threads per multiprocessor
   HF_BSOPT_VIRTUAL_DEVICE_SHARED  a file, which need not exist. All processes that name it share one device, and each sees
                                   what the others allocated; without it every process has its own device

   The file is a table with a slot for each process that has a context. As with the real driver, the memory of a process is
   freed when it ends, for whatever reason: the next process that reads the table removes the slots of ended processes.

   The file is opened for each access and locked by flock. The kernel releases a lock when its holder ends, so a process
   that is killed while it holds the lock blocks no other; and a fork inherits no open file, whose lock it would keep. The
   file contains no totals: each slot is valid by itself and the page is written at once, so that a kill at any moment
   leaves the table consistent. Only /proc/<pid>/stat is read; the processes must see each other there (one container). */
#define _GNU_SOURCE
#include "shared_device.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

struct virtual_gpu gpu = {(size_t)80 << 30, 0, 80, 108, 2048, "Virtual GPU", "hf_bsopt virtual"};
static char *shared; /* the file's path */

__attribute__((constructor)) static void read_environment(void) {
    const char *set = getenv("HF_BSOPT_VIRTUAL_DEVICE"), *path = getenv("HF_BSOPT_VIRTUAL_DEVICE_SHARED");
    if (set)
        sscanf(set, "%zu %zu %d %d %d %255[^\n]", &gpu.total, &gpu.context, &gpu.capability, &gpu.multiprocessors,
               &gpu.threads, gpu.name);
    if (path && *path) shared = strdup(path);
}

EXPORTED const struct virtual_gpu *shared_device(void) { return &gpu; }
EXPORTED int shared_device_is_shared(void) { return shared != NULL; }

/* ---- a process, from /proc/<pid>/stat ---- */

/* Returns 0 or an errno. Fields 3 (state) and 22 (starttime), proc_pid_stat(5); a name may contain spaces and parentheses. */
static int read_stat(pid_t pid, char *state, uint64_t *started) {
    char path[32], text[1024], *name_end;
    unsigned long long ticks;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    ssize_t got = read(fd, text, sizeof text - 1);
    int error = errno;
    close(fd);
    if (got < 0) return error; /* ESRCH: it ended since it was opened */
    text[got] = 0;
    name_end = strrchr(text, ')');
    if (!name_end || sscanf(name_end + 1,
                            " %c %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %llu",
                            state, &ticks) != 2)
        return EINVAL;
    *started = ticks;
    return 0;
}

/* A zombie has ended; its parent has not waited for it yet. If stat cannot be read for another reason, the process counts
   as running. */
static int has_ended(const struct virtual_process *process) {
    char state;
    uint64_t started;
    int error = read_stat((pid_t)process->pid, &state, &started);
    if (error) return error == ENOENT || error == ESRCH;
    return state == 'Z' || state == 'X' || started != process->started;
}

/* ---- the table ---- */

struct table {
    char mark[32];
    struct virtual_process slots[PROCESSES];
};
static const char MARK[32] = "hf_bsopt virtual GPU 1";

/* Locks the file and reads the table without ended processes. Returns the descriptor that holds the lock, or -1. */
static int open_table(struct table *table) {
    int fd = open(shared, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    int locked;
    do locked = flock(fd, LOCK_EX);
    while (locked && errno == EINTR);
    ssize_t got = locked ? -1 : pread(fd, table, sizeof *table, 0);
    if (got == 0) { /* new */
        memset(table, 0, sizeof *table);
        memcpy(table->mark, MARK, sizeof MARK);
    } else if (got != sizeof *table || memcmp(table->mark, MARK, sizeof MARK)) { /* not our table: leave the file as it is */
        close(fd);
        return -1;
    }
    for (int i = 0; i < PROCESSES; i++)
        if (table->slots[i].pid && has_ended(&table->slots[i])) memset(&table->slots[i], 0, sizeof *table->slots);
    return fd;
}
/* Unlocks explicitly, not only by closing: a fork made by another thread in between has the descriptor too. */
static int close_table(int fd, const struct table *table, int status) {
    if (status == SUCCESS && pwrite(fd, table, sizeof *table, 0) != sizeof *table) status = UNAVAILABLE;
    flock(fd, LOCK_UN);
    close(fd);
    return status;
}

static size_t used(const struct table *table) {
    size_t bytes = 0;
    for (int i = 0; i < PROCESSES; i++)
        if (table->slots[i].pid) bytes += table->slots[i].context_bytes + table->slots[i].bytes;
    return bytes;
}
static struct virtual_process *slot_of(struct table *table, pid_t pid) { /* pid 0 finds an empty slot */
    for (int i = 0; i < PROCESSES; i++)
        if (table->slots[i].pid == (uint64_t)pid) return &table->slots[i];
    return NULL;
}

int shared_device_allocate(size_t bytes) {
    struct table table;
    struct virtual_process self = {.pid = getpid(), .context_bytes = gpu.context};
    char state;
    if (read_stat(getpid(), &state, &self.started)) return UNAVAILABLE;
    int fd = open_table(&table);
    if (fd < 0) return UNAVAILABLE;
    struct virtual_process *mine = slot_of(&table, getpid());
    size_t in_use = used(&table) + (mine ? 0 : gpu.context);
    if (in_use > gpu.total || bytes > gpu.total - in_use) return close_table(fd, &table, OUT_OF_MEMORY);
    if (!mine) {
        mine = slot_of(&table, 0);
        if (!mine) return close_table(fd, &table, UNAVAILABLE);
        *mine = self;
    }
    mine->bytes += bytes;
    return close_table(fd, &table, SUCCESS);
}

void shared_device_free(size_t bytes) {
    struct table table;
    int fd = open_table(&table);
    if (fd < 0) return;
    struct virtual_process *mine = slot_of(&table, getpid());
    if (mine) mine->bytes -= bytes < mine->bytes ? bytes : mine->bytes;
    close_table(fd, &table, SUCCESS);
}

EXPORTED int shared_device_processes(struct virtual_process out[PROCESSES], unsigned *count) {
    struct table table;
    int fd = open_table(&table);
    if (fd < 0) return UNAVAILABLE;
    *count = 0;
    for (int i = 0; i < PROCESSES; i++)
        if (table.slots[i].pid) out[(*count)++] = table.slots[i];
    return close_table(fd, &table, SUCCESS);
}

EXPORTED int shared_device_used(size_t *bytes) {
    struct table table;
    int fd = open_table(&table);
    if (fd < 0) return UNAVAILABLE;
    *bytes = used(&table);
    return close_table(fd, &table, SUCCESS);
}
