/* The batch that moves through a ring: which transfers are in flight, and what becomes of each item.
 *
 * Reads that follow each other in the file and in memory move as one, up to RUN_BYTES_MAX: half the
 * price for small ones. If that fails, they are tried one by one, so that each has its own error.
 *
 * Towards its end a batch that is `paced` has only three quarters of what is left in flight: some
 * devices, those of many virtual machines among them, tell of nothing until they have done all that
 * they were given, and a caller with work on each item would begin it when the last one is there. Who
 * has none is woken less often without. */
#include "ring.h"

#include <errno.h>
#include <time.h>

#define ALIGN_BYTES 4096
#define RUN_BYTES_MAX (1 << 20)
#define FLYING_BYTES_LEAST (12 << 20) /* to hold back less costs a busy device more than it gains */
#define STALLS_MAX 16 /* completions in a row of one transfer that may move nothing */
#define PAUSE_NS 1000000
#define CANCEL_DATA UINT64_MAX

/* Bytes that a slot still has to move in its next transfer. */
static uint32_t slot_bytes(const Ring *ring, const Slot *slot) {
    const Item *first = &ring->items[slot->item];
    const Item *last = slot->alone ? first : &ring->items[slot->end - 1];
    return (uint32_t)(last->at + last->nbytes - first->at) - slot->done;
}

static void push_transfer(Ring *ring, uint32_t number) {
    unsigned index;
    struct io_uring_sqe *entry = dualpath_queue_entry(ring, &index);
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
    dualpath_queue_push(ring, index);
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

int64_t dualpath_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The kernel could not take an entry: let something end, or memory come free, first. */
static int make_room(Ring *ring, int64_t deadline_ns) {
    int64_t left_ns = deadline_ns - dualpath_now_ns();
    if (left_ns <= 0) {
        return 0;
    }
    if (ring->flying > ring->unsubmitted) {
        uint32_t unsubmitted = ring->unsubmitted;
        ring->unsubmitted = 0;
        dualpath_queue_enter(ring, 1, left_ns);
        ring->unsubmitted = unsubmitted;
    } else {
        struct timespec pause = {.tv_nsec = left_ns < PAUSE_NS ? left_ns : PAUSE_NS};
        nanosleep(&pause, NULL);
    }
    return 1;
}

int dualpath_batch_pump(Ring *ring, uint32_t least, int64_t deadline_ns) {
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
        int64_t left_ns = deadline_ns - dualpath_now_ns();
        int error = dualpath_queue_enter(ring, missing, left_ns > 0 ? left_ns : 0);
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

void dualpath_batch_cancel(Ring *ring) {
    unsigned index;
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
        struct io_uring_sqe *entry = dualpath_queue_entry(ring, &index);
        entry->opcode = IORING_OP_ASYNC_CANCEL;
        entry->fd = -1;
        entry->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
        entry->user_data = CANCEL_DATA;
        dualpath_queue_push(ring, index);
    }
}
