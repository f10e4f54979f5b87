/* Copies of many blocks with one call, hashed on the way if asked: kvstore/block_copy.py. */
#include "parts.h"
#include "xxh3.h"

/* A copy of less is read soon by whoever asked for it: it should stay in the caches. */
#define STREAM_BYTES_MIN (256 << 10)

typedef struct {
    Py_buffer target, target_at, source, source_at, sums;
} Buffers;

typedef struct {
    char *target;
    const char *source;
    const int64_t *target_at, *source_at;
    uint64_t *sums; /* or NULL */
    size_t blocks, nbytes, chunk_bytes, chunks;
} Job;

static void give_back(Buffers *held) {
    Py_buffer *all[] = {&held->target, &held->target_at, &held->source, &held->source_at, &held->sums};
    for (int i = 0; i < 5; i++) {
        if (all[i]->obj != NULL) {
            PyBuffer_Release(all[i]);
        }
    }
}

static int inside(const int64_t *at, size_t blocks, size_t nbytes, Py_ssize_t size, const char *what) {
    for (size_t i = 0; i < blocks; i++) {
        if (at[i] < 0 || (uint64_t)at[i] > (uint64_t)size || (uint64_t)size - (uint64_t)at[i] < nbytes) {
            PyErr_Format(
                PyExc_ValueError, "block %zu: %zu bytes from %lld leave the %s of %zd bytes", i, nbytes,
                (long long)at[i], what, size);
            return 0;
        }
    }
    return 1;
}

static int described(Job *job, const Buffers *held, Py_ssize_t nbytes, Py_ssize_t chunk_bytes) {
    if (nbytes < 1 || chunk_bytes < 1) {
        PyErr_SetString(PyExc_ValueError, "nbytes and chunk_bytes must be positive");
        return 0;
    }
    if (held->target_at.len != held->source_at.len || held->source_at.len % 8 != 0) {
        PyErr_SetString(PyExc_ValueError, "as many int64 offsets of sources as of targets are needed");
        return 0;
    }
    if ((uintptr_t)held->target_at.buf % 8 || (uintptr_t)held->source_at.buf % 8) {
        PyErr_SetString(PyExc_ValueError, "offsets must be aligned to 8 bytes");
        return 0;
    }
    *job = (Job){
        .target = held->target.buf,
        .source = held->source.buf,
        .target_at = held->target_at.buf,
        .source_at = held->source_at.buf,
        .sums = held->sums.obj != NULL ? held->sums.buf : NULL,
        .blocks = (size_t)held->source_at.len / 8,
        .nbytes = (size_t)nbytes,
        .chunk_bytes = (size_t)chunk_bytes,
        .chunks = ((size_t)nbytes - 1) / (size_t)chunk_bytes + 1,
    };
    if (job->sums != NULL) {
        size_t words = (size_t)held->sums.len / 8;
        if ((uintptr_t)job->sums % 8 || held->sums.len % 8 ||
            (job->blocks != 0 && (words % job->blocks || words / job->blocks != job->chunks))) {
            PyErr_Format(PyExc_ValueError, "checksums need %zu aligned uint64 a block", job->chunks);
            return 0;
        }
    }
    return inside(job->target_at, job->blocks, job->nbytes, held->target.len, "target") &&
           inside(job->source_at, job->blocks, job->nbytes, held->source.len, "source");
}

static void copy_one(const Job *job, size_t block, const char *source, int stream) {
    char *target = job->target + job->target_at[block];
    if (job->sums == NULL) {
        dualpath_copy(target, source, job->nbytes, stream);
        return;
    }
    uint64_t *sums = job->sums + block * job->chunks;
    for (size_t c = 0, at = 0; c < job->chunks; c++, at += job->chunk_bytes) {
        size_t left = job->nbytes - at;
        size_t size = left < job->chunk_bytes ? left : job->chunk_bytes;
        if (size >= XXH3_LONG_BYTES_MIN) {
            sums[c] = dualpath_copy_and_hash(target + at, source + at, size, stream);
        } else {
            dualpath_copy(target + at, source + at, size, 0);
            sums[c] = 0;
        }
    }
}

/* `sources`: where each block comes from, or NULL for `source_at`. */
static void copy_all(const Job *job, const Py_buffer *sources) {
    int stream = job->blocks * job->nbytes >= STREAM_BYTES_MIN;
    for (size_t i = 0; i < job->blocks; i++) {
        copy_one(job, i, sources ? sources[i].buf : job->source + job->source_at[i], stream);
    }
    dualpath_copy_fence();
}

static PyObject *copy_blocks(PyObject *module, PyObject *args) {
    Buffers held = {0};
    PyObject *target, *target_at, *source, *source_at, *sums, *answer = NULL;
    Py_ssize_t nbytes, chunk_bytes;
    Job job;
    if (!PyArg_ParseTuple(
            args, "OOOOnnO:copy_blocks", &target, &target_at, &source, &source_at, &nbytes, &chunk_bytes,
            &sums)) {
        return NULL;
    }
    if (PyObject_GetBuffer(target, &held.target, PyBUF_WRITABLE) == 0 &&
        PyObject_GetBuffer(target_at, &held.target_at, PyBUF_SIMPLE) == 0 &&
        PyObject_GetBuffer(source, &held.source, PyBUF_SIMPLE) == 0 &&
        PyObject_GetBuffer(source_at, &held.source_at, PyBUF_SIMPLE) == 0 &&
        (sums == Py_None || PyObject_GetBuffer(sums, &held.sums, PyBUF_WRITABLE) == 0) &&
        described(&job, &held, nbytes, chunk_bytes)) {
        Py_BEGIN_ALLOW_THREADS
        copy_all(&job, NULL);
        Py_END_ALLOW_THREADS
        answer = Py_NewRef(Py_None);
    }
    give_back(&held);
    return answer;
}

/* The buffers of a tuple, each of `nbytes`; NULL with an exception set. */
static Py_buffer *source_views(PyObject *sources, Py_ssize_t count, Py_ssize_t nbytes) {
    Py_buffer *views = PyMem_Calloc((size_t)count + 1, sizeof *views);
    if (views == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        int held = PyObject_GetBuffer(PyTuple_GetItem(sources, i), &views[i], PyBUF_SIMPLE) == 0;
        if (held && views[i].len == nbytes) {
            continue;
        }
        if (held) {
            PyErr_Format(PyExc_ValueError, "block %zd has %zd bytes, not %zd", i, views[i].len, nbytes);
        }
        for (Py_ssize_t done = 0; done < i + held; done++) {
            PyBuffer_Release(&views[done]);
        }
        PyMem_Free(views);
        return NULL;
    }
    return views;
}

static PyObject *gather_blocks(PyObject *module, PyObject *args) {
    Buffers held = {0};
    PyObject *target, *target_at, *sources, *sums, *answer = NULL;
    Py_ssize_t nbytes, chunk_bytes;
    Py_buffer *views = NULL;
    Job job;
    if (!PyArg_ParseTuple(
            args, "OOOnnO:gather_blocks", &target, &target_at, &sources, &nbytes, &chunk_bytes, &sums)) {
        return NULL;
    }
    if (!PyTuple_Check(sources)) {
        PyErr_SetString(PyExc_TypeError, "the sources must be a tuple");
        return NULL;
    }
    Py_ssize_t count = PyTuple_Size(sources);
    /* What describes the sources of `copy_blocks` describes targets here: they are checked twice. */
    if (PyObject_GetBuffer(target, &held.target, PyBUF_WRITABLE) == 0 &&
        PyObject_GetBuffer(target_at, &held.target_at, PyBUF_SIMPLE) == 0 &&
        PyObject_GetBuffer(target, &held.source, PyBUF_SIMPLE) == 0 &&
        PyObject_GetBuffer(target_at, &held.source_at, PyBUF_SIMPLE) == 0 &&
        (sums == Py_None || PyObject_GetBuffer(sums, &held.sums, PyBUF_WRITABLE) == 0) &&
        described(&job, &held, nbytes, chunk_bytes)) {
        if ((size_t)count != job.blocks) {
            PyErr_Format(PyExc_ValueError, "%zd sources for %zu targets", count, job.blocks);
        } else if ((views = source_views(sources, count, nbytes)) != NULL) {
            Py_BEGIN_ALLOW_THREADS
            copy_all(&job, views);
            Py_END_ALLOW_THREADS
            answer = Py_NewRef(Py_None);
        }
    }
    while (views != NULL && count > 0) {
        PyBuffer_Release(&views[--count]);
    }
    PyMem_Free(views);
    give_back(&held);
    return answer;
}

static PyMethodDef methods[] = {
    {"copy_blocks", copy_blocks, METH_VARARGS,
     "copy_blocks(target, target_at, source, source_at, nbytes, chunk_bytes, checksums)"},
    {"gather_blocks", gather_blocks, METH_VARARGS,
     "gather_blocks(target, target_at, sources, nbytes, chunk_bytes, checksums)"},
    {NULL, NULL, 0, NULL},
};

int dualpath_add_block_copy(PyObject *module) {
    if (PyModule_AddIntConstant(module, "HASHED_BYTES_MIN", XXH3_LONG_BYTES_MIN) < 0) {
        return -1;
    }
    return PyModule_AddFunctions(module, methods);
}
