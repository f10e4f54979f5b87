/* The library, its devices, and memory that is registered with them. */
#include "verbs.h"

#include <dlfcn.h>

static int end_library(Handle *handle) {
    free((void *)handle->library); /* the library itself stays: its drivers may run threads */
    return 0;
}

PyObject *verbs_load(PyObject *module, PyObject *args) {
    const char *path;
    if (!PyArg_ParseTuple(args, "s:load", &path)) {
        return NULL;
    }
    void *found = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (found == NULL) {
        return PyErr_Format(PyExc_OSError, "%s", dlerror());
    }
    Library *library = calloc(1, sizeof *library);
    if (library == NULL) {
        return PyErr_NoMemory();
    }
    const struct {
        const char *name;
        void *place;
        int optional;
    } wanted[] = {
        {"ibv_get_device_list", &library->get_device_list, 0},
        {"ibv_free_device_list", &library->free_device_list, 0},
        {"ibv_get_device_name", &library->get_device_name, 0},
        {"ibv_open_device", &library->open_device, 0},
        {"ibv_close_device", &library->close_device, 0},
        {"ibv_query_device", &library->query_device, 0},
        {"ibv_query_port", &library->query_port, 0},
        {"_ibv_query_gid_table", &library->query_gid_table, 0},
        {"ibv_alloc_pd", &library->alloc_pd, 0},
        {"ibv_dealloc_pd", &library->dealloc_pd, 0},
        {"ibv_reg_mr", &library->reg_mr, 0},
        {"ibv_reg_dmabuf_mr", &library->reg_dmabuf_mr, 1},
        {"ibv_dereg_mr", &library->dereg_mr, 0},
        {"ibv_create_comp_channel", &library->create_comp_channel, 0},
        {"ibv_destroy_comp_channel", &library->destroy_comp_channel, 0},
        {"ibv_get_cq_event", &library->get_cq_event, 0},
        {"ibv_ack_cq_events", &library->ack_cq_events, 0},
        {"ibv_create_cq", &library->create_cq, 0},
        {"ibv_destroy_cq", &library->destroy_cq, 0},
        {"ibv_create_qp", &library->create_qp, 0},
        {"ibv_modify_qp", &library->modify_qp, 0},
        {"ibv_destroy_qp", &library->destroy_qp, 0},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(found, wanted[i].name);
        if (symbol == NULL && !wanted[i].optional) {
            free(library);
            return PyErr_Format(PyExc_OSError, "%s has no %s", path, wanted[i].name);
        }
        memcpy(wanted[i].place, &symbol, sizeof symbol);
    }
    return verbs_capsule(LIBRARY, (Handle){.library = library, .object = found, .end = end_library});
}

PyObject *verbs_devices(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    int count = 0;
    if (!PyArg_ParseTuple(args, "O:devices", &capsule) ||
        (handle = verbs_handle(capsule, LIBRARY)) == NULL) {
        return NULL;
    }
    const Library *library = handle->library;
    errno = 0;
    void **list = library->get_device_list(&count);
    if (list == NULL) {
        return verbs_error(errno);
    }
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < count; i++) {
        PyObject *name = PyUnicode_DecodeFSDefault(library->get_device_name(list[i]));
        if (name == NULL || PyList_Append(names, name) < 0) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    library->free_device_list(list);
    return names;
}

static VerbsContext *open_named(const Library *library, const char *name) {
    VerbsContext *context = NULL;
    int count = 0;
    errno = 0;
    void **list = library->get_device_list(&count);
    if (list != NULL) {
        errno = ENODEV;
        for (int i = 0; i < count; i++) {
            if (strcmp(library->get_device_name(list[i]), name) == 0) {
                context = library->open_device(list[i]);
                break;
            }
        }
        int code = errno;
        library->free_device_list(list);
        errno = code;
    }
    return context;
}

static int end_device(Handle *handle) {
    int code = handle->library->dealloc_pd(handle->object);
    if (code == 0 && handle->library->close_device(handle->owner) != 0) {
        handle->object = NULL;
        code = errno;
    }
    return code;
}

PyObject *verbs_open(PyObject *module, PyObject *args) {
    PyObject *capsule;
    const char *name;
    Handle *handle;
    if (!PyArg_ParseTuple(args, "Os:open", &capsule, &name) ||
        (handle = verbs_handle(capsule, LIBRARY)) == NULL) {
        return NULL;
    }
    const Library *library = handle->library;
    VerbsContext *context;
    VerbsDomain *domain = NULL;
    int code;
    Py_BEGIN_ALLOW_THREADS
    context = open_named(library, name);
    code = errno;
    if (context != NULL && (domain = library->alloc_pd(context)) == NULL) {
        code = errno;
        library->close_device(context);
    }
    Py_END_ALLOW_THREADS
    if (domain == NULL) {
        return verbs_error(code);
    }
    return verbs_capsule(DEVICE, (Handle){.library = library, .object = domain, .owner = context,
                                          .end = end_device, .parents = {capsule, NULL}});
}

PyObject *verbs_query(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *device;
    VerbsDeviceInfo info = {0};
    if (!PyArg_ParseTuple(args, "O:query", &capsule) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    int code = device->library->query_device(device->owner, &info);
    if (code) {
        return verbs_error(code);
    }
    return Py_BuildValue("iiiIi", info.requests_max, info.pieces_max, info.completions_max,
                         info.flags, (int)info.ports);
}

PyObject *verbs_query_port(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *device;
    unsigned char number;
    VerbsPortInfo info = {0};
    if (!PyArg_ParseTuple(args, "Ob:query_port", &capsule, &number) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    int code = device->library->query_port(device->owner, number, &info);
    if (code) {
        return verbs_error(code);
    }
    return Py_BuildValue("OOiii", info.state == PORT_ACTIVE ? Py_True : Py_False,
                         info.link == LINK_INFINIBAND ? Py_True : Py_False, (int)info.lid, info.mtu,
                         info.gids);
}

PyObject *verbs_gids(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *device;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "On:gids", &capsule, &most) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    VerbsGidEntry *entries = PyMem_Calloc(most > 0 ? (size_t)most : 1, sizeof *entries);
    if (entries == NULL) {
        return PyErr_NoMemory();
    }
    long count = device->library->query_gid_table(device->owner, entries, (size_t)most, 0,
                                                  sizeof *entries);
    PyObject *found = count < 0 ? verbs_error((int)-count) : PyList_New(0);
    for (long i = 0; found != NULL && i < count; i++) {
        VerbsGidEntry *each = &entries[i];
        PyObject *row = Py_BuildValue("IIIy#", each->port, each->row, each->type, each->gid.bytes,
                                      (Py_ssize_t)sizeof each->gid);
        if (row == NULL || PyList_Append(found, row) < 0) {
            Py_CLEAR(found);
        }
        Py_XDECREF(row);
    }
    PyMem_Free(entries);
    return found;
}

/* With memory windows the key of the memory itself opens nothing to peers. */
static int access_of(int writable, int bound) {
    return writable ? ACCESS_LOCAL_WRITE | (bound ? ACCESS_BIND : ACCESS_REMOTE_WRITE) : 0;
}

static int end_memory(Handle *handle) { return handle->library->dereg_mr(handle->object); }

static PyObject *memory_of(PyObject *device, const Library *library, VerbsMemory *memory, int code) {
    if (memory == NULL) {
        return verbs_error(code);
    }
    return verbs_capsule(MEMORY, (Handle){.library = library, .object = memory, .end = end_memory,
                                          .parents = {device, NULL}});
}

PyObject *verbs_register(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long address, nbytes;
    int writable, bound, code;
    Handle *device;
    VerbsMemory *memory;
    if (!PyArg_ParseTuple(args, "OKKpp:register", &capsule, &address, &nbytes, &writable, &bound) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* pinning takes its time */
    errno = 0;
    memory = device->library->reg_mr(device->object, (void *)(uintptr_t)address, (size_t)nbytes,
                                     access_of(writable, bound));
    code = errno;
    Py_END_ALLOW_THREADS
    return memory_of(capsule, device->library, memory, code);
}

PyObject *verbs_register_dmabuf(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long offset, nbytes;
    int fd, writable, bound, code;
    Handle *device;
    VerbsMemory *memory;
    if (!PyArg_ParseTuple(args, "OiKKpp:register_dmabuf", &capsule, &fd, &offset, &nbytes, &writable,
                          &bound) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    if (device->library->reg_dmabuf_mr == NULL) {
        return verbs_error(EOPNOTSUPP);
    }
    Py_BEGIN_ALLOW_THREADS
    errno = 0;
    memory = device->library->reg_dmabuf_mr(device->object, offset, (size_t)nbytes, offset, fd,
                                            access_of(writable, bound));
    code = errno;
    Py_END_ALLOW_THREADS
    return memory_of(capsule, device->library, memory, code);
}

PyObject *verbs_keys(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    if (!PyArg_ParseTuple(args, "O:keys", &capsule) ||
        (handle = verbs_handle(capsule, MEMORY)) == NULL) {
        return NULL;
    }
    VerbsMemory *memory = handle->object;
    return Py_BuildValue("II", memory->lkey, memory->rkey);
}

static int end_window(Handle *handle) {
    VerbsWindow *window = handle->object;
    return window->context->calls.free_window(window);
}

PyObject *verbs_window(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *device;
    if (!PyArg_ParseTuple(args, "O:window", &capsule) ||
        (device = verbs_handle(capsule, DEVICE)) == NULL) {
        return NULL;
    }
    VerbsDomain *domain = device->object;
    errno = 0;
    VerbsWindow *window = domain->context->calls.alloc_window == NULL
                              ? NULL
                              : domain->context->calls.alloc_window(domain, WINDOW_TYPE_2);
    if (window == NULL) {
        return verbs_error(errno ? errno : EOPNOTSUPP);
    }
    return verbs_capsule(WINDOW, (Handle){.library = device->library, .object = window,
                                          .end = end_window, .parents = {capsule, NULL}});
}

PyObject *verbs_next_key(PyObject *module, PyObject *args) {
    PyObject *capsule;
    Handle *handle;
    if (!PyArg_ParseTuple(args, "O:next_key", &capsule) ||
        (handle = verbs_handle(capsule, WINDOW)) == NULL) {
        return NULL;
    }
    uint32_t key = ((VerbsWindow *)handle->object)->rkey;
    return PyLong_FromUnsignedLong((key & ~0xFFu) | ((key + 1) & 0xFF));
}
