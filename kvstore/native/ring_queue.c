/* The submission and completion queues that the kernel shares with a ring. */
#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEEDED_FEATURES \
    (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG)

static int ring_setup(unsigned entries, struct io_uring_params *params) {
    return (int)syscall(SYS_io_uring_setup, entries, params);
}

int dualpath_queue_register(Ring *ring, const void *parts, unsigned count) {
    unsigned what = IORING_REGISTER_BUFFERS;
    return syscall(SYS_io_uring_register, ring->fd, what, parts, count) < 0 ? errno : 0;
}

int dualpath_queue_enter(Ring *ring, unsigned least, int64_t left_ns) {
    struct __kernel_timespec left = {.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};
    struct io_uring_getevents_arg argument = {.ts = (uint64_t)(uintptr_t)&left};
    unsigned flags = IORING_ENTER_EXT_ARG | (least ? IORING_ENTER_GETEVENTS : 0);
    long taken = syscall(
        SYS_io_uring_enter, ring->fd, ring->unsubmitted, least, flags, &argument, sizeof argument);
    if (taken >= 0) {
        ring->unsubmitted -= (uint32_t)taken;
        return 0;
    }
    return errno; /* then it has taken none: what it has taken goes before an error of the wait */
}

struct io_uring_sqe *dualpath_queue_entry(Ring *ring, unsigned *index) {
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    *index = tail & ring->sq_mask;
    struct io_uring_sqe *entry = &ring->sqes[*index];
    memset(entry, 0, sizeof *entry);
    return entry;
}

void dualpath_queue_push(Ring *ring, unsigned index) {
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    ring->sq_array[index] = index;
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    ring->unsubmitted++;
}

static int map_rings(Ring *ring, const struct io_uring_params *params) {
    size_t sq_bytes = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    size_t bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    void *rings = mmap(NULL, bytes, protection, flags, ring->fd, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED) {
        return errno;
    }
    ring->rings = rings;
    ring->rings_bytes = bytes;
    bytes = params->sq_entries * sizeof(struct io_uring_sqe);
    void *sqes = mmap(NULL, bytes, protection, flags, ring->fd, IORING_OFF_SQES);
    if (sqes == MAP_FAILED) {
        return errno;
    }
    ring->sqes = sqes;
    ring->sqes_bytes = bytes;
    ring->sq_head = (_Atomic unsigned *)(ring->rings + params->sq_off.head);
    ring->sq_tail = (_Atomic unsigned *)(ring->rings + params->sq_off.tail);
    ring->sq_mask = *(unsigned *)(ring->rings + params->sq_off.ring_mask);
    ring->sq_array = (unsigned *)(ring->rings + params->sq_off.array);
    ring->cq_head = (_Atomic unsigned *)(ring->rings + params->cq_off.head);
    ring->cq_tail = (_Atomic unsigned *)(ring->rings + params->cq_off.tail);
    ring->cq_mask = *(unsigned *)(ring->rings + params->cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(ring->rings + params->cq_off.cqes);
    return 0;
}

int dualpath_queue_open(Ring *ring) {
    struct io_uring_params params = {.flags = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN};
    ring->fd = ring_setup(ring->depth + 1, &params);
    if (ring->fd < 0 && errno == EINVAL) {
        /* A kernel before 5.19 knows one of the flags not; both only save time. */
        memset(&params, 0, sizeof params);
        ring->fd = ring_setup(ring->depth + 1, &params);
    }
    if (ring->fd < 0) {
        return errno;
    }
    if ((params.features & NEEDED_FEATURES) != NEEDED_FEATURES) {
        return ENOSYS;
    }
    return map_rings(ring, &params);
}

void dualpath_queue_close(Ring *ring) {
    if (ring->fd >= 0) {
        close(ring->fd); /* pages that transfers in flight still use stay pinned until they end */
        ring->fd = -1;
    }
    if (ring->sqes != NULL) {
        munmap(ring->sqes, ring->sqes_bytes);
        ring->sqes = NULL;
    }
    if (ring->rings != NULL) {
        munmap(ring->rings, ring->rings_bytes);
        ring->rings = NULL;
    }
}
