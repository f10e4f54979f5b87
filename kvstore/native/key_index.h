/* The native key index: its data, and what its parts offer each other. See key_index.c. */
#ifndef DUALPATH_KEY_INDEX_H
#define DUALPATH_KEY_INDEX_H

#include "parts.h"

#include <stdint.h>
#include <string.h>

#define HASH_BYTES_MAX 32
#define SOON_MAX 4

typedef struct {
    uint32_t tag;
    uint32_t row; /* row + 1; 0 is an empty slot, MOVED one whose key has left */
} Slot;

typedef struct {
    Slot *slots;
    int bits;
} Table;

typedef struct {
    uint64_t seed[2];
    Table now;
    Table old; /* while growing: what is not in `now` yet */
    size_t moved;
    Py_ssize_t count;
    Py_buffer namespaces, hashes, lengths, parents;
    Py_buffer soon[SOON_MAX]; /* columns that whoever finds a row looks at next */
    Py_ssize_t soon_bytes[SOON_MAX]; /* of one row; 0: there is none */
    Py_ssize_t rows;
} Keys;

typedef struct {
    int32_t namespace;
    uint8_t length;
    const uint8_t *bytes;
} Key;

static inline Key key_of(const Keys *self, Py_ssize_t row) {
    Key key = {
        ((const int32_t *)self->namespaces.buf)[row],
        ((const uint8_t *)self->lengths.buf)[row],
        (const uint8_t *)self->hashes.buf + row * HASH_BYTES_MAX,
    };
    return key;
}

static inline int same(const Keys *self, Py_ssize_t row, const Key *key) {
    Key other = key_of(self, row);
    return other.namespace == key->namespace && other.length == key->length &&
           memcmp(other.bytes, key->bytes, key->length) == 0;
}

/* key_table.c. Functions that can fail return -1 with an exception set. */
size_t keys_nbytes(const Keys *self);
int keys_start(Keys *self);
void keys_free(Keys *self);
void keys_settle(Keys *self);
int keys_make_room(Keys *self, Py_ssize_t more);
void keys_prefetch(const Keys *self, const Key *key);
Py_ssize_t keys_find(const Keys *self, const Key *key);
int keys_put(Keys *self, Py_ssize_t row);
int keys_remove(Keys *self, Py_ssize_t row);

/* key_prefix.c: how many of the `n` keys, packed at `keys`, are a prefix; their rows to `out`. */
Py_ssize_t keys_prefix(const Keys *self, Key key, const uint8_t *keys, Py_ssize_t n, int32_t *out);

#endif
