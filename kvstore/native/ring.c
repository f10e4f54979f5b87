/* The Python type `Ring`, an io_uring of one batch at a time: kvstore/dualpath/kvstore/ring_device.py.
 *
 * A batch is n transfers between files and one memory, given as packed arrays, which are copied.
 * `wait` keeps up to `depth` of them in flight, goes on after short transfers and interruptions, and
 * returns which have ended. The kernel owns the memory of a transfer until its completion was
 * reaped; the ring holds on to the memory until none is left. No callbacks. */
#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#define DEPTH_MAX 1024
#define ITEMS_MAX (1 << 20)
#define ITEM_BYTES_MAX (1 << 30)
#define PIECES_MAX 16384
#define UNDER_WAY (-1)

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
    dualpath_queue_close(ring);
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
    int error = dualpath_queue_open(ring);
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
    error = dualpath_queue_register(ring, parts, (unsigned)pieces);
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
    error = dualpath_batch_pump(ring, 0, 0);
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
        int64_t deadline_ns = dualpath_now_ns() + (int64_t)(timeout_s * 1e9);
        do {
            ring->busy = 1;
            Py_BEGIN_ALLOW_THREADS
            error = dualpath_batch_pump(ring, least, deadline_ns);
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
        dualpath_batch_pump(ring, 0, 0);
    }
    return Py_NewRef(Py_None);
}

static PyObject *ring_cancel(PyObject *self, PyObject *unused) {
    Ring *ring = (Ring *)self;
    if (!usable(ring)) {
        return NULL;
    }
    dualpath_batch_cancel(ring);
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
