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
    Py_buffer places[2];
    const uint64_t *bases, *skips;
} Side;

typedef struct {
    Side target, source;
    Py_buffer interrupt, numbers;
    const uint64_t *sizes;
    uint64_t *digests;
    Py_ssize_t parts, done;
    int hashed;
} Job;

/* Where a part goes on. */
typedef struct {
    size_t at, inside;
} Cursor;

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

static int in_bounds(const Side *side, const uint64_t *sizes, Py_ssize_t parts, const char *what) {
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

static int filled(Job *job) {
    job->parts = job->numbers.len / (Py_ssize_t)sizeof(uint64_t);
    if (job->parts < 1 || job->parts > PARTS_MAX) {
        PyErr_Format(PyExc_ValueError, "1 to %d parts at once, not %zd", PARTS_MAX, job->parts);
        return 0;
    }
    Side *sides[2] = {&job->target, &job->source};
    int right = dualpath_numbers(&job->numbers, job->parts);
    for (int i = 0; i < 2; i++) {
        right = right && dualpath_numbers(&sides[i]->places[0], job->parts) &&
                dualpath_numbers(&sides[i]->places[1], job->parts);
        sides[i]->bases = sides[i]->places[0].buf;
        sides[i]->skips = sides[i]->places[1].buf;
    }
    if (!right) {
        return 0;
    }
    job->sizes = job->numbers.buf;
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
    Side *to = &job.target, *from = &job.source;
    PyObject *answer = NULL;
    Py_ssize_t strides[2], lengths[2];
    if (!PyArg_ParseTuple(
            args, "y*w*(nny*y*)y*(nny*y*)y*p:copy_parts", &job.numbers, &to->memory, &strides[0],
            &lengths[0], &to->places[0], &to->places[1], &from->memory, &strides[1], &lengths[1],
            &from->places[0], &from->places[1], &job.interrupt, &job.hashed)) {
        return NULL;
    }
    if (lengths[0] < 1 || lengths[1] < 1 || strides[0] < lengths[0] || strides[1] < lengths[1]) {
        PyErr_SetString(PyExc_ValueError, "the slices of a table are empty or overlap");
    } else {
        to->stride = (size_t)strides[0];
        to->length = (size_t)lengths[0];
        from->stride = (size_t)strides[1];
        from->length = (size_t)lengths[1];
        if (filled(&job)) {
            Py_BEGIN_ALLOW_THREADS
            copy_all(&job);
            Py_END_ALLOW_THREADS
            answer = answer_of(&job);
        }
    }
    PyMem_Free(job.digests);
    Py_buffer *held[8] = {&job.numbers,      &to->memory,       &to->places[0],   &to->places[1],
                          &from->memory, &from->places[0], &from->places[1], &job.interrupt};
    for (int i = 0; i < 8; i++) {
        PyBuffer_Release(held[i]);
    }
    return answer;
}
