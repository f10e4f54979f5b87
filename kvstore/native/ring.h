/* What an io_uring of one batch at a time is made of: its kernel queues (ring_queue.c), the batch that
 * moves through them (ring_batch.c), and the Python type `Ring` that owns both (ring.c). */
#ifndef DUALPATH_RING_H
#define DUALPATH_RING_H
#include "parts.h"

#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>

#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_ASYNC_CANCEL_ANY
#define IORING_ASYNC_CANCEL_ANY (1U << 2)
#endif
#ifndef IORING_ASYNC_CANCEL_ALL
#define IORING_ASYNC_CANCEL_ALL (1U << 0)
#endif

#define PIECE_BYTES ((size_t)1 << 30) /* the kernel's limit of one registered buffer */

typedef struct {
    int64_t offset, at;
    uint32_t nbytes;
    int fd;
} Item;

/* A transfer in flight, or waiting to be submitted again: of the items [item, end), or of `item` only
 * if they go `alone`. `done` bytes from the start of `item` have moved. */
typedef struct {
    uint32_t item, end, done, stalls;
    int alone;
} Slot;

typedef struct {
    PyObject_HEAD
    int fd, busy, writing, paced, fixed, cancelled;
    unsigned depth, most; /* slots; how many of them this batch may use */
    unsigned char *rings;
    size_t rings_bytes, sqes_bytes;
    struct io_uring_sqe *sqes;
    _Atomic unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    unsigned *sq_array, sq_mask, cq_mask;
    struct io_uring_cqe *cqes;
    Py_buffer registered, memory, errors;
    Item *items;
    Slot *slots;
    uint32_t *idle, *again, *ended; /* slots; slots; items */
    uint32_t idle_count, again_count, ended_count, count, next, pending, flying, unsubmitted;
    uint64_t left_bytes, flying_bytes; /* of items that have not ended; submitted of them */
} Ring;

/* The queues. Those that return an int return 0 or an errno. */
int dualpath_queue_open(Ring *ring); /* for `depth` transfers and a cancel */
void dualpath_queue_close(Ring *ring);
int dualpath_queue_register(Ring *ring, const void *parts, unsigned count);
/* Submit, and wait for `least` completions, at most until `left_ns`. */
int dualpath_queue_enter(Ring *ring, unsigned least, int64_t left_ns);
struct io_uring_sqe *dualpath_queue_entry(Ring *ring, unsigned *index); /* zeroed; then push it */
void dualpath_queue_push(Ring *ring, unsigned index);

/* The batch. */
int64_t dualpath_now_ns(void);
/* Until `least` items have ended or the time is over. 0, EINTR, or the errno of a broken ring. */
int dualpath_batch_pump(Ring *ring, uint32_t least, int64_t deadline_ns);
/* End what has not been submitted, and ask the kernel to end the rest. */
void dualpath_batch_cancel(Ring *ring);

#endif
