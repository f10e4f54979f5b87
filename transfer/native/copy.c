/* Parts of a table copied from one memory to another with one call, hashed on the way if asked:
 * transfer/dualpath/transfer/table_copy.py. Python twin: table_copy_twin.py. */
#include "parts.h"

#include "../../kvstore/native/xxh3.h"

#define PARTS_MAX 1024
#define STRIPE_BYTES 64
/* The caller's interrupt is looked at so often. */
#define STEP_BYTES (256 << 10)
/* A copy of less is read soon by whoever asked for it: it should stay in the caches. */
#define STREAM_BYTES_MIN (256 << 10)

typedef struct {
    Py_buffer memory;
    size_t stride, length; /* equal: one piece a part */
    size_t *bases, *skips;
} Side;

typedef struct {
    Side target, source;
    Py_buffer interrupt;
    size_t *sizes;
    uint64_t *digests;
    Py_ssize_t parts, done;
    int hashed;
} Job;

/* Where a part goes on. */
typedef struct {
    size_t at, inside;
} Cursor;

static size_t *numbers(PyObject *sequence, Py_ssize_t count) {
    if (PySequence_Size(sequence) != count) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "bases, skips and sizes must be as many");
        }
        return NULL;
    }
    size_t *found = PyMem_Calloc((size_t)count, sizeof *found);
    if (found == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        Py_ssize_t value = item == NULL ? -1 : PyLong_AsSsize_t(item);
        Py_XDECREF(item);
        if (value < 0) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_ValueError, "part %zd has a negative place or size", i);
            }
            PyMem_Free(found);
            return NULL;
        }
        found[i] = (size_t)value;
    }
    return found;
}

/* Offset of byte `skip` of the part's own bytes in the memory; SIZE_MAX if it overflows. */
static size_t offset_of(const Side *side, size_t base, size_t skip) {
    size_t at;
    if (side->stride == side->length) {
        return __builtin_add_overflow(base, skip, &at) ? SIZE_MAX : at;
    }
    if (__builtin_mul_overflow(skip / side->length, side->stride, &at) ||
        __builtin_add_overflow(at, skip % side->length, &at) ||
        __builtin_add_overflow(at, base, &at)) {
        return SIZE_MAX;
    }
    return at;
}

static int in_bounds(const Side *side, const size_t *sizes, Py_ssize_t parts, const char *what) {
    if (side->length < 1 || side->stride < side->length) {
        PyErr_Format(PyExc_ValueError, "the slices of the %s are empty or overlap", what);
        return 0;
    }
    for (Py_ssize_t i = 0; i < parts; i++) {
        size_t last;
        if (sizes[i] < 1 || __builtin_add_overflow(side->skips[i], sizes[i] - 1, &last) ||
            offset_of(side, side->bases[i], last) >= (size_t)side->memory.len) {
            PyErr_Format(
                PyExc_ValueError, "part %zd is empty or leaves the %s of %zd bytes", i, what,
                side->memory.len);
            return 0;
        }
    }
    return 1;
}

static Cursor begin(const Side *side, Py_ssize_t part) {
    size_t skip = side->skips[part];
    return (Cursor){
        offset_of(side, side->bases[part], skip),
        side->stride == side->length ? 0 : skip % side->length,
    };
}

/* Bytes in one piece from the cursor on, at most `most`. */
static size_t adjoining(const Side *side, const Cursor *cursor, size_t most) {
    size_t left = side->stride == side->length ? most : side->length - cursor->inside;
    return left < most ? left : most;
}

static void advance(const Side *side, Cursor *cursor, size_t nbytes) {
    cursor->at += nbytes;
    if (side->stride != side->length) {
        cursor->inside += nbytes;
        if (cursor->inside == side->length) {
            cursor->inside = 0;
            cursor->at += side->stride - side->length;
        }
    }
}

/* Return whether the part is whole: 0 after an interrupt. */
static int copy_part(Job *job, Py_ssize_t part, int stream) {
    const Side *to = &job->target, *from = &job->source;
    Cursor there = begin(to, part), here = begin(from, part);
    size_t left = job->sizes[part];
    int hash = job->hashed && left >= XXH3_LONG_BYTES_MIN;
    uint64_t digest = 0;
    DualpathCopyHash state;
    dualpath_copy_hash_begin(&state);
    while (left > 0) {
        if (__atomic_load_n((const char *)job->interrupt.buf, __ATOMIC_ACQUIRE)) {
            return 0;
        }
        size_t most = left <= STEP_BYTES ? left : STEP_BYTES;
        if (left - most > 0 && left - most < STRIPE_BYTES) {
            most -= STRIPE_BYTES; /* the last piece has at least a stripe */
        }
        size_t nbytes = adjoining(to, &there, adjoining(from, &here, most));
        char *target = (char *)to->memory.buf + there.at;
        const char *source = (const char *)from->memory.buf + here.at;
        int last = nbytes == left;
        hash = hash && (last ? nbytes >= STRIPE_BYTES : nbytes % STRIPE_BYTES == 0);
        if (!hash) {
            dualpath_copy(target, source, nbytes, stream && (uintptr_t)target % 32 == 0);
        } else if (last) {
            digest = dualpath_copy_hash_end(&state, target, source, nbytes, stream);
        } else {
            dualpath_copy_hash_piece(&state, target, source, nbytes, stream);
        }
        left -= nbytes;
        advance(to, &there, nbytes);
        advance(from, &here, nbytes);
    }
    job->digests[part] = hash ? digest : 0;
    return 1;
}

static void copy_all(Job *job) {
    size_t total = 0;
    for (Py_ssize_t i = 0; i < job->parts; i++) {
        total += job->sizes[i];
    }
    int stream = total >= STREAM_BYTES_MIN;
    while (job->done < job->parts && copy_part(job, job->done, stream)) {
        job->done++;
    }
    dualpath_copy_fence();
}

static PyObject *answer_of(const Job *job) {
    PyObject *digests = PyList_New(job->done);
    for (Py_ssize_t i = 0; digests != NULL && i < job->done; i++) {
        PyObject *digest = PyLong_FromUnsignedLongLong(job->digests[i]);
        if (digest == NULL || PyList_SetItem(digests, i, digest) < 0) {
            Py_CLEAR(digests);
        }
    }
    return digests;
}

static int filled(Job *job, PyObject *lists[5]) {
    job->parts = PySequence_Size(lists[0]);
    if (job->parts < 1 || job->parts > PARTS_MAX) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "1 to %d parts at once, not %zd", PARTS_MAX, job->parts);
        }
        return 0;
    }
    size_t **into[5] = {
        &job->sizes, &job->target.bases, &job->target.skips, &job->source.bases, &job->source.skips};
    for (int i = 0; i < 5; i++) {
        *into[i] = numbers(lists[i], job->parts);
        if (*into[i] == NULL) {
            return 0;
        }
    }
    job->digests = PyMem_Calloc((size_t)job->parts, sizeof(uint64_t));
    if (job->digests == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    if (job->interrupt.len < 1) {
        PyErr_SetString(PyExc_ValueError, "no interrupt");
        return 0;
    }
    return in_bounds(&job->target, job->sizes, job->parts, "target") &&
           in_bounds(&job->source, job->sizes, job->parts, "source");
}

PyObject *dualpath_copy_parts(PyObject *module, PyObject *args) {
    Job job = {0};
    PyObject *lists[5], *answer = NULL;
    Py_ssize_t strides[2], lengths[2];
    if (!PyArg_ParseTuple(
            args, "Ow*(nnOO)y*(nnOO)y*p:copy_parts", &lists[0], &job.target.memory, &strides[0],
            &lengths[0], &lists[1], &lists[2], &job.source.memory, &strides[1], &lengths[1], &lists[3],
            &lists[4], &job.interrupt, &job.hashed)) {
        return NULL;
    }
    if (lengths[0] < 1 || lengths[1] < 1 || strides[0] < lengths[0] || strides[1] < lengths[1]) {
        PyErr_SetString(PyExc_ValueError, "the slices of a table are empty or overlap");
    } else {
        job.target.stride = (size_t)strides[0];
        job.target.length = (size_t)lengths[0];
        job.source.stride = (size_t)strides[1];
        job.source.length = (size_t)lengths[1];
        if (filled(&job, lists)) {
            Py_BEGIN_ALLOW_THREADS
            copy_all(&job);
            Py_END_ALLOW_THREADS
            answer = answer_of(&job);
        }
    }
    size_t *held[5] = {job.sizes, job.target.bases, job.target.skips, job.source.bases, job.source.skips};
    for (int i = 0; i < 5; i++) {
        PyMem_Free(held[i]);
    }
    PyMem_Free(job.digests);
    PyBuffer_Release(&job.target.memory);
    PyBuffer_Release(&job.source.memory);
    PyBuffer_Release(&job.interrupt);
    return answer;
}
