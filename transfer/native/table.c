/* What a table of slices covers, computed with one call:
 * transfer/dualpath/transfer/table_extent.py. Python twin: table_extent_twin.py. */
#include "parts.h"

typedef struct {
    uint64_t stride, count, length;
    const uint64_t *bases, *skips, *sizes;
    Py_ssize_t parts;
} Table;

typedef struct {
    uint64_t nbytes, least, most, start, end;
    int touched;
} Extent;

/* Where byte `skip` of a part's slices lies; 0 if that has more than 64 bits. */
static int place_of(const Table *table, uint64_t base, uint64_t skip, uint64_t *at) {
    uint64_t before;
    if (table->count <= 1 || table->stride == table->length) {
        return !__builtin_add_overflow(base, skip, at);
    }
    return !__builtin_mul_overflow(skip / table->length, table->stride, &before) &&
           !__builtin_add_overflow(before, skip % table->length, at) &&
           !__builtin_add_overflow(base, *at, at);
}

static int add_part(const Table *table, Py_ssize_t part, uint64_t whole, Extent *extent) {
    uint64_t size = table->sizes[part], skip = table->skips[part], first, last;
    if (skip > whole || size > whole - skip) {
        PyErr_Format(
            PyExc_ValueError, "part %zd reaches beyond its %llu slices of %llu bytes each", part,
            (unsigned long long)table->count, (unsigned long long)table->length);
        return 0;
    }
    extent->least = size < extent->least ? size : extent->least;
    extent->most = size > extent->most ? size : extent->most;
    int fits = !__builtin_add_overflow(extent->nbytes, size, &extent->nbytes);
    if (size > 0 && fits) {
        fits = place_of(table, table->bases[part], skip, &first) &&
               place_of(table, table->bases[part], skip + size - 1, &last) && last < UINT64_MAX;
        if (fits) {
            extent->start = first < extent->start ? first : extent->start;
            extent->end = last >= extent->end ? last + 1 : extent->end;
            extent->touched = 1;
        }
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "part %zd reaches beyond 64 bits", part);
    }
    return fits;
}

static PyObject *extent_of(const Table *table) {
    Extent extent = {0, UINT64_MAX, 0, UINT64_MAX, 0, 0};
    uint64_t whole;
    if (__builtin_mul_overflow(table->count, table->length, &whole)) {
        whole = UINT64_MAX;
    }
    if (table->count > 1 && table->stride < table->length) {
        return PyErr_Format(
            PyExc_ValueError, "slices overlap: stride %llu is less than length %llu",
            (unsigned long long)table->stride, (unsigned long long)table->length);
    }
    for (Py_ssize_t i = 0; i < table->parts; i++) {
        if (!add_part(table, i, whole, &extent)) {
            return NULL;
        }
    }
    if (!extent.touched) {
        extent.start = extent.end = table->bases[0];
    }
    return Py_BuildValue(
        "KKKKK", (unsigned long long)extent.nbytes, (unsigned long long)extent.least,
        (unsigned long long)extent.most, (unsigned long long)extent.start,
        (unsigned long long)extent.end);
}

int dualpath_numbers(const Py_buffer *buffer, Py_ssize_t count) {
    if (buffer->len == count * (Py_ssize_t)sizeof(uint64_t) &&
        (uintptr_t)buffer->buf % sizeof(uint64_t) == 0) {
        return 1;
    }
    PyErr_SetString(PyExc_ValueError, "bases, skips and sizes must be as many, of 64 bits each");
    return 0;
}

PyObject *dualpath_extent_of(PyObject *module, PyObject *args) {
    Table table;
    Py_buffer bases, skips, sizes;
    PyObject *shape[3], *answer = NULL;
    if (!PyArg_ParseTuple(
            args, "OOOy*y*y*:extent_of", &shape[0], &shape[1], &shape[2], &bases, &skips, &sizes)) {
        return NULL;
    }
    uint64_t *into[3] = {&table.stride, &table.count, &table.length};
    int right = 1;
    for (int i = 0; right && i < 3; i++) {
        *into[i] = PyLong_AsUnsignedLongLong(shape[i]);
        right = !(*into[i] == UINT64_MAX && PyErr_Occurred());
    }
    table.parts = sizes.len / (Py_ssize_t)sizeof(uint64_t);
    if (right && table.parts < 1) {
        PyErr_SetString(PyExc_ValueError, "a table has at least one part");
    } else if (
        right && dualpath_numbers(&bases, table.parts) && dualpath_numbers(&skips, table.parts) &&
        dualpath_numbers(&sizes, table.parts)) {
        table.bases = bases.buf;
        table.skips = skips.buf;
        table.sizes = sizes.buf;
        answer = extent_of(&table);
    }
    PyBuffer_Release(&bases);
    PyBuffer_Release(&skips);
    PyBuffer_Release(&sizes);
    return answer;
}
