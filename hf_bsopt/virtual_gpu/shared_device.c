/* Which card this is, and who uses it.

   HF_BSOPT_VIRTUAL_DEVICE         "total context capability multiprocessors threads name": bytes of the whole device, bytes
                                   that its context takes, compute capability x 10, multiprocessors, resident threads of one
   HF_BSOPT_VIRTUAL_DEVICE_SHARED  a file, which need not exist. All processes that name it have one card, of which each
                                   sees what the others took; without it every process has a card of its own

   The file is a table: a slot for each process that has a context. As with the real driver, what a process had is free when
   it has ended, however that went: nobody clears up, but whoever looks at the table next throws out who has ended.

   The file is opened for each look, and locked by flock. The system ends a lock with the process that held it, so that one
   which is killed inside stops nobody; and a fork inherits no file, whose lock it would hold on. Nothing is added up in the
   file: every slot is right by itself, and a page is written whole, so that there is no moment at which a kill leaves it
   wrong. Of /proc only /proc/<pid>/stat is read; the processes have to see each other there (one container). */
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

/* ---- a process, as /proc/<pid>/stat tells of it ---- */

/* 0, or what went wrong. Fields 3 (state) and 22 (starttime), proc_pid_stat(5); a name may have spaces and brackets in it. */
static int look_at(pid_t pid, char *state, uint64_t *started) {
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

/* A zombie has ended: its parent has not asked yet how. What can't be read for another reason is taken to live. */
static int has_ended(const struct virtual_process *process) {
    char state;
    uint64_t started;
    int error = look_at((pid_t)process->pid, &state, &started);
    if (error) return error == ENOENT || error == ESRCH;
    return state == 'Z' || state == 'X' || started != process->started;
}

/* ---- the table ---- */

struct table {
    char mark[32];
    struct virtual_process slots[PROCESSES];
};
static const char MARK[32] = "hf_bsopt virtual card 1";

/* A descriptor that holds the lock, -1 if there is none to be had. Who has ended is no longer in the table. */
static int enter(struct table *table) {
    int fd = open(shared, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    int locked;
    do locked = flock(fd, LOCK_EX);
    while (locked && errno == EINTR);
    ssize_t got = locked ? -1 : pread(fd, table, sizeof *table, 0);
    if (got == 0) { /* new */
        memset(table, 0, sizeof *table);
        memcpy(table->mark, MARK, sizeof MARK);
    } else if (got != sizeof *table || memcmp(table->mark, MARK, sizeof MARK)) { /* somebody's own file: left as it is */
        close(fd);
        return -1;
    }
    for (int i = 0; i < PROCESSES; i++)
        if (table->slots[i].pid && has_ended(&table->slots[i])) memset(&table->slots[i], 0, sizeof *table->slots);
    return fd;
}
/* The lock is undone by word, not only by closing: a fork that another thread made meanwhile has the descriptor too. */
static int leave(int fd, const struct table *table, int status) {
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
static struct virtual_process *slot_of(struct table *table, pid_t pid) { /* 0: one that is empty */
    for (int i = 0; i < PROCESSES; i++)
        if (table->slots[i].pid == (uint64_t)pid) return &table->slots[i];
    return NULL;
}

int shared_device_take(size_t bytes) {
    struct table table;
    struct virtual_process self = {.pid = getpid(), .context_bytes = gpu.context};
    char state;
    if (look_at(getpid(), &state, &self.started)) return UNAVAILABLE;
    int fd = enter(&table);
    if (fd < 0) return UNAVAILABLE;
    struct virtual_process *mine = slot_of(&table, getpid());
    size_t gone = used(&table) + (mine ? 0 : gpu.context);
    if (gone > gpu.total || bytes > gpu.total - gone) return leave(fd, &table, OUT_OF_MEMORY);
    if (!mine) {
        mine = slot_of(&table, 0);
        if (!mine) return leave(fd, &table, UNAVAILABLE);
        *mine = self;
    }
    mine->bytes += bytes;
    return leave(fd, &table, SUCCESS);
}

void shared_device_give_back(size_t bytes) {
    struct table table;
    int fd = enter(&table);
    if (fd < 0) return;
    struct virtual_process *mine = slot_of(&table, getpid());
    if (mine) mine->bytes -= bytes < mine->bytes ? bytes : mine->bytes;
    leave(fd, &table, SUCCESS);
}

EXPORTED int shared_device_processes(struct virtual_process out[PROCESSES], unsigned *count) {
    struct table table;
    int fd = enter(&table);
    if (fd < 0) return UNAVAILABLE;
    *count = 0;
    for (int i = 0; i < PROCESSES; i++)
        if (table.slots[i].pid) out[(*count)++] = table.slots[i];
    return leave(fd, &table, SUCCESS);
}

EXPORTED int shared_device_used(size_t *bytes) {
    struct table table;
    int fd = enter(&table);
    if (fd < 0) return UNAVAILABLE;
    *bytes = used(&table);
    return leave(fd, &table, SUCCESS);
}
