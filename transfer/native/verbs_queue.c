/* Completion queues and queue pairs: made, joined, polled, ended. */
#include "verbs.h"

#include <arpa/inet.h>

#define POLL_MAX 64
enum { MESSAGE, IMMEDIATE, REQUEST }; /* what a completion is about; see native_device.py */

static int end_queue(Handle *handle) {
    int code = handle->library->destroy_cq(handle->object);
    if (code == 0) {
        code = handle->library->destroy_comp_channel(handle->owner);
    }
    return code;
}

PyObject *verbs_completion_queue(PyObject *module, PyObject *args) {
    PyObject *capsule;
    int depth, code;
    Handle *device;
    if (!PyArg_ParseTuple(args, "Oi:completion_queue", &capsule, &depth) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    const Library *library = device->library;
    VerbsQueue *queue = NULL;
    errno = 0;
    VerbsChannel *channel = library->create_comp_channel(device->owner);
    if (channel != NULL) {
        queue = library->create_cq(device->owner, depth, NULL, channel, 0);
    }
    if (queue == NULL) {
        code = errno;
        if (channel != NULL) {
            library->destroy_comp_channel(channel);
        }
        return verbs_error(code);
    }
    return verbs_capsule(QUEUE, (Handle){.library = library, .object = queue, .owner = channel,
                                         .end = end_queue, .parents = {capsule, NULL}});
}

PyObject *verbs_descriptor(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *queue;
    if (!PyArg_ParseTuple(args, "O:descriptor", &capsule) ||
        (queue = verbs_handle(capsule, QUEUE)) == NULL) {
        return NULL;
    }
    return PyLong_FromLong(((VerbsChannel *)queue->owner)->fd);
}

PyObject *verbs_arm(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    if (!PyArg_ParseTuple(args, "O:arm", &capsule) ||
        (handle = verbs_handle(capsule, QUEUE)) == NULL) {
        return NULL;
    }
    VerbsQueue *queue = handle->object;
    int code = queue->context->calls.arm(queue, 0);
    if (code) {
        return verbs_error(code);
    }
    Py_RETURN_NONE;
}

/* The caller has made the descriptor non-blocking. */
PyObject *verbs_acknowledge(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    VerbsQueue *queue;
    void *user;
    if (!PyArg_ParseTuple(args, "O:acknowledge", &capsule) ||
        (handle = verbs_handle(capsule, QUEUE)) == NULL) {
        return NULL;
    }
    if (handle->library->get_cq_event(handle->owner, &queue, &user) != 0) {
        return verbs_error(errno);
    }
    handle->library->ack_cq_events(handle->object, 1);
    Py_RETURN_NONE;
}

static int about(const VerbsCompletion *each) {
    if (each->status != 0) {
        return REQUEST; /* the opcode of what failed is not to be relied upon */
    }
    return each->opcode == WC_RECEIVED       ? MESSAGE
           : each->opcode == WC_RECEIVED_IMM ? IMMEDIATE
                                             : REQUEST;
}

PyObject *verbs_poll(PyObject *module, PyObject *args) {
    VerbsCompletion found[POLL_MAX];
    PyObject *capsule;
    Handle *handle;
    int most, count;
    if (!PyArg_ParseTuple(args, "Oi:poll", &capsule, &most) ||
        (handle = verbs_handle(capsule, QUEUE)) == NULL) {
        return NULL;
    }
    VerbsQueue *queue = handle->object;
    most = most < POLL_MAX ? most : POLL_MAX;
    Py_BEGIN_ALLOW_THREADS
    count = queue->context->calls.poll(queue, most, found);
    Py_END_ALLOW_THREADS
    if (count < 0) {
        return verbs_error(-count);
    }
    PyObject *list = PyList_New(count);
    for (int i = 0; list != NULL && i < count; i++) {
        const VerbsCompletion *each = &found[i];
        PyObject *row = Py_BuildValue("KiiIII", (unsigned long long)each->ident, each->status,
                                      about(each), each->nbytes, ntohl(each->immediate), each->pair);
        if (row == NULL || PyList_SetItem(list, i, row) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static int end_pair(Handle *handle) { return handle->library->destroy_qp(handle->object); }

PyObject *verbs_queue_pair(PyObject *module, PyObject *args) {
    PyObject *device_capsule, *queue_capsule;
    unsigned sends, receives, pieces;
    unsigned char port;
    Handle *device, *queue;
    if (!PyArg_ParseTuple(args, "OOIIIb:queue_pair", &device_capsule, &queue_capsule, &sends,
                          &receives, &pieces, &port) ||
        (device = verbs_handle(device_capsule, DEVICE)) == NULL ||
        (queue = verbs_handle(queue_capsule, QUEUE)) == NULL) {
        return NULL;
    }
    const Library *library = device->library;
    VerbsPairInfo info = {
        .send_queue = queue->object, .receive_queue = queue->object, .type = TYPE_RC,
        .limits = {.sends = sends, .receives = receives, .send_pieces = pieces,
                   .receive_pieces = 1}};
    VerbsPairState state = {.state = STATE_INIT, .port = port,
                            .access = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE};
    VerbsPair *pair;
    int code;
    Py_BEGIN_ALLOW_THREADS
    errno = 0;
    pair = library->create_qp(device->object, &info);
    code = errno;
    if (pair != NULL) {
        code = library->modify_qp(pair, &state, SET_STATE | SET_PKEY_INDEX | SET_PORT | SET_ACCESS);
        if (code) {
            library->destroy_qp(pair);
            pair = NULL;
        }
    }
    Py_END_ALLOW_THREADS
    if (pair == NULL) {
        return verbs_error(code);
    }
    return verbs_capsule(PAIR, (Handle){.library = library, .object = pair, .end = end_pair,
                                        .parents = {device_capsule, queue_capsule},
                                        .limit = sends});
}

PyObject *verbs_number(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *pair;
    if (!PyArg_ParseTuple(args, "O:number", &capsule) ||
        (pair = verbs_handle(capsule, PAIR)) == NULL) {
        return NULL;
    }
    return PyLong_FromUnsignedLong(((VerbsPair *)pair->object)->number);
}

PyObject *verbs_join(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    VerbsPairState state = {.state = STATE_READY_TO_RECEIVE, .reads = 1, .peer_reads = 1};
    VerbsAddress *to = &state.address;
    unsigned short lid;
    Py_buffer gid;
    if (!PyArg_ParseTuple(args, "OiIIIbHbbbby*bbbb:join", &capsule, &state.mtu, &state.peer,
                          &state.receive_packet, &state.send_packet, &to->port, &lid,
                          &to->service_level, &to->route.row, &to->route.traffic_class,
                          &to->route.hops, &gid, &state.timeout, &state.retries,
                          &state.receiver_retries, &state.receiver_timer)) {
        return NULL;
    }
    int wrong = gid.len != sizeof to->route.gid;
    if (!wrong) {
        memcpy(&to->route.gid, gid.buf, sizeof to->route.gid);
    }
    PyBuffer_Release(&gid);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, "a GID has 16 bytes");
        return NULL;
    }
    if ((handle = verbs_handle(capsule, PAIR)) == NULL) {
        return NULL;
    }
    to->lid = lid;
    to->routed = lid == 0; /* with a LID: InfiniBand, one subnet */
    if (!to->routed) {
        memset(&to->route, 0, sizeof to->route);
    }
    int code;
    Py_BEGIN_ALLOW_THREADS
    code = handle->library->modify_qp(handle->object, &state,
                                      SET_STATE | SET_ADDRESS | SET_MTU | SET_PEER |
                                          SET_RECEIVE_PACKET | SET_PEER_READS | SET_RECEIVER_TIMER);
    if (code == 0) {
        state.state = STATE_READY_TO_SEND;
        code = handle->library->modify_qp(handle->object, &state,
                                          SET_STATE | SET_TIMEOUT | SET_RETRIES |
                                              SET_RECEIVER_RETRIES | SET_SEND_PACKET | SET_READS);
    }
    Py_END_ALLOW_THREADS
    if (code) {
        return verbs_error(code);
    }
    Py_RETURN_NONE;
}

PyObject *verbs_halt(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    int code;
    if (!PyArg_ParseTuple(args, "O:halt", &capsule) ||
        (handle = verbs_handle(capsule, PAIR)) == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    VerbsPairState state = {.state = STATE_ERROR};
    code = handle->library->modify_qp(handle->object, &state, SET_STATE);
    if (code == 0) {
        state.state = STATE_RESET;
        code = handle->library->modify_qp(handle->object, &state, SET_STATE);
    }
    Py_END_ALLOW_THREADS
    if (code) {
        return verbs_error(code);
    }
    Py_RETURN_NONE;
}
