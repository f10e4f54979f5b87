/* The table of the key index: from a key to its slot, by open addressing.
 *
 * A slot is 8 bytes: 32 bits of a seeded hash of the key, and the row. The upper bits of the hash
 * are the place in the table, hence growing needs no key and keeps the order; it goes on a few
 * slots a change, beside the old table, so that no change takes long. The hash has a secret seed:
 * nobody can choose keys that collide. */
#include "key_index.h"
#include "siphash.h"

#include <stdlib.h>

#define BITS_MIN 10
#define BITS_MAX 32
#define MOVED UINT32_MAX
#define MOVED_AT_ONCE 32

static uint32_t tag_of(const Keys *self, const Key *key) {
    /* The first word has the length, so zeros behind a hash cannot be taken for its end. */
    uint64_t words[1 + HASH_BYTES_MAX / 8] = {0};
    words[0] = (uint64_t)(uint32_t)key->namespace | (uint64_t)key->length << 32;
    memcpy(words + 1, key->bytes, key->length);
    return (uint32_t)(siphash(self->seed, words, 1 + (key->length + 7) / 8) >> 32);
}

static size_t size_of(const Table *table) { return (size_t)1 << table->bits; }

static size_t home_of(const Table *table, uint32_t tag) {
    return (size_t)((uint64_t)tag >> (32 - table->bits));
}

static void insert(Table *table, Slot slot) {
    size_t mask = size_of(table) - 1, at = home_of(table, slot.tag);
    while (table->slots[at].row != 0) {
        at = (at + 1) & mask;
    }
    table->slots[at] = slot;
}

static void move_some(Keys *self, size_t most) {
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

int keys_make_room(Keys *self, Py_ssize_t more) {
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
static Slot *find_in(const Keys *self, const Table *table, uint32_t tag, const Key *key,
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

Py_ssize_t keys_find(const Keys *self, const Key *key) {
    uint32_t tag = tag_of(self, key);
    const Slot *slot = find_in(self, &self->now, tag, key, -1);
    if (slot == NULL) {
        slot = find_in(self, &self->old, tag, key, -1);
    }
    return slot == NULL ? -1 : (Py_ssize_t)slot->row - 1;
}

/* Have the slots of a key on their way when it is their turn: in bulk, the misses overlap. */
void keys_prefetch(const Keys *self, const Key *key) {
    if (key->length <= HASH_BYTES_MAX) {
        __builtin_prefetch(&self->now.slots[home_of(&self->now, tag_of(self, key))], 1);
    }
}

int keys_put(Keys *self, Py_ssize_t row) {
    Key key = key_of(self, row);
    if (key.length > HASH_BYTES_MAX) {
        PyErr_Format(PyExc_ValueError, "row %zd: a hash of %d bytes", row, (int)key.length);
        return -1;
    }
    Py_ssize_t known = keys_find(self, &key);
    if (known >= 0) {
        PyErr_Format(PyExc_KeyError, "row %zd has the key of row %zd", row, known);
        return -1;
    }
    if (keys_make_room(self, 1) < 0) {
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

int keys_remove(Keys *self, Py_ssize_t row) {
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
        return -1;
    }
    self->count--;
    return 0;
}

/* No growing is under way any more. */
void keys_settle(Keys *self) { move_some(self, SIZE_MAX); }

int keys_start(Keys *self) {
    self->now.bits = BITS_MIN;
    self->now.slots = calloc(size_of(&self->now), sizeof(Slot));
    return self->now.slots == NULL ? -1 : 0;
}

void keys_free(Keys *self) {
    free(self->now.slots);
    free(self->old.slots);
}

size_t keys_nbytes(const Keys *self) {
    size_t slots = size_of(&self->now) + (self->old.slots == NULL ? 0 : size_of(&self->old));
    return slots * sizeof(Slot);
}
