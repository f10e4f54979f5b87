/* What the module's files share. */
#ifndef DUALPATH_TRANSFER_PARTS_H
#define DUALPATH_TRANSFER_PARTS_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>

/* copy.c: see table_copy.py. */
PyObject *dualpath_copy_parts(PyObject *module, PyObject *args);

/* table.c: see table_extent.py. */
PyObject *dualpath_extent_of(PyObject *module, PyObject *args);
/* Whether a buffer is that of `count` aligned numbers of 64 bits; raises ValueError. */
int dualpath_numbers(const Py_buffer *buffer, Py_ssize_t count);

/* rows.c: see write_requests.py. */
PyObject *dualpath_rows_of(PyObject *module, PyObject *args);

#endif
