/* Pages of memory, before it is used: their NUMA node, and having them at all. */
#include "parts.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define MPOL_BIND_MODE 2 /* linux/mempolicy.h is not in every set of headers */
#define NODES_MAX 1024
#define WORD_BITS (8 * sizeof(unsigned long))

static PyObject *refused(int error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* The whole pages of a buffer, of the system's page size. */
static int pages_of(PyObject *object, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) < 0) {
        return 0;
    }
    if ((uintptr_t)view->buf % (uintptr_t)sysconf(_SC_PAGESIZE)) {
        PyBuffer_Release(view);
        PyErr_SetString(PyExc_ValueError, "the buffer does not start at a page");
        return 0;
    }
    return 1;
}

static PyObject *populate(PyObject *module, PyObject *object) {
    Py_buffer view;
    int error = 0;
    if (!pages_of(object, &view)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    while (view.len > 0 && madvise(view.buf, (size_t)view.len, MADV_POPULATE_WRITE) != 0) {
        error = errno;
        if (error != EINTR && error != EAGAIN) {
            break;
        }
        error = 0;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return error ? refused(error) : Py_NewRef(Py_None);
}

static PyObject *bind_node(PyObject *module, PyObject *args) {
    PyObject *object;
    Py_buffer view;
    int node;
    long result = 0;
    unsigned long mask[NODES_MAX / WORD_BITS] = {0};
    if (!PyArg_ParseTuple(args, "Oi:bind_node", &object, &node)) {
        return NULL;
    }
    if (node < 0 || node >= NODES_MAX) {
        return PyErr_Format(PyExc_ValueError, "node %d is outside of 0..%d", node, NODES_MAX - 1);
    }
    if (!pages_of(object, &view)) {
        return NULL;
    }
    mask[(size_t)node / WORD_BITS] = 1UL << ((size_t)node % WORD_BITS);
#ifdef SYS_mbind
    result = syscall(SYS_mbind, view.buf, view.len, MPOL_BIND_MODE, mask, NODES_MAX, 0);
#else
    errno = ENOSYS;
    result = -1;
#endif
    int error = errno;
    PyBuffer_Release(&view);
    return result != 0 ? refused(error) : Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"populate", populate, METH_O, "populate(buffer): have every page of it now"},
    {"bind_node", bind_node, METH_VARARGS, "bind_node(buffer, node): take its pages from one node"},
    {NULL, NULL, 0, NULL},
};

int dualpath_add_pages(PyObject *module) { return PyModule_AddFunctions(module, methods); }
