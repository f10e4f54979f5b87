/* Posting: many work requests with one call and one ring of the doorbell, without the GIL.
 *
 * Requests come as rows, one for each piece of local memory (work_rows.py): nothing is an object
 * on the way from the slices of a write to the send queue. */
#include "verbs.h"

#include <arpa/inet.h>
#include <time.h>

typedef struct {
    VerbsSend requests[REQUESTS_MAX];
    VerbsPiece pieces[ROWS_MAX];
    int count;
} Batch;

static PyObject *wrong(const char *why) {
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

/* Make the linked list. NULL, or what is wrong with the rows. */
static const char *build(Batch *batch, const Row *rows, Py_ssize_t count) {
    VerbsSend *request = NULL;
    batch->count = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const Row *row = &rows[i];
        if (request == NULL) {
            if (batch->count == REQUESTS_MAX) {
                return "more than 64 requests with one post";
            }
            request = &batch->requests[batch->count++];
            request->ident = row->ident;
            request->next = request + 1;
            request->pieces = &batch->pieces[i];
            request->count = 0;
            request->opcode = (int)row->opcode;
            request->flags = row->flags & ROW_SIGNALED ? SEND_SIGNALED : 0;
            request->immediate = htonl(row->immediate);
            request->at.remote.address = row->remote;
            request->at.remote.rkey = row->rkey;
        }
        switch (request->opcode) {
        case WR_WRITE:
        case WR_WRITE_IMM:
        case WR_SEND:
            batch->pieces[i] = (VerbsPiece){row->address, row->nbytes, row->lkey};
            if (++request->count > PIECES_MAX) {
                return "more than 16 pieces in one request";
            }
            break;
        case WR_INVALIDATE:
            request->immediate = row->rkey; /* in the machine's order */
            break;
        case WR_BIND:
            break;
        default:
            return "an opcode that is not known";
        }
        if (!(row->flags & ROW_MORE)) {
            request = NULL;
        }
    }
    if (request != NULL || batch->count == 0) {
        return "rows that end within a request, or none";
    }
    batch->requests[batch->count - 1].next = NULL;
    return NULL;
}

/* Post what was built: how many the device took, `code` being why not all. */
static int post_built(VerbsPair *pair, Batch *batch, int *code) {
    VerbsSend *bad = NULL;
    *code = pair->context->calls.post_send(pair, batch->requests, &bad);
    if (*code == 0) {
        return batch->count;
    }
    return bad == NULL ? 0 : (int)(bad - batch->requests);
}

/* A BIND's row names its window and memory by where they are in `objects`. */
static int resolve_binds(Batch *batch, const Row *rows, Py_ssize_t count, PyObject *objects,
                         VerbsWindow **windows) {
    int index = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        VerbsSend *request = &batch->requests[index];
        windows[index] = NULL;
        if (rows[i].opcode == WR_BIND) {
            PyObject *window = PySequence_GetItem(objects, (Py_ssize_t)rows[i].address);
            PyObject *memory = PySequence_GetItem(objects, (Py_ssize_t)rows[i].address + 1);
            /* The sequence keeps them while the call lasts. */
            Py_XDECREF(window);
            Py_XDECREF(memory);
            Handle *bound = window && memory ? verbs_handle(window, WINDOW) : NULL;
            Handle *of = bound ? verbs_handle(memory, MEMORY) : NULL;
            if (of == NULL) {
                return -1;
            }
            windows[index] = request->bind.window = bound->object;
            request->bind.memory = of->object;
            request->bind.rkey = rows[i].rkey;
            request->bind.address = rows[i].remote;
            request->bind.nbytes = rows[i].nbytes;
            request->bind.access = ACCESS_REMOTE_WRITE;
        }
        if (!(rows[i].flags & ROW_MORE)) {
            index++;
        }
    }
    return 0;
}

static PyObject *post_rows(Handle *pair, const Py_buffer *view, PyObject *objects) {
    Batch batch;
    VerbsWindow *windows[REQUESTS_MAX];
    const Row *rows = view->buf;
    Py_ssize_t count = view->len / (Py_ssize_t)sizeof *rows;
    int posted, code;
    const char *why = build(&batch, rows, count);
    if (why == NULL && (uint32_t)batch.count > pair->limit) {
        why = "more requests than the send queue has room for";
    }
    if (why != NULL) {
        return wrong(why);
    }
    if (resolve_binds(&batch, rows, count, objects, windows) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    posted = post_built(pair->object, &batch, &code);
    Py_END_ALLOW_THREADS
    for (int i = 0; i < posted; i++) {
        if (windows[i] != NULL) { /* the next BIND's driver looks here for the key it has now */
            windows[i]->rkey = batch.requests[i].bind.rkey;
        }
    }
    return Py_BuildValue("iii", posted, batch.count, code);
}

/* The pair and its rows; the buffer is the caller's to release where this returns a handle. */
static Handle *rows_of(PyObject *capsule, Py_buffer *view) {
    Handle *pair = verbs_handle(capsule, PAIR);
    if (pair != NULL && (view->len < 1 || view->len % (Py_ssize_t)sizeof(Row) ||
                         view->len > ROWS_MAX * (Py_ssize_t)sizeof(Row) ||
                         (uintptr_t)view->buf % _Alignof(Row))) {
        return (Handle *)wrong("1 to 1024 aligned rows of 48 bytes are posted at once");
    }
    return pair;
}

PyObject *verbs_post(PyObject *module, PyObject *args) {
    PyObject *capsule, *objects, *answer = NULL;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "Oy*O:post", &capsule, &view, &objects)) {
        return NULL;
    }
    Handle *pair = rows_of(capsule, &view);
    if (pair != NULL) {
        answer = post_rows(pair, &view, objects);
    }
    PyBuffer_Release(&view);
    return answer;
}

PyObject *verbs_post_receive(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long ident, address;
    unsigned nbytes, lkey;
    Handle *handle;
    if (!PyArg_ParseTuple(args, "OKKII:post_receive", &capsule, &ident, &address, &nbytes, &lkey) ||
        (handle = verbs_handle(capsule, PAIR)) == NULL) {
        return NULL;
    }
    VerbsPair *pair = handle->object;
    VerbsPiece piece = {address, nbytes, lkey};
    VerbsReceive request = {.ident = ident, .pieces = &piece, .count = 1}, *bad;
    int code = pair->context->calls.post_receive(pair, &request, &bad);
    if (code) {
        return verbs_error(code);
    }
    Py_RETURN_NONE;
}

/* For the benchmark: nanoseconds that building and posting the rows took, `times` times over. */
PyObject *verbs_time_posts(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Py_buffer view;
    int times, code = 0;
    if (!PyArg_ParseTuple(args, "Oy*i:time_posts", &capsule, &view, &times)) {
        return NULL;
    }
    Batch batch;
    struct timespec begun, ended;
    const char *why = NULL;
    Handle *pair = rows_of(capsule, &view);
    if (pair != NULL) {
        Py_BEGIN_ALLOW_THREADS
        clock_gettime(CLOCK_MONOTONIC, &begun);
        for (int i = 0; i < times && why == NULL && code == 0; i++) {
            why = build(&batch, view.buf, view.len / (Py_ssize_t)sizeof(Row));
            if (why == NULL) {
                post_built(pair->object, &batch, &code);
            }
        }
        clock_gettime(CLOCK_MONOTONIC, &ended);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    if (pair == NULL) {
        return NULL;
    }
    if (why != NULL || code) {
        return why != NULL ? wrong(why) : verbs_error(code);
    }
    return PyLong_FromLongLong((ended.tv_sec - begun.tv_sec) * 1000000000LL + ended.tv_nsec -
                               begun.tv_nsec);
}
