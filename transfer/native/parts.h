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

#endif
