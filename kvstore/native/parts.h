/* What the source files of the extension module share. Each part adds its types and functions to
 * the module. Native code here does syscalls, copies and probes of packed arrays, with the GIL
 * released; it decides nothing and calls nobody back. Every part has a twin in Python. */
#ifndef DUALPATH_PARTS_H
#define DUALPATH_PARTS_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Have the memory at an address on its way, for reading. */
#if defined(__GNUC__) || defined(__clang__)
#define SOON(address) __builtin_prefetch(address)
#else
#define SOON(address) ((void)(address))
#endif

/* Return 0, or -1 with an exception set. */
int dualpath_add_block_copy(PyObject *module);
int dualpath_add_checksum(PyObject *module);
int dualpath_add_key_index(PyObject *module);
int dualpath_add_pages(PyObject *module);
int dualpath_add_ring(PyObject *module);
int dualpath_add_row_gather(PyObject *module);

#endif
