/* KeyIndex: from a block's key to its row, by open addressing (kvstore/key_index.py has the
 * contract and the twin).
 *
 * A slot is 8 bytes: 32 bits of a seeded hash of the key, and the row. The keys themselves stay in
 * the columns of the block table, which `bind` lends; so a key costs 10 to 20 bytes here. The
 * upper bits of the hash are the place in the table, hence growing needs no key and keeps the
 * order; it goes on a few slots a change, beside the old table, so that no change takes long.
 * The hash has a secret seed: nobody can choose keys that collide. */
#include "parts.h"
#include "siphash.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HASH_BYTES_MAX 32
#define BITS_MIN 10
#define BITS_MAX 32
#define MOVED UINT32_MAX
#define MOVED_AT_ONCE 32
#define AHEAD 16
#define ROWS_MAX ((Py_ssize_t)INT32_MAX)

typedef struct {
    uint32_t tag;
    uint32_t row; /* row + 1; 0 is an empty slot, MOVED one whose key has left */
} Slot;

typedef struct {
    Slot *slots;
    int bits;
} Table;

typedef struct {
    PyObject_HEAD
    uint64_t seed[2];
    Table now;
    Table old; /* while growing: what is not in `now` yet */
    size_t moved;
    Py_ssize_t count;
    Py_buffer namespaces, hashes, lengths, parents;
    Py_ssize_t rows;
} KeyIndex;

typedef struct {
    int32_t namespace;
    uint8_t length;
    const uint8_t *bytes;
} Key;

static uint32_t tag_of(const KeyIndex *self, const Key *key) {
    /* The first word has the length, so zeros behind a hash cannot be taken for its end. */
    uint64_t words[1 + HASH_BYTES_MAX / 8] = {0};
    words[0] = (uint64_t)(uint32_t)key->namespace | (uint64_t)key->length << 32;
    memcpy(words + 1, key->bytes, key->length);
    return (uint32_t)(siphash(self->seed, words, 1 + (key->length + 7) / 8) >> 32);
}

/* --- table --------------------------------------------------------------------------------- */

static size_t size_of(const Table *table) { return (size_t)1 << table->bits; }

static size_t home_of(const Table *table, uint32_t tag) {
    return (size_t)((uint64_t)tag >> (32 - table->bits));
}

static Key key_of(const KeyIndex *self, Py_ssize_t row) {
    Key key = {
        ((const int32_t *)self->namespaces.buf)[row],
        ((const uint8_t *)self->lengths.buf)[row],
        (const uint8_t *)self->hashes.buf + row * HASH_BYTES_MAX,
    };
    return key;
}

static int same(const KeyIndex *self, Py_ssize_t row, const Key *key) {
    Key other = key_of(self, row);
    return other.namespace == key->namespace && other.length == key->length &&
           memcmp(other.bytes, key->bytes, key->length) == 0;
}

static void insert(Table *table, Slot slot) {
    size_t mask = size_of(table) - 1, at = home_of(table, slot.tag);
    while (table->slots[at].row != 0) {
        at = (at + 1) & mask;
    }
    table->slots[at] = slot;
}

static void move_some(KeyIndex *self, size_t most) {
    if (self->old.slots == NULL) {
        return;
    }
    size_t size = size_of(&self->old);
    size_t end = most < size - self->moved ? self->moved + most : size;
    for (; self->moved < end; self->moved++) {
        Slot *slot = &self->old.slots[self->moved];
        if (slot->row != 0 && slot->row != MOVED) {
            insert(&self->now, *slot);
            slot->row = MOVED;
        }
    }
    if (self->moved == size) {
        free(self->old.slots);
        self->old.slots = NULL;
    }
}

static int make_room(KeyIndex *self, Py_ssize_t more) {
    move_some(self, MOVED_AT_ONCE);
    while ((uint64_t)(self->count + more) * 16 > (uint64_t)size_of(&self->now) * 13) {
        move_some(self, SIZE_MAX);
        if (self->now.bits == BITS_MAX) {
            PyErr_SetString(PyExc_OverflowError, "the key index is full");
            return -1;
        }
        Table wider = {calloc(size_of(&self->now) * 2, sizeof(Slot)), self->now.bits + 1};
        if (wider.slots == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        self->old = self->now;
        self->now = wider;
        self->moved = 0;
    }
    return 0;
}

/* The slot of a key, or of a row if `key` is only where its hash comes from; NULL if absent. */
static Slot *find_in(const KeyIndex *self, const Table *table, uint32_t tag, const Key *key,
                     Py_ssize_t row) {
    if (table->slots == NULL) {
        return NULL;
    }
    size_t mask = size_of(table) - 1;
    size_t at = home_of(table, tag);
    for (size_t probes = 0; probes <= mask; probes++, at = (at + 1) & mask) {
        Slot *slot = &table->slots[at];
        if (slot->row == 0) {
            return NULL;
        }
        if (slot->tag != tag || slot->row == MOVED) {
            continue;
        }
        if (row >= 0 ? slot->row == (uint32_t)row + 1 : same(self, (Py_ssize_t)slot->row - 1, key)) {
            return slot;
        }
    }
    return NULL;
}

static Py_ssize_t find(const KeyIndex *self, const Key *key) {
    uint32_t tag = tag_of(self, key);
    const Slot *slot = find_in(self, &self->now, tag, key, -1);
    if (slot == NULL) {
        slot = find_in(self, &self->old, tag, key, -1);
    }
    return slot == NULL ? -1 : (Py_ssize_t)slot->row - 1;
}

/* Have the slots of a key on their way when it is their turn: in bulk, the misses overlap. */
static void prefetch(const KeyIndex *self, const Key *key) {
    if (key->length <= HASH_BYTES_MAX) {
        __builtin_prefetch(&self->now.slots[home_of(&self->now, tag_of(self, key))], 1);
    }
}

static void prefetch_row(const KeyIndex *self, Py_ssize_t row, Py_ssize_t end) {
    if (row < end) {
        Key key = key_of(self, row);
        prefetch(self, &key);
    }
}

static int put_row(KeyIndex *self, Py_ssize_t row) {
    Key key = key_of(self, row);
    if (key.length > HASH_BYTES_MAX) {
        PyErr_Format(PyExc_ValueError, "row %zd: a hash of %d bytes", row, (int)key.length);
        return -1;
    }
    Py_ssize_t known = find(self, &key);
    if (known >= 0) {
        PyErr_Format(PyExc_KeyError, "row %zd has the key of row %zd", row, known);
        return -1;
    }
    if (make_room(self, 1) < 0) {
        return -1;
    }
    Slot slot = {tag_of(self, &key), (uint32_t)row + 1};
    insert(&self->now, slot);
    self->count++;
    return 0;
}

/* Close the gap at `slot`, so that no later key of its run is lost. */
static void close_gap(Table *table, Slot *slot) {
    size_t mask = size_of(table) - 1, gap = (size_t)(slot - table->slots);
    for (size_t at = (gap + 1) & mask; table->slots[at].row != 0; at = (at + 1) & mask) {
        size_t home = home_of(table, table->slots[at].tag);
        if (((at - home) & mask) >= ((at - gap) & mask)) {
            table->slots[gap] = table->slots[at];
            gap = at;
        }
    }
    table->slots[gap].row = 0;
}

/* --- methods ------------------------------------------------------------------------------- */

static int check_row(const KeyIndex *self, Py_ssize_t row) {
    if (row < 0 || row >= self->rows) {
        PyErr_Format(PyExc_IndexError, "row %zd is outside of 0..%zd", row, self->rows - 1);
        return -1;
    }
    return 0;
}

static PyObject *key_index_put(KeyIndex *self, PyObject *arg) {
    Py_ssize_t row = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if ((row == -1 && PyErr_Occurred()) || check_row(self, row) < 0 || put_row(self, row) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_put_first(KeyIndex *self, PyObject *arg) {
    Py_ssize_t count = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if (count == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (count < 0 || count > self->rows || self->count != 0) {
        PyErr_Format(PyExc_ValueError, "%zd rows of %zd into an index of %zd", count, self->rows,
                     self->count);
        return NULL;
    }
    if (make_room(self, count) < 0) {
        return NULL;
    }
    move_some(self, SIZE_MAX);
    for (Py_ssize_t row = 0; row < count; row++) {
        prefetch_row(self, row + AHEAD, count);
        if (put_row(self, row) < 0) {
            return NULL;
        }
    }
    Py_RETURN_NONE;
}

static PyObject *key_index_remove(KeyIndex *self, PyObject *arg) {
    Py_ssize_t row = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if ((row == -1 && PyErr_Occurred()) || check_row(self, row) < 0) {
        return NULL;
    }
    move_some(self, MOVED_AT_ONCE);
    Key key = key_of(self, row);
    uint32_t tag = key.length > HASH_BYTES_MAX ? 0 : tag_of(self, &key);
    Slot *slot = find_in(self, &self->now, tag, &key, row);
    if (slot != NULL) {
        close_gap(&self->now, slot);
    } else if ((slot = find_in(self, &self->old, tag, &key, row)) != NULL) {
        slot->row = MOVED;
    } else {
        PyErr_Format(PyExc_KeyError, "row %zd is not in the index", row);
        return NULL;
    }
    self->count--;
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
        row = find(self, &key);
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
    int good = count <= self->rows && hashes.len == count * HASH_BYTES_MAX &&
               out.len == count * (Py_ssize_t)sizeof(int32_t);
    const int32_t *namespaces = self->namespaces.buf;
    for (Py_ssize_t row = 0; good && row < count; row++) {
        Py_ssize_t next = row + AHEAD < count ? row + AHEAD : row;
        Key ahead = other_key(namespaces, &lengths, &hashes, next);
        prefetch(self, &ahead);
        Key key = other_key(namespaces, &lengths, &hashes, row);
        good = key.length <= HASH_BYTES_MAX;
        ((int32_t *)out.buf)[row] = good ? (int32_t)find(self, &key) : -1;
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

/* Keys [0, n): the deepest that is present, by galloping, as presence is prefix-closed. */
static Py_ssize_t deepest(const KeyIndex *self, Key *key, const uint8_t *keys, Py_ssize_t n,
                          Py_ssize_t *row) {
    Py_ssize_t low = -1, high = n, step = 0;
    for (Py_ssize_t at = n - 1; low + 1 < high;) {
        key->bytes = keys + at * key->length;
        Py_ssize_t found = find(self, key);
        if (found >= 0) {
            low = at;
            *row = found;
        } else {
            high = at;
        }
        /* The last one was first, since most prefixes are whole; then 0, 1, 3, 7, ... until one
         * is absent; then halves of what is left. */
        if (step < high && step > low) {
            at = step;
            step = 2 * step + 1;
        } else {
            at = low + (high - low) / 2;
        }
    }
    return low;
}

/* Rows of keys [0, last] by walking up from the last one; 0 if they are not one chain. */
static int walk_up(const KeyIndex *self, Key *key, const uint8_t *keys, Py_ssize_t last,
                   Py_ssize_t row, int32_t *out) {
    const int32_t *parents = self->parents.buf;
    for (Py_ssize_t at = last;; at--) {
        key->bytes = keys + at * key->length;
        if (row < 0 || row >= self->rows || !same(self, row, key)) {
            return 0;
        }
        out[at] = (int32_t)row;
        if (at == 0) {
            return 1;
        }
        row = parents[row];
    }
}

static Py_ssize_t walk_down(const KeyIndex *self, Key *key, const uint8_t *keys, Py_ssize_t n,
                            int32_t *out) {
    const int32_t *parents = self->parents.buf;
    for (Py_ssize_t at = 0; at < n; at++) {
        key->bytes = keys + at * key->length;
        Py_ssize_t row = find(self, key);
        if (row < 0 || (at > 0 && parents[row] != out[at - 1])) {
            return at;
        }
        out[at] = (int32_t)row;
    }
    return n;
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
        Py_ssize_t n = keys.len / length, row = -1;
        Key key = {namespace, (uint8_t)length, keys.buf};
        found = deepest(self, &key, keys.buf, n, &row) + 1;
        if (found > 0 && !walk_up(self, &key, keys.buf, found - 1, row, out.buf)) {
            /* Keys of several chains, or of none: one by one. */
            found = walk_down(self, &key, keys.buf, n, out.buf);
        }
    }
    PyBuffer_Release(&keys);
    PyBuffer_Release(&out);
    if (found < 0) {
        PyErr_SetString(PyExc_ValueError, "keys, their size and out do not fit each other");
        return NULL;
    }
    return PyLong_FromSsize_t(found);
}

static void release_columns(KeyIndex *self) {
    PyBuffer_Release(&self->namespaces);
    PyBuffer_Release(&self->hashes);
    PyBuffer_Release(&self->lengths);
    PyBuffer_Release(&self->parents);
}

static PyObject *key_index_bind(KeyIndex *self, PyObject *args) {
    Py_buffer namespaces, hashes, lengths, parents;
    if (!PyArg_ParseTuple(args, "y*y*y*y*", &namespaces, &hashes, &lengths, &parents)) {
        return NULL;
    }
    Py_ssize_t rows = lengths.len;
    int good = rows >= self->rows && rows <= ROWS_MAX &&
               namespaces.len == rows * (Py_ssize_t)sizeof(int32_t) &&
               parents.len == rows * (Py_ssize_t)sizeof(int32_t) &&
               hashes.len == rows * HASH_BYTES_MAX;
    if (!good) {
        PyBuffer_Release(&namespaces);
        PyBuffer_Release(&hashes);
        PyBuffer_Release(&lengths);
        PyBuffer_Release(&parents);
        PyErr_SetString(PyExc_ValueError, "the columns have not the same rows, or fewer than before");
        return NULL;
    }
    release_columns(self);
    self->namespaces = namespaces;
    self->hashes = hashes;
    self->lengths = lengths;
    self->parents = parents;
    self->rows = rows;
    Py_RETURN_NONE;
}

static PyObject *key_index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    Py_buffer seed;
    if (!PyArg_ParseTuple(args, "y*", &seed)) {
        return NULL;
    }
    if (seed.len != sizeof(((KeyIndex *)0)->seed)) {
        PyBuffer_Release(&seed);
        PyErr_SetString(PyExc_ValueError, "the seed has 16 bytes");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    KeyIndex *self = (KeyIndex *)alloc(type, 0);
    if (self != NULL) {
        memcpy(self->seed, seed.buf, sizeof(self->seed));
        self->now.bits = BITS_MIN;
        self->now.slots = calloc(size_of(&self->now), sizeof(Slot));
        if (self->now.slots == NULL) {
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
    release_columns(self);
    free(self->now.slots);
    free(self->old.slots);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static Py_ssize_t key_index_len(KeyIndex *self) { return self->count; }

static PyObject *key_index_nbytes(KeyIndex *self, void *closure) {
    size_t slots = size_of(&self->now) + (self->old.slots == NULL ? 0 : size_of(&self->old));
    return PyLong_FromSize_t(slots * sizeof(Slot));
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
