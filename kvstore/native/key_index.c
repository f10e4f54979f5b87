/* KeyIndex: from a block's key to its row, by open addressing (kvstore/key_index.py has the
 * contract and the twin).
 *
 * The keys themselves stay in the columns of the block table, which `bind` lends; so a key costs
 * 10 to 20 bytes, in the table of key_table.c. This file is what Python sees. */
#include "key_index.h"

#define AHEAD 16
#define ROWS_MAX ((Py_ssize_t)INT32_MAX)

typedef struct {
    PyObject_HEAD
    Keys keys;
} KeyIndex;

static void prefetch_row(const KeyIndex *self, Py_ssize_t row, Py_ssize_t end) {
    if (row < end) {
        Key key = key_of(&self->keys, row);
        keys_prefetch(&self->keys, &key);
    }
}

static int check_row(const KeyIndex *self, Py_ssize_t row) {
    if (row < 0 || row >= self->keys.rows) {
        PyErr_Format(PyExc_IndexError, "row %zd is outside of 0..%zd", row, self->keys.rows - 1);
        return -1;
    }
    return 0;
}

static PyObject *key_index_put(KeyIndex *self, PyObject *arg) {
    Py_ssize_t row = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if ((row == -1 && PyErr_Occurred()) || check_row(self, row) < 0 ||
        keys_put(&self->keys, row) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_put_first(KeyIndex *self, PyObject *arg) {
    Py_ssize_t count = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if (count == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (count < 0 || count > self->keys.rows || self->keys.count != 0) {
        PyErr_Format(PyExc_ValueError, "%zd rows of %zd into an index of %zd", count,
                     self->keys.rows, self->keys.count);
        return NULL;
    }
    if (keys_make_room(&self->keys, count) < 0) {
        return NULL;
    }
    keys_settle(&self->keys);
    for (Py_ssize_t row = 0; row < count; row++) {
        prefetch_row(self, row + AHEAD, count);
        if (keys_put(&self->keys, row) < 0) {
            return NULL;
        }
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_remove(KeyIndex *self, PyObject *arg) {
    Py_ssize_t row = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if ((row == -1 && PyErr_Occurred()) || check_row(self, row) < 0 ||
        keys_remove(&self->keys, row) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_get(KeyIndex *self, PyObject *args) {
    int namespace;
    Py_buffer bytes;
    if (!PyArg_ParseTuple(args, "iy*", &namespace, &bytes)) {
        return NULL;
    }
    Py_ssize_t row = -1;
    if (bytes.len <= HASH_BYTES_MAX) {
        Key key = {namespace, (uint8_t)bytes.len, bytes.buf};
        row = keys_find(&self->keys, &key);
    }
    PyBuffer_Release(&bytes);
    return PyLong_FromSsize_t(row);
}

static Key other_key(const int32_t *namespaces, const Py_buffer *lengths,
                     const Py_buffer *hashes, Py_ssize_t row) {
    Key key = {
        namespaces[row],
        ((const uint8_t *)lengths->buf)[row],
        (const uint8_t *)hashes->buf + row * HASH_BYTES_MAX,
    };
    return key;
}

static PyObject *key_index_find_parents(KeyIndex *self, PyObject *args) {
    Py_buffer hashes, lengths, out;
    if (!PyArg_ParseTuple(args, "y*y*w*", &hashes, &lengths, &out)) {
        return NULL;
    }
    Py_ssize_t count = lengths.len;
    int good = count <= self->keys.rows && hashes.len == count * HASH_BYTES_MAX &&
               out.len == count * (Py_ssize_t)sizeof(int32_t);
    const int32_t *namespaces = self->keys.namespaces.buf;
    for (Py_ssize_t row = 0; good && row < count; row++) {
        Py_ssize_t next = row + AHEAD < count ? row + AHEAD : row;
        Key ahead = other_key(namespaces, &lengths, &hashes, next);
        keys_prefetch(&self->keys, &ahead);
        Key key = other_key(namespaces, &lengths, &hashes, row);
        good = key.length <= HASH_BYTES_MAX;
        ((int32_t *)out.buf)[row] = good ? (int32_t)keys_find(&self->keys, &key) : -1;
    }
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&out);
    if (!good) {
        PyErr_SetString(PyExc_ValueError, "hashes, lengths and out are not of the same rows");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_prefix(KeyIndex *self, PyObject *args) {
    int namespace, length;
    Py_buffer keys, out;
    if (!PyArg_ParseTuple(args, "iy*iw*", &namespace, &keys, &length, &out)) {
        return NULL;
    }
    Py_ssize_t found = -1;
    if (length >= 1 && length <= HASH_BYTES_MAX && keys.len % length == 0 &&
        out.len / (Py_ssize_t)sizeof(int32_t) >= keys.len / length) {
        Key key = {namespace, (uint8_t)length, keys.buf};
        found = keys_prefix(&self->keys, key, keys.buf, keys.len / length, out.buf);
    }
    PyBuffer_Release(&keys);
    PyBuffer_Release(&out);
    if (found < 0) {
        PyErr_SetString(PyExc_ValueError, "keys, their size and out do not fit each other");
        return NULL;
    }
    return PyLong_FromSsize_t(found);
}

static void release_columns(Keys *keys) {
    PyBuffer_Release(&keys->namespaces);
    PyBuffer_Release(&keys->hashes);
    PyBuffer_Release(&keys->lengths);
    PyBuffer_Release(&keys->parents);
    for (int i = 0; i < SOON_MAX; i++) {
        PyBuffer_Release(&keys->soon[i]);
        keys->soon_bytes[i] = 0;
    }
}

/* Whether all columns have the same rows; told in `fresh`. */
static int of_one_table(Keys *fresh, Py_ssize_t least) {
    Py_ssize_t rows = fresh->lengths.len;
    int good = rows >= least && rows <= ROWS_MAX &&
               fresh->namespaces.len == rows * (Py_ssize_t)sizeof(int32_t) &&
               fresh->parents.len == rows * (Py_ssize_t)sizeof(int32_t) &&
               fresh->hashes.len == rows * HASH_BYTES_MAX;
    for (int i = 0; i < SOON_MAX && fresh->soon[i].obj != NULL; i++) {
        good = good && rows > 0 && fresh->soon[i].len > 0 && fresh->soon[i].len % rows == 0;
        fresh->soon_bytes[i] = good ? fresh->soon[i].len / rows : 0;
    }
    fresh->rows = rows;
    return good;
}

static PyObject *key_index_bind(KeyIndex *self, PyObject *args) {
    PyObject *soon[SOON_MAX] = {NULL};
    Keys fresh;
    memset(&fresh, 0, sizeof fresh);
    if (!PyArg_ParseTuple(args, "y*y*y*y*|OOOO", &fresh.namespaces, &fresh.hashes, &fresh.lengths,
                          &fresh.parents, &soon[0], &soon[1], &soon[2], &soon[3])) {
        return NULL;
    }
    for (int i = 0; i < SOON_MAX && soon[i] != NULL; i++) {
        if (PyObject_GetBuffer(soon[i], &fresh.soon[i], PyBUF_SIMPLE) < 0) {
            release_columns(&fresh);
            return NULL;
        }
    }
    if (!of_one_table(&fresh, self->keys.rows)) {
        release_columns(&fresh);
        PyErr_SetString(PyExc_ValueError, "the columns have not the same rows, or fewer than before");
        return NULL;
    }
    release_columns(&self->keys);
    self->keys.namespaces = fresh.namespaces;
    self->keys.hashes = fresh.hashes;
    self->keys.lengths = fresh.lengths;
    self->keys.parents = fresh.parents;
    memcpy(self->keys.soon, fresh.soon, sizeof fresh.soon);
    memcpy(self->keys.soon_bytes, fresh.soon_bytes, sizeof fresh.soon_bytes);
    self->keys.rows = fresh.rows;
    Py_RETURN_NONE;
}

static PyObject *key_index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    Py_buffer seed;
    if (!PyArg_ParseTuple(args, "y*", &seed)) {
        return NULL;
    }
    if (seed.len != sizeof(((Keys *)0)->seed)) {
        PyBuffer_Release(&seed);
        PyErr_SetString(PyExc_ValueError, "the seed has 16 bytes");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    KeyIndex *self = (KeyIndex *)alloc(type, 0);
    if (self != NULL) {
        memcpy(self->keys.seed, seed.buf, sizeof(self->keys.seed));
        if (keys_start(&self->keys) < 0) {
            Py_DECREF(self);
            self = NULL;
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&seed);
    return (PyObject *)self;
}

static void key_index_dealloc(KeyIndex *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    release_columns(&self->keys);
    keys_free(&self->keys);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Py_ssize_t key_index_len(KeyIndex *self) { return self->keys.count; }

static PyObject *key_index_nbytes(KeyIndex *self, void *closure) {
    return PyLong_FromSize_t(keys_nbytes(&self->keys));
}

static PyMethodDef methods[] = {
    {"bind", (PyCFunction)key_index_bind, METH_VARARGS, NULL},
    {"put", (PyCFunction)key_index_put, METH_O, NULL},
    {"put_first", (PyCFunction)key_index_put_first, METH_O, NULL},
    {"remove", (PyCFunction)key_index_remove, METH_O, NULL},
    {"get", (PyCFunction)key_index_get, METH_VARARGS, NULL},
    {"find_parents", (PyCFunction)key_index_find_parents, METH_VARARGS, NULL},
    {"prefix", (PyCFunction)key_index_prefix, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"nbytes", (getter)key_index_nbytes, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, (void *)"See dualpath.kvstore.key_index."},
    {Py_tp_new, key_index_new},
    {Py_tp_dealloc, key_index_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {Py_sq_length, key_index_len},
    {0, NULL},
};

static PyType_Spec type_spec = {
    "dualpath.kvstore._native.KeyIndex", sizeof(KeyIndex), 0, Py_TPFLAGS_DEFAULT, type_slots,
};

int dualpath_add_key_index(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &type_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int added = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return added;
}
