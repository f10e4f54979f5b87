/* What a look-up answers of its rows, gathered from the table's columns in one go:
 * kvstore/row_gather.py. Rows lie anywhere: each pass asks for the memory of the next. */
#include "parts.h"

#include <string.h>

enum { ROWS, LEASES, RESIDENT, CHECKSUM_ROWS, VALUES, TIERS, SUMS, BUFFERS };

static const struct {
    const char *name;
    size_t item;
    int flags;
} FORMS[BUFFERS] = {
    {"rows", 4, PyBUF_SIMPLE},          {"leases", 4, PyBUF_WRITABLE}, {"resident", 1, PyBUF_SIMPLE},
    {"checksum_rows", 4, PyBUF_SIMPLE}, {"values", 8, PyBUF_SIMPLE},   {"tiers", 1, PyBUF_WRITABLE},
    {"sums", 8, PyBUF_WRITABLE},
};

static int taken(Py_buffer *held, PyObject *const *objects) {
    for (int i = 0; i < BUFFERS; i++) {
        if (PyObject_GetBuffer(objects[i], &held[i], FORMS[i].flags) < 0) {
            return 0;
        }
        if ((uintptr_t)held[i].buf % FORMS[i].item || (size_t)held[i].len % FORMS[i].item) {
            PyErr_Format(PyExc_ValueError, "%s: not whole, aligned items", FORMS[i].name);
            return 0;
        }
    }
    return 1;
}

/* Returns how many rows are resident, -1 with an exception set. Changes nothing if it fails. */
static Py_ssize_t gathered(Py_buffer *held, size_t chunks, int lease) {
    const int32_t *rows = held[ROWS].buf, *checksum_rows = held[CHECKSUM_ROWS].buf;
    const unsigned char *resident = held[RESIDENT].buf;
    const uint64_t *values = held[VALUES].buf;
    int32_t *leases = held[LEASES].buf;
    unsigned char *tiers = held[TIERS].buf;
    uint64_t *sums = held[SUMS].buf;
    size_t count = (size_t)held[ROWS].len / 4, known = (size_t)held[RESIDENT].len;
    size_t stored = (size_t)held[VALUES].len / 8 / chunks;
    if ((size_t)held[LEASES].len / 4 < known || (size_t)held[CHECKSUM_ROWS].len / 4 < known ||
        (size_t)held[TIERS].len != count || (size_t)held[SUMS].len / 8 != count * chunks) {
        PyErr_SetString(PyExc_ValueError, "columns or answers have other lengths than the rows");
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        if (rows[i] < 0 || (size_t)rows[i] >= known) {
            PyErr_Format(PyExc_ValueError, "row %d is outside of the table", (int)rows[i]);
            return -1;
        }
        SOON(checksum_rows + rows[i]);
        SOON(leases + rows[i]);
        SOON(resident + rows[i]);
    }
    for (size_t i = 0; i < count; i++) {
        int32_t at = checksum_rows[rows[i]];
        if (at < 0 || (size_t)at >= stored) {
            PyErr_Format(PyExc_ValueError, "row %d has no checksums", (int)rows[i]);
            return -1;
        }
        SOON(values + (size_t)at * chunks);
    }
    Py_ssize_t found = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t row = rows[i];
        leases[row] += lease;
        found += resident[row] != 0;
        tiers[i] = resident[row] == 0;
        memcpy(sums + i * chunks, values + (size_t)checksum_rows[row] * chunks, chunks * 8);
    }
    return found;
}

static PyObject *gather_rows(PyObject *module, PyObject *args) {
    PyObject *objects[BUFFERS];
    Py_buffer held[BUFFERS];
    Py_ssize_t chunks, found = -1;
    int lease;
    memset(held, 0, sizeof held);
    if (!PyArg_ParseTuple(
            args, "OOOOOOOnp:gather_rows", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4],
            &objects[5], &objects[6], &chunks, &lease)) {
        return NULL;
    }
    if (chunks < 1 || chunks > 4096) {
        return PyErr_Format(PyExc_ValueError, "%zd chunks", chunks);
    }
    if (taken(held, objects)) {
        found = gathered(held, (size_t)chunks, lease);
    }
    for (int i = 0; i < BUFFERS; i++) {
        if (held[i].obj != NULL) {
            PyBuffer_Release(&held[i]);
        }
    }
    return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

static PyMethodDef methods[] = {
    {"gather_rows", gather_rows, METH_VARARGS,
     "gather_rows(rows, leases, resident, checksum_rows, values, tiers, sums, chunks, lease)"},
    {NULL, NULL, 0, NULL},
};

int dualpath_add_row_gather(PyObject *module) { return PyModule_AddFunctions(module, methods); }
