/* What the files of dualpath.transfer.rdma._verbs share. */
#ifndef DUALPATH_VERBS_H
#define DUALPATH_VERBS_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "rows.h"
#include "verbs_abi.h"

/* The functions of libibverbs that are called by name; the rest are in a context's table. */
typedef struct {
    void **(*get_device_list)(int *);
    void (*free_device_list)(void **);
    const char *(*get_device_name)(void *);
    VerbsContext *(*open_device)(void *);
    int (*close_device)(VerbsContext *);
    int (*query_device)(VerbsContext *, VerbsDeviceInfo *);
    int (*query_port)(VerbsContext *, uint8_t, VerbsPortInfo *);
    long (*query_gid_table)(VerbsContext *, VerbsGidEntry *, size_t, uint32_t, size_t);
    VerbsDomain *(*alloc_pd)(VerbsContext *);
    int (*dealloc_pd)(VerbsDomain *);
    VerbsMemory *(*reg_mr)(VerbsDomain *, void *, size_t, int);
    VerbsMemory *(*reg_dmabuf_mr)(VerbsDomain *, uint64_t, size_t, uint64_t, int, int);
    int (*dereg_mr)(VerbsMemory *);
    VerbsChannel *(*create_comp_channel)(VerbsContext *);
    int (*destroy_comp_channel)(VerbsChannel *);
    int (*get_cq_event)(VerbsChannel *, VerbsQueue **, void **);
    void (*ack_cq_events)(VerbsQueue *, unsigned);
    VerbsQueue *(*create_cq)(VerbsContext *, int, void *, VerbsChannel *, int);
    int (*destroy_cq)(VerbsQueue *);
    VerbsPair *(*create_qp)(VerbsDomain *, VerbsPairInfo *);
    int (*modify_qp)(VerbsPair *, VerbsPairState *, int);
    int (*destroy_qp)(VerbsPair *);
} Library;

/* What a capsule holds. Its parents stay as long as it does: a queue pair goes before its
 * completion queue, and that before its device. */
typedef struct Handle {
    const Library *library;
    void *object; /* NULL once closed */
    void *owner;  /* a device's context, a completion queue's channel */
    int (*end)(struct Handle *); /* 0 or errno */
    PyObject *parents[2];
    uint32_t limit; /* most requests of a queue pair */
} Handle;

#define LIBRARY "dualpath.verbs.library"
#define DEVICE "dualpath.verbs.device"
#define MEMORY "dualpath.verbs.memory"
#define WINDOW "dualpath.verbs.window"
#define QUEUE "dualpath.verbs.queue"
#define PAIR "dualpath.verbs.pair"

/* The open handle in a capsule of this kind, or NULL with an exception set. */
Handle *verbs_handle(PyObject *capsule, const char *kind);
/* A capsule around `object`, which it ends with `end`; NULL with an exception set, `object` then
 * ended. */
PyObject *verbs_capsule(const char *kind, Handle made);
/* NULL, with OSError of `code`. */
PyObject *verbs_error(int code);

PyObject *verbs_load(PyObject *module, PyObject *args);
PyObject *verbs_devices(PyObject *module, PyObject *args);
PyObject *verbs_open(PyObject *module, PyObject *args);
PyObject *verbs_query(PyObject *module, PyObject *args);
PyObject *verbs_query_port(PyObject *module, PyObject *args);
PyObject *verbs_gids(PyObject *module, PyObject *args);
PyObject *verbs_register(PyObject *module, PyObject *args);
PyObject *verbs_register_dmabuf(PyObject *module, PyObject *args);
PyObject *verbs_keys(PyObject *module, PyObject *args);
PyObject *verbs_window(PyObject *module, PyObject *args);
PyObject *verbs_next_key(PyObject *module, PyObject *args);

PyObject *verbs_completion_queue(PyObject *module, PyObject *args);
PyObject *verbs_descriptor(PyObject *module, PyObject *args);
PyObject *verbs_arm(PyObject *module, PyObject *args);
PyObject *verbs_acknowledge(PyObject *module, PyObject *args);
PyObject *verbs_poll(PyObject *module, PyObject *args);
PyObject *verbs_queue_pair(PyObject *module, PyObject *args);
PyObject *verbs_number(PyObject *module, PyObject *args);
PyObject *verbs_join(PyObject *module, PyObject *args);
PyObject *verbs_halt(PyObject *module, PyObject *args);

PyObject *verbs_post(PyObject *module, PyObject *args);
PyObject *verbs_post_receive(PyObject *module, PyObject *args);
PyObject *verbs_time_posts(PyObject *module, PyObject *args);

#endif
