/* Work requests as rows: rows.c makes them, verbs_post.c posts them, work_rows.py packs them. */
#ifndef DUALPATH_TRANSFER_ROWS_H
#define DUALPATH_TRANSFER_ROWS_H

#include <stdint.h>

/* One piece of local memory; the first row of a request says everything else. */
typedef struct {
    uint64_t ident, address, remote;
    uint32_t nbytes, lkey, rkey, immediate, opcode, flags;
} Row;

_Static_assert(sizeof(Row) == 48, "as work_rows.py packs it");

enum { ROW_SIGNALED = 1, ROW_MORE = 2 /* the next row is another piece of this request */ };

#define REQUESTS_MAX 64 /* of one post */
#define PIECES_MAX 16   /* of one request */
#define ROWS_MAX (REQUESTS_MAX * PIECES_MAX)

#endif
