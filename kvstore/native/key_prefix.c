/* Prefixes of chains in the key index: one probe finds the end, parents lead to the begin.
 *
 * What a step up needs was rarely looked at before: the memory of the rows ahead is asked for while
 * this one is compared. Where those are is a guess: blocks of a chain that were stored together
 * have rows that follow each other. */
#include "key_index.h"

#define AHEAD 16
#define RUN_MIN 4

/* Keys [0, n): the deepest that is present, by galloping, as presence is prefix-closed. */
static Py_ssize_t deepest(const Keys *self, Key *key, const uint8_t *keys, Py_ssize_t n,
                          Py_ssize_t *row) {
    Py_ssize_t low = -1, high = n, step = 0;
    for (Py_ssize_t at = n - 1; low + 1 < high;) {
        key->bytes = keys + at * key->length;
        Py_ssize_t found = keys_find(self, key);
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

/* Have what is looked at of a row on its way; of narrow columns once for the rows of a line. */
static void row_soon(const Keys *self, Py_ssize_t row, int narrow) {
    SOON((const uint8_t *)self->hashes.buf + row * HASH_BYTES_MAX);
    if (narrow) {
        SOON((const int32_t *)self->parents.buf + row);
        SOON((const int32_t *)self->namespaces.buf + row);
        SOON((const uint8_t *)self->lengths.buf + row);
        for (int i = 0; i < SOON_MAX && self->soon_bytes[i] != 0; i++) {
            SOON((const uint8_t *)self->soon[i].buf + row * self->soon_bytes[i]);
        }
    }
}

static void run_soon(const Keys *self, Py_ssize_t row) {
    for (Py_ssize_t i = 0; i <= AHEAD && row - i >= 0 && row < self->rows; i += 2) {
        row_soon(self, row - i, i % AHEAD == 0);
    }
}

/* Rows of keys [0, last] by walking up from the last one; 0 if they are not one chain. */
static int walk_up(const Keys *self, Key *key, const uint8_t *keys, Py_ssize_t last,
                   Py_ssize_t row, int32_t *out) {
    const int32_t *parents = self->parents.buf;
    Py_ssize_t run = RUN_MIN;
    run_soon(self, row);
    for (Py_ssize_t at = last;; at--) {
        key->bytes = keys + at * key->length;
        if (row < 0 || row >= self->rows) {
            return 0;
        }
        if (run >= RUN_MIN && row >= AHEAD) {
            row_soon(self, row - AHEAD, row % AHEAD == 0);
        }
        if (!same(self, row, key)) {
            return 0;
        }
        out[at] = (int32_t)row;
        if (at == 0) {
            return 1;
        }
        Py_ssize_t above = parents[row];
        if (above == row - 1) {
            run++;
        } else if (run >= RUN_MIN) {
            /* The next run may be as long. */
            run_soon(self, above);
            run = RUN_MIN - 1;
        } else {
            run = 0;
        }
        row = above;
    }
}

static Py_ssize_t walk_down(const Keys *self, Key *key, const uint8_t *keys, Py_ssize_t n,
                            int32_t *out) {
    const int32_t *parents = self->parents.buf;
    for (Py_ssize_t at = 0; at < n; at++) {
        key->bytes = keys + at * key->length;
        Py_ssize_t row = keys_find(self, key);
        if (row < 0 || (at > 0 && parents[row] != out[at - 1])) {
            return at;
        }
        out[at] = (int32_t)row;
    }
    return n;
}

Py_ssize_t keys_prefix(const Keys *self, Key key, const uint8_t *keys, Py_ssize_t n, int32_t *out) {
    Py_ssize_t row = -1, found = deepest(self, &key, keys, n, &row) + 1;
    if (found > 0 && !walk_up(self, &key, keys, found - 1, row, out)) {
        /* Keys of several chains, or of none: one by one. */
        found = walk_down(self, &key, keys, n, out);
    }
    return found;
}
