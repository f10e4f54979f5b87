/* dualpath.transfer.rdma._verbs: libibverbs, opened at run time, for native_device.py.
 *
 * Objects of the library are capsules; closing one twice does nothing, using a closed one
 * raises ValueError. What the library refuses raises OSError. No policy: who may call what is the
 * port's business (verbs.py). */
#include "verbs.h"

static int end(Handle *handle) {
    int code = 0;
    if (handle->object != NULL && handle->end != NULL) {
        Py_BEGIN_ALLOW_THREADS
        code = handle->end(handle);
        Py_END_ALLOW_THREADS
    }
    if (code == 0) {
        handle->object = NULL;
    }
    return code;
}

static void collect(PyObject *capsule) {
    Handle *handle = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
    if (handle != NULL) {
        end(handle);
        Py_CLEAR(handle->parents[0]); /* not before: what was made of a closed device needs the */
        Py_CLEAR(handle->parents[1]); /* library all the same */
        PyMem_Free(handle);
    }
}

PyObject *verbs_error(int code) {
    errno = code ? code : EIO;
    return PyErr_SetFromErrno(PyExc_OSError);
}

Handle *verbs_handle(PyObject *capsule, const char *kind) {
    Handle *handle = PyCapsule_GetPointer(capsule, kind);
    if (handle != NULL && handle->object == NULL) {
        PyErr_Format(PyExc_ValueError, "a closed %s is used", kind);
        return NULL;
    }
    return handle;
}

PyObject *verbs_capsule(const char *kind, Handle made) {
    Handle *handle = PyMem_Malloc(sizeof *handle);
    PyObject *capsule = handle == NULL ? PyErr_NoMemory() : PyCapsule_New(handle, kind, collect);
    if (capsule == NULL) {
        PyMem_Free(handle);
        if (made.end != NULL) {
            made.end(&made);
        }
        return NULL;
    }
    *handle = made;
    Py_XINCREF(handle->parents[0]);
    Py_XINCREF(handle->parents[1]);
    return capsule;
}

static PyObject *close_handle(PyObject *module, PyObject *args) {
    PyObject *capsule;
    if (!PyArg_ParseTuple(args, "O:close", &capsule)) {
        return NULL;
    }
    if (!PyCapsule_CheckExact(capsule) || PyCapsule_GetName(capsule) == NULL ||
        strncmp(PyCapsule_GetName(capsule), "dualpath.verbs.", 15) != 0) {
        PyErr_SetString(PyExc_TypeError, "not an object of this module");
        return NULL;
    }
    Handle *handle = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
    if (handle == NULL) {
        return NULL;
    }
    int code = end(handle);
    if (code) {
        return verbs_error(code);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"load", verbs_load, METH_VARARGS, "load(path)"},
    {"close", close_handle, METH_VARARGS, "close(object)"},
    {"devices", verbs_devices, METH_VARARGS, "devices(library)"},
    {"open", verbs_open, METH_VARARGS, "open(library, name)"},
    {"query", verbs_query, METH_VARARGS, "query(device)"},
    {"query_port", verbs_query_port, METH_VARARGS, "query_port(device, number)"},
    {"gids", verbs_gids, METH_VARARGS, "gids(device, most)"},
    {"register", verbs_register, METH_VARARGS, "register(device, address, nbytes, writable, bound)"},
    {"register_dmabuf", verbs_register_dmabuf, METH_VARARGS,
     "register_dmabuf(device, fd, offset, nbytes, writable, bound)"},
    {"keys", verbs_keys, METH_VARARGS, "keys(memory)"},
    {"window", verbs_window, METH_VARARGS, "window(device)"},
    {"next_key", verbs_next_key, METH_VARARGS, "next_key(window)"},
    {"completion_queue", verbs_completion_queue, METH_VARARGS, "completion_queue(device, depth)"},
    {"descriptor", verbs_descriptor, METH_VARARGS, "descriptor(queue)"},
    {"arm", verbs_arm, METH_VARARGS, "arm(queue)"},
    {"acknowledge", verbs_acknowledge, METH_VARARGS, "acknowledge(queue)"},
    {"poll", verbs_poll, METH_VARARGS, "poll(queue, most)"},
    {"queue_pair", verbs_queue_pair, METH_VARARGS,
     "queue_pair(device, queue, sends, receives, pieces, port)"},
    {"number", verbs_number, METH_VARARGS, "number(pair)"},
    {"join", verbs_join, METH_VARARGS, "join(pair, ...)"},
    {"halt", verbs_halt, METH_VARARGS, "halt(pair)"},
    {"post", verbs_post, METH_VARARGS, "post(pair, rows, objects)"},
    {"post_receive", verbs_post_receive, METH_VARARGS,
     "post_receive(pair, ident, address, nbytes, lkey)"},
    {"time_posts", verbs_time_posts, METH_VARARGS, "time_posts(pair, rows, times)"},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    return PyModule_AddIntConstant(module, "REQUESTS_MAX", REQUESTS_MAX) < 0 ||
                   PyModule_AddIntConstant(module, "PIECES_MAX", PIECES_MAX) < 0 ||
                   PyModule_AddIntConstant(module, "WINDOWS_2B", DEVICE_WINDOW_2B) < 0
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_verbs", "libibverbs, opened at run time.", 0, methods, slots, NULL, NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__verbs(void) { return PyModuleDef_Init(&definition); }
