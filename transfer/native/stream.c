/* dualpath.transfer._native: bytes in and out of stream sockets, without the GIL.
 *
 * Both calls move as much as they were asked for in one go: they wait for the socket themselves,
 * for a bounded time, and stop early when the caller's interrupt byte is set. Received parts are
 * hashed as they become complete, while they are in the caches. Python twins:
 * transfer/stream_io_twin.py. */
#define _GNU_SOURCE
#include "parts.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "../../kvstore/native/xxh3.h"

#define PARTS_MAX 1024
#define VECTORS_MAX 64 /* of one call */
/* Most bytes of one receive: few enough that they are hashed from the caches. */
#define STEP_BYTES (256 << 10)
/* A receiver that waits is woken when so many bytes have come, or all that it still wants. */
#define WAKE_BYTES (128 << 10)
/* How long it looks for them before it sleeps: about what going to sleep and waking up costs. */
#define SPIN_NS 50000

typedef struct {
    Py_buffer *views;
    Py_ssize_t count;
    size_t total;
} Parts;

static void give_back(Parts *parts) {
    for (Py_ssize_t i = 0; i < parts->count; i++) {
        PyBuffer_Release(&parts->views[i]);
    }
    PyMem_Free(parts->views);
    parts->views = NULL;
    parts->count = 0;
}

/* The buffers of a sequence. Return 0, or -1 with an exception set and nothing held. */
static int take(Parts *parts, PyObject *sequence, int flags) {
    Py_ssize_t count = PySequence_Size(sequence);
    *parts = (Parts){NULL, 0, 0};
    if (count < 0) {
        return -1;
    }
    if (count < 1 || count > PARTS_MAX) {
        PyErr_Format(PyExc_ValueError, "1 to %d buffers at once, not %zd", PARTS_MAX, count);
        return -1;
    }
    parts->views = PyMem_Calloc((size_t)count, sizeof(Py_buffer));
    if (parts->views == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    while (parts->count < count) {
        PyObject *item = PySequence_GetItem(sequence, parts->count);
        int failed = item == NULL || PyObject_GetBuffer(item, &parts->views[parts->count], flags) < 0;
        Py_XDECREF(item);
        if (failed) {
            give_back(parts);
            return -1;
        }
        parts->total += (size_t)parts->views[parts->count++].len;
    }
    return 0;
}

static int interrupted(const char *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) != 0; }

/* Wait for the socket. Return 1 if it is ready, 0 if the time is over, -1 with errno. */
static int await_socket(int fd, short events, int wait_ms) {
    struct pollfd entry = {fd, events, 0};
    int ready = poll(&entry, 1, wait_ms);
    return ready < 0 && errno == EINTR ? 1 : ready;
}

typedef struct {
    Parts parts;
    Py_buffer behind, interrupt;
    uint64_t *digests;
    size_t nbytes, received, behind_received;
    Py_ssize_t part; /* the first that is not complete */
    size_t inside;   /* its bytes that are in place */
    int hashed, ended, error;
    int lowat;   /* what the socket wakes for, 0: not set by us */
    int patient; /* whether to sleep at once where nothing is there */
} Receipt;

static void wake_for(Receipt *job, int fd, int least) {
    if (job->lowat != least) {
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof least);
        job->lowat = least;
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Wait until enough is there to be worth a receive. Where bytes come as fast as they are taken the
 * next ones are there before a sleep would have begun: look for them a moment, unless that was in
 * vain before in this call. */
static int await_bytes(Receipt *job, int fd, int wait_ms) {
    size_t wanted = job->nbytes - job->received;
    wake_for(job, fd, wanted < WAKE_BYTES ? (int)wanted : WAKE_BYTES);
    if (!job->patient) {
        int64_t until = now_ns() + SPIN_NS;
        do {
            int ready = await_socket(fd, POLLIN, 0);
            if (ready != 0 || interrupted(job->interrupt.buf)) {
                return ready ? ready : 1;
            }
            sched_yield();
        } while (now_ns() < until);
        job->patient = 1;
    }
    return await_socket(fd, POLLIN, wait_ms);
}

static int vectors(const Receipt *job, struct iovec *iov) {
    size_t left = job->nbytes - job->received, room = left < STEP_BYTES ? left : STEP_BYTES;
    int all = room == left, count = 0;
    size_t inside = job->inside;
    for (Py_ssize_t i = job->part; room > 0; i++, inside = 0) {
        if (count == VECTORS_MAX - 1) {
            all = 0;
            break;
        }
        size_t size = (size_t)job->parts.views[i].len - inside;
        size = size < room ? size : room;
        iov[count++] = (struct iovec){(char *)job->parts.views[i].buf + inside, size};
        room -= size;
    }
    if (all && job->behind.len > 0) {
        iov[count++] = (struct iovec){job->behind.buf, (size_t)job->behind.len};
    }
    return count;
}

static void place(Receipt *job, size_t got) {
    size_t left = job->nbytes - job->received, payload = got < left ? got : left;
    job->behind_received = got - payload;
    job->received += payload;
    while (payload > 0) {
        const Py_buffer *view = &job->parts.views[job->part];
        size_t size = (size_t)view->len, lacks = size - job->inside;
        if (payload < lacks) {
            job->inside += payload;
            return;
        }
        payload -= lacks;
        job->inside = 0;
        if (job->hashed) {
            job->digests[job->part] =
                size < XXH3_LONG_BYTES_MIN ? 0 : dualpath_hash(view->buf, size);
        }
        job->part++;
    }
}

static void receive_all(Receipt *job, int fd, int wait_ms) {
    struct iovec iov[VECTORS_MAX];
    while (job->received < job->nbytes && !interrupted(job->interrupt.buf)) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)vectors(job, iov)};
        ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
        if (got > 0) {
            place(job, (size_t)got);
        } else if (got == 0) {
            job->ended = 1;
            return;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            int ready = wait_ms ? await_bytes(job, fd, wait_ms) : 0;
            if (ready < 0) {
                job->error = errno;
            }
            if (ready <= 0) {
                return;
            }
        } else if (errno != EINTR) {
            job->error = errno;
            return;
        }
    }
}

static PyObject *receipt(const Receipt *job) {
    PyObject *digests = PyList_New(job->hashed ? job->part : 0);
    for (Py_ssize_t i = 0; digests != NULL && job->hashed && i < job->part; i++) {
        PyObject *digest = PyLong_FromUnsignedLongLong(job->digests[i]);
        if (digest == NULL || PyList_SetItem(digests, i, digest) < 0) {
            Py_CLEAR(digests);
        }
    }
    if (digests == NULL) {
        return NULL;
    }
    return Py_BuildValue(
        "nnNN", (Py_ssize_t)job->received, (Py_ssize_t)job->behind_received,
        PyBool_FromLong(job->ended), digests);
}

static int described(const Receipt *job, Py_ssize_t inside, Py_ssize_t nbytes, int wait_ms) {
    if (inside < 0 || nbytes < 1 || inside >= job->parts.views[0].len ||
        (size_t)inside + (size_t)nbytes > job->parts.total) {
        PyErr_Format(
            PyExc_ValueError, "%zd bytes from byte %zd on do not fit into parts of %zu bytes", nbytes,
            inside, job->parts.total);
        return 0;
    }
    if (job->interrupt.len < 1 || wait_ms < 0) {
        PyErr_SetString(PyExc_ValueError, "no interrupt, or a negative time to wait");
        return 0;
    }
    return 1;
}

static PyObject *receive(PyObject *module, PyObject *args) {
    Receipt job = {0};
    PyObject *sequence, *answer = NULL;
    Py_ssize_t inside, nbytes;
    int fd, wait_ms;
    if (!PyArg_ParseTuple(
            args, "iOnnw*y*ip:receive", &fd, &sequence, &inside, &nbytes, &job.behind, &job.interrupt,
            &wait_ms, &job.hashed)) {
        return NULL;
    }
    if (take(&job.parts, sequence, PyBUF_WRITABLE) == 0) {
        if (described(&job, inside, nbytes, wait_ms)) {
            job.inside = (size_t)inside;
            job.nbytes = (size_t)nbytes;
            job.digests = PyMem_Calloc((size_t)job.parts.count, sizeof(uint64_t));
            if (job.digests == NULL) {
                PyErr_NoMemory();
            } else {
                Py_BEGIN_ALLOW_THREADS
                receive_all(&job, fd, wait_ms);
                if (job.lowat) {
                    wake_for(&job, fd, 1);
                }
                Py_END_ALLOW_THREADS
                if (job.error) {
                    errno = job.error;
                    PyErr_SetFromErrno(PyExc_OSError);
                } else {
                    answer = receipt(&job);
                }
                PyMem_Free(job.digests);
            }
        }
        give_back(&job.parts);
    }
    PyBuffer_Release(&job.behind);
    PyBuffer_Release(&job.interrupt);
    return answer;
}

/* Return bytes sent, or -1 with errno. */
static Py_ssize_t send_all(const Parts *parts, int fd, const char *interrupt, int wait_ms) {
    struct iovec iov[VECTORS_MAX];
    size_t sent = 0, inside = 0;
    Py_ssize_t part = 0;
    while (part < parts->count && !interrupted(interrupt)) {
        int count = 0;
        size_t skip = inside;
        for (Py_ssize_t i = part; i < parts->count && count < VECTORS_MAX; i++, skip = 0) {
            iov[count++] = (struct iovec){
                (char *)parts->views[i].buf + skip, (size_t)parts->views[i].len - skip};
        }
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)count};
        ssize_t got = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                return -1;
            }
            int ready = wait_ms ? await_socket(fd, POLLOUT, wait_ms) : 0;
            if (ready < 0) {
                return -1;
            }
            if (ready == 0) {
                break;
            }
            continue;
        }
        sent += (size_t)got;
        size_t rest = (size_t)got + inside;
        while (part < parts->count && rest >= (size_t)parts->views[part].len) {
            rest -= (size_t)parts->views[part++].len;
        }
        inside = rest;
    }
    return (Py_ssize_t)sent;
}

static PyObject *send_parts(PyObject *module, PyObject *args) {
    Parts parts;
    Py_buffer interrupt;
    PyObject *sequence, *answer = NULL;
    Py_ssize_t sent = 0;
    int fd, wait_ms;
    if (!PyArg_ParseTuple(args, "iOy*i:send", &fd, &sequence, &interrupt, &wait_ms)) {
        return NULL;
    }
    if (interrupt.len < 1 || wait_ms < 0) {
        PyErr_SetString(PyExc_ValueError, "no interrupt, or a negative time to wait");
    } else if (take(&parts, sequence, PyBUF_SIMPLE) == 0) {
        Py_BEGIN_ALLOW_THREADS
        sent = send_all(&parts, fd, interrupt.buf, wait_ms);
        Py_END_ALLOW_THREADS
        answer = sent < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(sent);
        give_back(&parts);
    }
    PyBuffer_Release(&interrupt);
    return answer;
}

static PyMethodDef methods[] = {
    {"receive", receive, METH_VARARGS,
     "receive(fd, parts, inside, nbytes, behind, interrupt, wait_ms, hashed)"},
    {"copy_parts", dualpath_copy_parts, METH_VARARGS,
     "copy_parts(sizes, target, target_at, source, source_at, interrupt, hashed)"},
    {"extent_of", dualpath_extent_of, METH_VARARGS,
     "extent_of(stride, count, length, bases, skips, sizes)"},
    {"rows_of", dualpath_rows_of, METH_VARARGS,
     "rows_of(sizes, source_at, target_at, offset, end, skip, source, target, pieces_max, most, "
     "immediate)"},
    {"send", send_parts, METH_VARARGS, "send(fd, parts, interrupt, wait_ms)"},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    return PyModule_AddIntConstant(module, "HASHED_BYTES_MIN", XXH3_LONG_BYTES_MIN);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Native parts of the transports.", 0, methods, slots, NULL, NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
