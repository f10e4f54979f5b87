/* XXH3-64 of long inputs, written after its specification, fused with a copy: each byte is loaded
 * once, stored and hashed. Checked against the xxhash library in tests/kvstore. */
#ifndef DUALPATH_XXH3_H
#define DUALPATH_XXH3_H

#include <stddef.h>
#include <stdint.h>

/* Shorter inputs have other formulas; the caller hashes them otherwise. */
#define XXH3_LONG_BYTES_MIN 241

/* Copy `nbytes` >= XXH3_LONG_BYTES_MIN to `target` and return their hash, seed 0. With `stream`
 * the stores go past the caches where the processor can; fence before another thread looks. */
uint64_t dualpath_copy_and_hash(char *target, const char *source, size_t nbytes, int stream);

/* The same where source or target lie in several pieces: begin, copy all pieces but the last, end
 * with that. Each but the last has a multiple of 64 bytes, the last at least 64, all together at
 * least XXH3_LONG_BYTES_MIN. */
typedef struct {
    _Alignas(64) uint64_t lane[8];
    size_t stripe, nbytes;
} DualpathCopyHash;

void dualpath_copy_hash_begin(DualpathCopyHash *state);
void dualpath_copy_hash_piece(
    DualpathCopyHash *state, char *target, const char *source, size_t nbytes, int stream);
uint64_t dualpath_copy_hash_end(
    DualpathCopyHash *state, char *target, const char *source, size_t nbytes, int stream);

/* Hash alone, `nbytes` >= XXH3_LONG_BYTES_MIN. */
uint64_t dualpath_hash(const char *source, size_t nbytes);

/* Copy alone, any length. */
void dualpath_copy(char *target, const char *source, size_t nbytes, int stream);

/* Let streamed stores be seen, and loads be done, before whatever comes next. */
void dualpath_copy_fence(void);

#endif
