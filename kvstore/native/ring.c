/* An io_uring of one batch at a time: kvstore/dualpath/kvstore/ring_device.py.
 *
 * A batch is n transfers between files and one memory, given as packed arrays, which are copied.
 * `wait` keeps up to `depth` of them in flight, goes on after short transfers and interruptions, and
 * returns which have ended. The kernel owns the memory of a transfer until its completion was
 * reaped; the ring holds on to the memory until none is left. No callbacks.
 *
 * Reads that follow each other in the file and in memory move as one, up to RUN_BYTES_MAX: half the
 * price for small ones. If that fails, they are tried one by one, so that each has its own error.
 *
 * Towards its end a batch that is `paced` has only three quarters of what is left in flight: some
 * devices, those of many virtual machines among them, tell of nothing until they have done all that
 * they were given, and a caller with work on each item would begin it when the last one is there. Who
 * has none is woken less often without. */
#include "parts.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

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

#define DEPTH_MAX 1024
#define ITEMS_MAX (1 << 20)
#define ITEM_BYTES_MAX (1 << 30)
#define PIECE_BYTES ((size_t)1 << 30) /* the kernel's limit of one registered buffer */
#define PIECES_MAX 16384
#define ALIGN_BYTES 4096
#define RUN_BYTES_MAX (1 << 20)
#define FLYING_BYTES_LEAST (12 << 20) /* to hold back less costs a busy device more than it gains */
#define STALLS_MAX 16 /* completions in a row of one transfer that may move nothing */
#define PAUSE_NS 1000000
#define UNDER_WAY (-1)
#define CANCEL_DATA UINT64_MAX
#define NEEDED_FEATURES \
    (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG)

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

static int ring_setup(unsigned entries, struct io_uring_params *params) {
    return (int)syscall(SYS_io_uring_setup, entries, params);
}

static int ring_register(int fd, unsigned what, const void *argument, unsigned count) {
    return (int)syscall(SYS_io_uring_register, fd, what, argument, count);
}

/* Submit, and wait for `least` completions, at most until `left_ns`. 0 or an errno. */
static int ring_enter(Ring *ring, unsigned least, int64_t left_ns) {
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

static struct io_uring_sqe *next_entry(Ring *ring, unsigned *index) {
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    *index = tail & ring->sq_mask;
    struct io_uring_sqe *entry = &ring->sqes[*index];
    memset(entry, 0, sizeof *entry);
    return entry;
}

static void push_entry(Ring *ring, unsigned index) {
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    ring->sq_array[index] = index;
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    ring->unsubmitted++;
}

/* Bytes that a slot still has to move in its next transfer. */
static uint32_t slot_bytes(const Ring *ring, const Slot *slot) {
    const Item *first = &ring->items[slot->item];
    const Item *last = slot->alone ? first : &ring->items[slot->end - 1];
    return (uint32_t)(last->at + last->nbytes - first->at) - slot->done;
}

static void push_transfer(Ring *ring, uint32_t number) {
    unsigned index;
    struct io_uring_sqe *entry = next_entry(ring, &index);
    const Slot *slot = &ring->slots[number];
    const Item *item = &ring->items[slot->item];
    size_t at = (size_t)item->at + slot->done, left = slot_bytes(ring, slot);
    entry->opcode = ring->writing ? IORING_OP_WRITE : IORING_OP_READ;
    if (ring->fixed && at / PIECE_BYTES == (at + left - 1) / PIECE_BYTES) {
        entry->opcode = ring->writing ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
        entry->buf_index = (uint16_t)(at / PIECE_BYTES);
    }
    entry->fd = item->fd;
    entry->off = (uint64_t)item->offset + slot->done;
    entry->addr = (uint64_t)(uintptr_t)((char *)ring->memory.buf + at);
    entry->len = (uint32_t)left;
    entry->user_data = number;
    push_entry(ring, index);
    ring->flying++;
    ring->flying_bytes += left;
}

/* The first item of a slot has ended. */
static void end_item(Ring *ring, Slot *slot, int error) {
    uint32_t item = slot->item++;
    ((int32_t *)ring->errors.buf)[item] = error;
    ring->ended[ring->ended_count++] = item;
    ring->left_bytes -= ring->items[item].nbytes;
    ring->pending--;
}

static void end_slot(Ring *ring, uint32_t number, int error) {
    Slot *slot = &ring->slots[number];
    while (slot->item < slot->end) {
        end_item(ring, slot, error);
    }
    ring->idle[ring->idle_count++] = number;
}

/* `item` has ended, which went alone: the next one of its run follows. */
static void end_alone(Ring *ring, uint32_t number, int error) {
    Slot *slot = &ring->slots[number];
    end_item(ring, slot, error);
    if (slot->item == slot->end || ring->cancelled) {
        end_slot(ring, number, ECANCELED);
        return;
    }
    slot->done = slot->stalls = 0;
    ring->again[ring->again_count++] = number;
}

static void fail(Ring *ring, uint32_t number, int error) {
    Slot *slot = &ring->slots[number];
    if (slot->alone) {
        end_alone(ring, number, error);
    } else if (slot->end - slot->item == 1 || ring->cancelled) {
        end_slot(ring, number, error);
    } else {
        slot->alone = 1; /* which of them is it? */
        slot->stalls = 0;
        ring->again[ring->again_count++] = number;
    }
}

static void complete(Ring *ring, uint32_t number, int result) {
    Slot *slot = &ring->slots[number];
    uint32_t want = slot_bytes(ring, slot);
    ring->flying--;
    ring->flying_bytes -= want;
    if (result < 0) {
        /* A cancel that came late from the batch before is no reason to fail this one. */
        int again = result == -EINTR || result == -EAGAIN || (result == -ECANCELED && !ring->cancelled);
        if (again && ++slot->stalls <= STALLS_MAX) {
            ring->again[ring->again_count++] = number;
        } else {
            fail(ring, number, -result);
        }
        return;
    }
    if ((uint32_t)result >= want) {
        if (slot->alone) {
            end_alone(ring, number, 0);
        } else {
            end_slot(ring, number, 0);
        }
        return;
    }
    /* A short transfer goes on from its last whole page, as O_DIRECT wants it. */
    uint32_t whole = (uint32_t)result - (uint32_t)result % ALIGN_BYTES;
    slot->done += whole;
    slot->stalls = whole ? 0 : slot->stalls + 1;
    while (slot->done >= ring->items[slot->item].nbytes) {
        slot->done -= ring->items[slot->item].nbytes;
        end_item(ring, slot, 0);
    }
    if (result == 0 || slot->stalls > STALLS_MAX) {
        fail(ring, number, EIO); /* the end of the file, or no progress */
    } else {
        ring->again[ring->again_count++] = number;
    }
}

static void reap(Ring *ring) {
    unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    unsigned tail = atomic_load_explicit(ring->cq_tail, memory_order_acquire);
    for (; head != tail; head++) {
        const struct io_uring_cqe *entry = &ring->cqes[head & ring->cq_mask];
        if (entry->user_data != CANCEL_DATA) {
            complete(ring, (uint32_t)entry->user_data, entry->res);
        }
    }
    atomic_store_explicit(ring->cq_head, head, memory_order_release);
}

/* Where the items that move together with `first` end. */
static uint32_t run_end(const Ring *ring, uint32_t first) {
    const Item *items = ring->items;
    uint64_t nbytes = items[first].nbytes;
    uint32_t end = first + 1;
    for (; !ring->writing && end < ring->count; end++) {
        const Item *before = &items[end - 1], *item = &items[end];
        nbytes += item->nbytes;
        if (nbytes > RUN_BYTES_MAX || before->nbytes % ALIGN_BYTES || item->fd != before->fd ||
            item->at != before->at + before->nbytes ||
            item->offset != before->offset + before->nbytes) {
            break;
        }
    }
    return end;
}

static int may_fly(const Ring *ring) {
    if (ring->flying >= ring->most) {
        return 0;
    }
    return !ring->paced || ring->flying_bytes < FLYING_BYTES_LEAST ||
           ring->flying_bytes < ring->left_bytes / 4 * 3;
}

static void fill(Ring *ring) {
    /* One entry stays free for a cancel; slots are as many as `depth`. */
    while (ring->again_count && ring->unsubmitted < ring->depth) {
        push_transfer(ring, ring->again[--ring->again_count]);
    }
    while (ring->idle_count && ring->next < ring->count && ring->unsubmitted < ring->depth &&
           may_fly(ring)) {
        uint32_t number = ring->idle[--ring->idle_count], end = run_end(ring, ring->next);
        ring->slots[number] = (Slot){.item = ring->next, .end = end};
        ring->next = end;
        push_transfer(ring, number);
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The kernel could not take an entry: let something end, or memory come free, first. */
static int make_room(Ring *ring, int64_t deadline_ns) {
    int64_t left_ns = deadline_ns - now_ns();
    if (left_ns <= 0) {
        return 0;
    }
    if (ring->flying > ring->unsubmitted) {
        uint32_t unsubmitted = ring->unsubmitted;
        ring->unsubmitted = 0;
        ring_enter(ring, 1, left_ns);
        ring->unsubmitted = unsubmitted;
    } else {
        struct timespec pause = {.tv_nsec = left_ns < PAUSE_NS ? left_ns : PAUSE_NS};
        nanosleep(&pause, NULL);
    }
    return 1;
}

/* Until `least` items have ended or the time is over. 0, EINTR, or the errno of a broken ring. */
static int pump(Ring *ring, uint32_t least, int64_t deadline_ns) {
    for (;;) {
        reap(ring);
        fill(ring);
        uint32_t missing = ring->ended_count < least ? least - ring->ended_count : 0;
        if (missing > ring->pending) {
            missing = ring->pending;
        }
        if (missing > ring->flying) {
            missing = ring->flying;
        }
        if (missing == 0 && ring->unsubmitted == 0) {
            return 0;
        }
        int64_t left_ns = deadline_ns - now_ns();
        int error = ring_enter(ring, missing, left_ns > 0 ? left_ns : 0);
        if (error == ETIME || (left_ns <= 0 && error == 0)) {
            reap(ring);
            return 0;
        }
        if (error != 0 && error != EAGAIN && error != EBUSY) {
            return error;
        }
        if (error != 0 && !make_room(ring, deadline_ns)) {
            return 0;
        }
    }
}

static PyObject *refused(int error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static int usable(Ring *ring) {
    if (ring->fd < 0 || ring->busy) {
        PyErr_SetString(PyExc_ValueError, ring->busy ? "the ring is in use" : "the ring is closed");
        return 0;
    }
    return 1;
}

static void forget_batch(Ring *ring) {
    if (ring->memory.obj != NULL) {
        PyBuffer_Release(&ring->memory);
    }
    if (ring->errors.obj != NULL) {
        PyBuffer_Release(&ring->errors);
    }
    PyMem_Free(ring->items);
    PyMem_Free(ring->ended);
    ring->items = NULL;
    ring->ended = NULL;
    ring->count = ring->next = ring->pending = ring->ended_count = 0;
}

static void shut(Ring *ring) {
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
    forget_batch(ring);
    if (ring->registered.obj != NULL) {
        PyBuffer_Release(&ring->registered);
    }
    PyMem_Free(ring->slots);
    PyMem_Free(ring->idle);
    PyMem_Free(ring->again);
    ring->slots = NULL;
    ring->idle = ring->again = NULL;
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

static int set_up(Ring *ring) {
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

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    unsigned depth;
    if (!PyArg_ParseTuple(args, "I:Ring", &depth)) {
        return NULL;
    }
    if (depth < 1 || depth > DEPTH_MAX) {
        return PyErr_Format(PyExc_ValueError, "depth must lie in 1..%d, not %u", DEPTH_MAX, depth);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Ring *ring = (Ring *)allocate(type, 0);
    if (ring == NULL) {
        return NULL;
    }
    ring->fd = -1;
    ring->depth = depth;
    ring->slots = PyMem_Calloc(depth, sizeof *ring->slots);
    ring->idle = PyMem_Calloc(depth, sizeof *ring->idle);
    ring->again = PyMem_Calloc(depth, sizeof *ring->again);
    if (ring->slots == NULL || ring->idle == NULL || ring->again == NULL) {
        Py_DECREF(ring);
        return PyErr_NoMemory();
    }
    for (uint32_t i = 0; i < depth; i++) {
        ring->idle[ring->idle_count++] = depth - 1 - i;
    }
    int error = set_up(ring);
    if (error != 0) {
        Py_DECREF(ring);
        return refused(error);
    }
    return (PyObject *)ring;
}

static void ring_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    shut((Ring *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *ring_close(PyObject *self, PyObject *unused) {
    Ring *ring = (Ring *)self;
    if (ring->busy || ring->flying) {
        PyErr_SetString(PyExc_ValueError, "transfers of the ring are in flight");
        return NULL;
    }
    shut(ring);
    return Py_NewRef(Py_None);
}

static PyObject *ring_register_memory(PyObject *self, PyObject *memory) {
    Ring *ring = (Ring *)self;
    Py_buffer view;
    if (!usable(ring)) {
        return NULL;
    }
    if (ring->registered.obj != NULL || ring->items != NULL) {
        PyErr_SetString(PyExc_ValueError, "the ring has memory, or a batch, already");
        return NULL;
    }
    if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    size_t pieces = ((size_t)view.len + PIECE_BYTES - 1) / PIECE_BYTES;
    struct iovec *parts = pieces && pieces <= PIECES_MAX ? PyMem_Calloc(pieces, sizeof *parts) : NULL;
    if (parts == NULL) {
        PyBuffer_Release(&view);
        return refused(pieces ? ENOMEM : EINVAL);
    }
    for (size_t i = 0; i < pieces; i++) {
        size_t left = (size_t)view.len - i * PIECE_BYTES;
        parts[i].iov_base = (char *)view.buf + i * PIECE_BYTES;
        parts[i].iov_len = left < PIECE_BYTES ? left : PIECE_BYTES;
    }
    int error = 0;
    ring->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    if (ring_register(ring->fd, IORING_REGISTER_BUFFERS, parts, (unsigned)pieces) < 0) {
        error = errno;
    }
    Py_END_ALLOW_THREADS
    ring->busy = 0;
    PyMem_Free(parts);
    if (error != 0) {
        PyBuffer_Release(&view);
        return refused(error);
    }
    ring->registered = view;
    return Py_NewRef(Py_None);
}

/* The packed arrays of a batch, while they are read. */
typedef struct {
    Py_buffer fds, offsets, at, nbytes;
} Arrays;

static int get_array(PyObject *object, Py_buffer *view, size_t size) {
    if (PyObject_GetBuffer(object, view, PyBUF_SIMPLE) < 0) {
        return 0;
    }
    if ((uintptr_t)view->buf % size || (size_t)view->len % size) {
        PyErr_SetString(PyExc_ValueError, "the arrays must be aligned int32 or int64");
        return 0;
    }
    return 1;
}

static int take_items(Ring *ring, const Arrays *arrays, size_t count) {
    const int32_t *fds = arrays->fds.buf;
    const int64_t *offsets = arrays->offsets.buf, *at = arrays->at.buf, *nbytes = arrays->nbytes.buf;
    int64_t size = ring->memory.len;
    for (size_t i = 0; i < count; i++) {
        if (fds[i] < 0 || offsets[i] < 0 || nbytes[i] < 1 || nbytes[i] > ITEM_BYTES_MAX ||
            nbytes[i] > size || at[i] < 0 || at[i] > size - nbytes[i] ||
            offsets[i] > INT64_MAX - nbytes[i]) {
            PyErr_Format(
                PyExc_ValueError, "transfer %zu: %lld bytes at %lld of file %d, in memory at %lld of %lld",
                i, (long long)nbytes[i], (long long)offsets[i], (int)fds[i], (long long)at[i],
                (long long)size);
            return 0;
        }
        ring->items[i] = (Item){
            .offset = offsets[i], .at = at[i], .nbytes = (uint32_t)nbytes[i], .fd = fds[i]};
        ((int32_t *)ring->errors.buf)[i] = UNDER_WAY;
    }
    return 1;
}

static int start_batch(Ring *ring, const Arrays *arrays, PyObject *memory, PyObject *errors) {
    size_t count = (size_t)arrays->fds.len / sizeof(int32_t);
    if (PyObject_GetBuffer(memory, &ring->memory, ring->writing ? PyBUF_SIMPLE : PyBUF_WRITABLE) < 0 ||
        PyObject_GetBuffer(errors, &ring->errors, PyBUF_WRITABLE) < 0) {
        return 0;
    }
    size_t wide = count * sizeof(int64_t);
    if (count < 1 || count > ITEMS_MAX || (size_t)arrays->offsets.len != wide ||
        (size_t)arrays->at.len != wide || (size_t)arrays->nbytes.len != wide ||
        (size_t)ring->errors.len != count * sizeof(int32_t) || (uintptr_t)ring->errors.buf % 4) {
        PyErr_Format(PyExc_ValueError, "a batch needs 1..%d transfers and as many errors", ITEMS_MAX);
        return 0;
    }
    ring->items = PyMem_Calloc(count, sizeof *ring->items);
    ring->ended = PyMem_Calloc(count, sizeof *ring->ended);
    if (ring->items == NULL || ring->ended == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    if (!take_items(ring, arrays, count)) {
        return 0;
    }
    ring->fixed = ring->registered.obj != NULL && ring->registered.buf == ring->memory.buf &&
                  ring->memory.len <= ring->registered.len;
    ring->cancelled = 0;
    ring->left_bytes = ring->flying_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        ring->left_bytes += ring->items[i].nbytes;
    }
    ring->count = ring->pending = (uint32_t)count;
    return 1;
}

static PyObject *ring_start(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    PyObject *fds, *offsets, *at, *nbytes, *memory, *errors;
    Arrays arrays = {0};
    int writing, paced, started = 0;
    unsigned most;
    if (!PyArg_ParseTuple(
            args, "pOOOOOOIp:start", &writing, &fds, &offsets, &memory, &at, &nbytes, &errors,
            &most, &paced) ||
        !usable(ring)) {
        return NULL;
    }
    if (ring->items != NULL) {
        PyErr_SetString(PyExc_ValueError, "the ring has a batch that has not ended");
        return NULL;
    }
    ring->writing = writing;
    ring->paced = paced;
    ring->most = most && most < ring->depth ? most : ring->depth;
    if (get_array(fds, &arrays.fds, 4) && get_array(offsets, &arrays.offsets, 8) &&
        get_array(at, &arrays.at, 8) && get_array(nbytes, &arrays.nbytes, 8)) {
        started = start_batch(ring, &arrays, memory, errors);
    }
    Py_buffer *held[] = {&arrays.fds, &arrays.offsets, &arrays.at, &arrays.nbytes};
    for (int i = 0; i < 4; i++) {
        if (held[i]->obj != NULL) {
            PyBuffer_Release(held[i]);
        }
    }
    if (!started) {
        forget_batch(ring);
        return NULL;
    }
    int error = 0;
    ring->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    error = pump(ring, 0, 0);
    Py_END_ALLOW_THREADS
    ring->busy = 0;
    return error && error != EINTR ? refused(error) : Py_NewRef(Py_None);
}

/* Write the items that have ended to `told` and forget them. */
static PyObject *tell(Ring *ring, Py_buffer *told) {
    uint32_t count = ring->ended_count, most = (uint32_t)((size_t)told->len / sizeof(int32_t));
    if (count > most) {
        count = most;
    }
    memcpy(told->buf, ring->ended, count * sizeof(int32_t));
    memmove(ring->ended, ring->ended + count, (ring->ended_count - count) * sizeof(int32_t));
    ring->ended_count -= count;
    if (ring->pending == 0 && ring->ended_count == 0) {
        forget_batch(ring);
    }
    return PyLong_FromUnsignedLong(count);
}

static PyObject *ring_wait(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    PyObject *into, *answer = NULL;
    Py_buffer told;
    unsigned least;
    double timeout_s;
    if (!PyArg_ParseTuple(args, "OId:wait", &into, &least, &timeout_s) || !usable(ring)) {
        return NULL;
    }
    if (!(timeout_s >= 0 && timeout_s <= 1e6)) {
        PyErr_SetString(PyExc_ValueError, "timeout_s must lie in 0..1e6");
        return NULL;
    }
    if (PyObject_GetBuffer(into, &told, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    if (told.len < 4 || told.len % 4 || (uintptr_t)told.buf % 4) {
        PyErr_SetString(PyExc_ValueError, "an aligned int32 array is needed");
    } else {
        int error = 0;
        int64_t deadline_ns = now_ns() + (int64_t)(timeout_s * 1e9);
        do {
            ring->busy = 1;
            Py_BEGIN_ALLOW_THREADS
            error = pump(ring, least, deadline_ns);
            Py_END_ALLOW_THREADS
            ring->busy = 0;
        } while (error == EINTR && PyErr_CheckSignals() == 0);
        if (error == 0) {
            answer = tell(ring, &told);
        } else if (error != EINTR) {
            refused(error);
        }
    }
    PyBuffer_Release(&told);
    return answer;
}

/* Start what there is room for, without a look at who waits for it. Nothing if the ring is busy. */
static PyObject *ring_nudge(PyObject *self, PyObject *unused) {
    Ring *ring = (Ring *)self;
    if (ring->fd >= 0 && !ring->busy && ring->pending > ring->flying) {
        /* With the lock of the interpreter: this does not wait, and nobody else may come between. */
        pump(ring, 0, 0);
    }
    return Py_NewRef(Py_None);
}

static PyObject *ring_cancel(PyObject *self, PyObject *unused) {
    Ring *ring = (Ring *)self;
    unsigned index;
    if (!usable(ring)) {
        return NULL;
    }
    /* What has not been submitted ends here; the kernel is asked to end the rest. */
    while (ring->again_count) {
        end_slot(ring, ring->again[--ring->again_count], ECANCELED);
    }
    Slot rest = {.item = ring->next, .end = ring->count};
    while (rest.item < rest.end) {
        end_item(ring, &rest, ECANCELED);
    }
    ring->next = ring->count;
    ring->cancelled = 1;
    if (ring->flying && ring->unsubmitted <= ring->sq_mask) {
        struct io_uring_sqe *entry = next_entry(ring, &index);
        entry->opcode = IORING_OP_ASYNC_CANCEL;
        entry->fd = -1;
        entry->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
        entry->user_data = CANCEL_DATA;
        push_entry(ring, index);
    }
    return Py_NewRef(Py_None);
}

static PyObject *ring_pending(PyObject *self, void *unused) {
    return PyLong_FromUnsignedLong(((Ring *)self)->pending + ((Ring *)self)->ended_count);
}

static PyMethodDef ring_methods[] = {
    {"start", ring_start, METH_VARARGS,
     "start(writing, fds, offsets, memory, at, nbytes, errors, most, paced): begin a batch."},
    {"wait", ring_wait, METH_VARARGS,
     "wait(told, least, timeout_s): how many items that have ended were written to told."},
    {"nudge", ring_nudge, METH_NOARGS, "Reap and submit, if nobody else does; never waits."},
    {"cancel", ring_cancel, METH_NOARGS, "End what is pending soon; go on waiting."},
    {"register", ring_register_memory, METH_O, "Pin memory for all batches in it."},
    {"close", ring_close, METH_NOARGS, "Give everything back; nothing may be in flight."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ring_values[] = {
    {"pending", ring_pending, NULL, "Items that have not ended, or were not told.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Ring(depth): an io_uring for one batch of transfers at a time."},
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_values},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    "dualpath.kvstore._native.Ring", sizeof(Ring), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, ring_slots};

int dualpath_add_ring(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &ring_spec, NULL);
    int result = type == NULL ? -1 : PyModule_AddObjectRef(module, "Ring", type);
    Py_XDECREF(type);
    return result;
}
