/* The checksums of many extents of one memory with one call: kvstore/checksum.py. */
#include "parts.h"
#include "xxh3.h"

static int aligned_words(const Py_buffer *view, Py_ssize_t len) {
    return view->len == len && (uintptr_t)view->buf % 8 == 0;
}

typedef struct {
    int64_t start, nbytes;
} Extent;

/* The extents, checked, in memory that nobody else can change; NULL with an exception set. */
static Extent *taken(const Py_buffer *memory, const Py_buffer *at, const Py_buffer *nbytes) {
    size_t count = (size_t)at->len / 8;
    const int64_t *starts = at->buf, *sizes = nbytes->buf;
    Extent *extents = PyMem_Calloc(count + 1, sizeof *extents);
    if (extents == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        if (sizes[i] < XXH3_LONG_BYTES_MIN || sizes[i] > memory->len || starts[i] < 0 ||
            starts[i] > memory->len - sizes[i]) {
            PyErr_Format(
                PyExc_ValueError, "extent %zu: %lld bytes at %lld of %zd, each at least %d", i,
                (long long)sizes[i], (long long)starts[i], memory->len, XXH3_LONG_BYTES_MIN);
            PyMem_Free(extents);
            return NULL;
        }
        extents[i] = (Extent){starts[i], sizes[i]};
    }
    return extents;
}

static int hash_all(
    const Py_buffer *memory, const Py_buffer *at, const Py_buffer *nbytes, Py_buffer *sums) {
    if (at->len % 8 || !aligned_words(at, at->len) || !aligned_words(nbytes, at->len) ||
        !aligned_words(sums, at->len)) {
        PyErr_SetString(PyExc_ValueError, "as many aligned int64 offsets, sizes and sums are needed");
        return 0;
    }
    Extent *extents = taken(memory, at, nbytes);
    if (extents == NULL) {
        return 0;
    }
    size_t count = (size_t)at->len / 8;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < count; i++) {
        const char *start = (const char *)memory->buf + extents[i].start;
        ((uint64_t *)sums->buf)[i] = dualpath_hash(start, (size_t)extents[i].nbytes);
    }
    Py_END_ALLOW_THREADS
    PyMem_Free(extents);
    return 1;
}

static PyObject *hash_extents(PyObject *module, PyObject *args) {
    PyObject *objects[4];
    Py_buffer views[4] = {{0}};
    int done = 0, held = 0;
    if (!PyArg_ParseTuple(
            args, "OOOO:hash_extents", &objects[0], &objects[1], &objects[2], &objects[3])) {
        return NULL;
    }
    for (; held < 4; held++) {
        int flags = held == 3 ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(objects[held], &views[held], flags) < 0) {
            break;
        }
    }
    if (held == 4) {
        done = hash_all(&views[0], &views[1], &views[2], &views[3]);
    }
    while (held > 0) {
        PyBuffer_Release(&views[--held]);
    }
    return done ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"hash_extents", hash_extents, METH_VARARGS,
     "hash_extents(memory, at, nbytes, sums): xxh3-64 of extents of memory, written to sums."},
    {NULL, NULL, 0, NULL},
};

int dualpath_add_checksum(PyObject *module) { return PyModule_AddFunctions(module, methods); }
