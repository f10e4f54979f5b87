/* dualpath.bench.transfer._null_verbs: a libibverbs whose one device does nothing, to measure and
 * test what lies above it. It is opened by its path as the real library is.
 *
 * A post walks the list, counts, keeps what it saw if told to, and completes what is signaled at
 * once; it can refuse at a given place. Nothing is ever read or written, no packet is sent. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "verbs_abi.h"

#define EXPORTED __attribute__((visibility("default")))
#define COMPLETIONS_MAX 4096
#define SEEN_MAX 4096
#define SEEN_PIECES 16

typedef struct {
    VerbsSend request;
    VerbsPiece pieces[SEEN_PIECES];
} Seen;

typedef struct {
    VerbsQueue queue; /* first: it is what the caller holds */
    VerbsCompletion entries[COMPLETIONS_MAX];
    unsigned first, count;
    int armed;
} NullQueue;

typedef struct {
    VerbsWindow window; /* first, again */
    uint32_t key;       /* the one that it has */
} NullWindow;

static struct {
    uint64_t posted, doorbells;
    int refuse_at, recording, seen, without_dmabuf;
    uint32_t next;
    Seen *list;
} null = {.refuse_at = -1, .next = 0x100};

/* Requests. */

static int post_send(VerbsPair *pair, VerbsSend *request, VerbsSend **bad) {
    NullQueue *queue = (NullQueue *)pair->send_queue;
    int index = 0;
    null.doorbells++;
    for (; request != NULL; request = request->next, index++) {
        if (index == null.refuse_at) {
            *bad = request;
            return ENOMEM;
        }
        if (request->opcode == WR_BIND) { /* a driver knows a window by the key it has now */
            NullWindow *bound = (NullWindow *)request->bind.window;
            if (bound->window.rkey != bound->key) {
                *bad = request;
                return EINVAL;
            }
            bound->key = request->bind.rkey;
        }
        null.posted++;
        if (null.recording && null.seen < SEEN_MAX) {
            Seen *seen = &null.list[null.seen++];
            seen->request = *request;
            if (request->opcode <= WR_SEND) {
                memcpy(seen->pieces, request->pieces, (size_t)request->count * sizeof(VerbsPiece));
            }
        }
        if (request->flags & SEND_SIGNALED && queue->count < COMPLETIONS_MAX) {
            unsigned at = (queue->first + queue->count++) % COMPLETIONS_MAX;
            queue->entries[at] =
                (VerbsCompletion){.ident = request->ident, .pair = pair->number};
        }
    }
    if (queue->armed && queue->count) {
        queue->armed = 0;
        eventfd_write(queue->queue.channel->fd, 1);
    }
    return 0;
}

static int post_receive(VerbsPair *pair, VerbsReceive *request, VerbsReceive **bad) {
    (void)pair;
    (void)request;
    (void)bad;
    return 0;
}

static int poll_queue(VerbsQueue *polled, int most, VerbsCompletion *found) {
    NullQueue *queue = (NullQueue *)polled;
    int count = 0;
    for (; count < most && queue->count; count++, queue->count--) {
        found[count] = queue->entries[queue->first];
        queue->first = (queue->first + 1) % COMPLETIONS_MAX;
    }
    return count;
}

static int arm(VerbsQueue *queue, int solicited_only) {
    (void)solicited_only;
    ((NullQueue *)queue)->armed = 1;
    return 0;
}

static VerbsWindow *alloc_window(VerbsDomain *domain, int type) {
    NullWindow *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return NULL;
    }
    made->key = null.next += 0x100;
    made->window = (VerbsWindow){domain->context, domain, made->key, 0, type};
    return &made->window;
}

static int free_window(VerbsWindow *window) {
    free(window);
    return 0;
}

/* The functions that the library exports. */

static VerbsContext context = {
    .calls = {.alloc_window = alloc_window, .free_window = free_window, .poll = poll_queue,
              .arm = arm, .post_send = post_send, .post_receive = post_receive},
};
static void *device_list[] = {&context, NULL};

EXPORTED void **ibv_get_device_list(int *count) {
    *count = 1;
    return device_list;
}

EXPORTED void ibv_free_device_list(void **list) { (void)list; }

EXPORTED const char *ibv_get_device_name(void *device) {
    (void)device;
    return "null0";
}

EXPORTED VerbsContext *ibv_open_device(void *device) { return device; }

EXPORTED int ibv_close_device(VerbsContext *closed) {
    (void)closed;
    return 0;
}

EXPORTED int ibv_query_device(VerbsContext *of, VerbsDeviceInfo *info) {
    (void)of;
    *info = (VerbsDeviceInfo){.requests_max = 4096, .flags = DEVICE_WINDOW_2B, .pieces_max = 16,
                              .completions_max = COMPLETIONS_MAX, .ports = 1};
    return 0;
}

EXPORTED int ibv_query_port(VerbsContext *of, uint8_t number, VerbsPortInfo *info) {
    (void)of;
    (void)number;
    *info = (VerbsPortInfo){.state = PORT_ACTIVE, .mtu = 5, .gids = 1, .link = 2};
    return 0;
}

EXPORTED long _ibv_query_gid_table(VerbsContext *of, VerbsGidEntry *entries, size_t most,
                                   uint32_t flags, size_t size) {
    (void)of;
    (void)flags;
    if (most < 1 || size != sizeof *entries) {
        return -EINVAL;
    }
    entries[0] = (VerbsGidEntry){.port = 1, .type = 2};
    entries[0].gid.bytes[10] = entries[0].gid.bytes[11] = 0xFF;
    return 1;
}

EXPORTED VerbsDomain *ibv_alloc_pd(VerbsContext *of) {
    VerbsDomain *made = calloc(1, sizeof *made);
    if (made != NULL) {
        made->context = of;
    }
    return made;
}

EXPORTED int ibv_dealloc_pd(VerbsDomain *domain) {
    free(domain);
    return 0;
}

EXPORTED VerbsMemory *ibv_reg_mr(VerbsDomain *domain, void *address, size_t nbytes, int access) {
    VerbsMemory *made = calloc(1, sizeof *made);
    (void)access;
    if (made != NULL) {
        uint32_t key = null.next += 0x100;
        *made = (VerbsMemory){domain->context, domain, address, nbytes, 0, key, key};
    }
    return made;
}

EXPORTED VerbsMemory *ibv_reg_dmabuf_mr(VerbsDomain *domain, uint64_t offset, size_t nbytes,
                                        uint64_t address, int fd, int access) {
    (void)offset;
    if (null.without_dmabuf || fd < 0) {
        errno = null.without_dmabuf ? EOPNOTSUPP : EBADF;
        return NULL;
    }
    return ibv_reg_mr(domain, (void *)(uintptr_t)address, nbytes, access);
}

EXPORTED int ibv_dereg_mr(VerbsMemory *memory) {
    free(memory);
    return 0;
}

EXPORTED VerbsChannel *ibv_create_comp_channel(VerbsContext *of) {
    VerbsChannel *made = calloc(1, sizeof *made);
    if (made != NULL) {
        *made = (VerbsChannel){of, eventfd(0, EFD_CLOEXEC), 0};
    }
    return made;
}

EXPORTED int ibv_destroy_comp_channel(VerbsChannel *channel) {
    close(channel->fd);
    free(channel);
    return 0;
}

EXPORTED int ibv_get_cq_event(VerbsChannel *channel, VerbsQueue **queue, void **user) {
    eventfd_t count;
    *queue = NULL;
    *user = NULL;
    return eventfd_read(channel->fd, &count);
}

EXPORTED void ibv_ack_cq_events(VerbsQueue *queue, unsigned count) {
    (void)queue;
    (void)count;
}

EXPORTED VerbsQueue *ibv_create_cq(VerbsContext *of, int depth, void *user, VerbsChannel *channel,
                                   int vector) {
    NullQueue *made = calloc(1, sizeof *made);
    (void)depth;
    (void)user;
    (void)vector;
    if (made == NULL) {
        return NULL;
    }
    made->queue = (VerbsQueue){of, channel};
    return &made->queue;
}

EXPORTED int ibv_destroy_cq(VerbsQueue *queue) {
    free(queue);
    return 0;
}

EXPORTED VerbsPair *ibv_create_qp(VerbsDomain *domain, VerbsPairInfo *info) {
    VerbsPair *made = calloc(1, sizeof *made);
    if (made != NULL) {
        *made = (VerbsPair){.context = domain->context, .domain = domain,
                            .send_queue = info->send_queue, .receive_queue = info->receive_queue,
                            .number = null.next++};
    }
    return made;
}

EXPORTED int ibv_modify_qp(VerbsPair *pair, VerbsPairState *state, int mask) {
    (void)pair;
    (void)state;
    (void)mask;
    return 0;
}

EXPORTED int ibv_destroy_qp(VerbsPair *pair) {
    free(pair);
    return 0;
}

/* What tests and the benchmark ask. */

static PyObject *begin(PyObject *module, PyObject *args) {
    int refuse_at, recording, dmabuf;
    (void)module;
    if (!PyArg_ParseTuple(args, "ipp:begin", &refuse_at, &recording, &dmabuf)) {
        return NULL;
    }
    if (recording && null.list == NULL && (null.list = calloc(SEEN_MAX, sizeof(Seen))) == NULL) {
        return PyErr_NoMemory();
    }
    null.refuse_at = refuse_at;
    null.recording = recording;
    null.without_dmabuf = !dmabuf;
    null.posted = null.doorbells = 0;
    null.seen = 0;
    Py_RETURN_NONE;
}

static PyObject *counted(PyObject *module, PyObject *args) {
    (void)module;
    (void)args;
    return Py_BuildValue("KK", (unsigned long long)null.posted, (unsigned long long)null.doorbells);
}

/* (ident, opcode, signaled, remote address, rkey, immediate, pieces) of each recorded request. */
static PyObject *recorded(PyObject *module, PyObject *args) {
    (void)module;
    (void)args;
    PyObject *list = PyList_New(null.seen);
    for (int i = 0; list != NULL && i < null.seen; i++) {
        const Seen *seen = &null.list[i];
        const VerbsSend *request = &seen->request;
        int bind = request->opcode == WR_BIND;
        PyObject *pieces = PyList_New(request->count), *row = NULL;
        for (int at = 0; pieces != NULL && at < request->count; at++) {
            const VerbsPiece *piece = &seen->pieces[at];
            PyObject *each = Py_BuildValue("KII", (unsigned long long)piece->address,
                                           piece->nbytes, piece->lkey);
            if (each == NULL || PyList_SetItem(pieces, at, each) < 0) {
                Py_CLEAR(pieces);
            }
        }
        if (pieces != NULL) {
            row = Py_BuildValue(
                "KiiKIIN", (unsigned long long)request->ident, request->opcode,
                (int)(request->flags & SEND_SIGNALED ? 1 : 0),
                (unsigned long long)(bind ? request->bind.address : request->at.remote.address),
                bind ? request->bind.rkey : request->at.remote.rkey, request->immediate, pieces);
        }
        if (row == NULL || PyList_SetItem(list, i, row) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static PyMethodDef methods[] = {
    {"begin", begin, METH_VARARGS, "begin(refuse_at, recording, dmabuf)"},
    {"counted", counted, METH_NOARGS, "counted()"},
    {"recorded", recorded, METH_NOARGS, "recorded()"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_null_verbs", "A libibverbs that does nothing.", 0, methods, slots, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__null_verbs(void) { return PyModuleDef_Init(&definition); }
