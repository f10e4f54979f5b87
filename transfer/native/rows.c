/* The work requests of a write or batch, as rows, with one call a post:
 * transfer/dualpath/transfer/rdma/write_requests.py. Python twin: write_requests_twin.py. */
#include "parts.h"
#include "rows.h"

#include <string.h>

enum { OPCODE_WRITE = 0, OPCODE_WRITE_IMM = 1 /* libibverbs' numbers */ };

/* One end of the write, and how far it is within the part that is under way. */
typedef struct {
    Py_ssize_t stride, length; /* equal: one piece a part */
    Py_buffer places[2];
    const uint64_t *bases, *skips;
    uint64_t at, left; /* the piece under way: where it goes on, and its bytes */
} End;

typedef struct {
    Py_buffer numbers, skip;
    const uint64_t *sizes;
    Py_ssize_t parts;
    End source, target;
    unsigned long long address, remote;
    unsigned lkey, rkey;
    int pieces_max, most;
    uint64_t offset, end; /* of all parts' bytes: what is next, and where it ends */
    Row rows[ROWS_MAX];
    int row_count, requests, last_at;
} Maker;

/* Byte `inside` of a part: where it is, and how many bytes of its piece are left. */
static void seek(End *end, Py_ssize_t part, uint64_t inside) {
    uint64_t at = end->skips[part] + inside;
    if (end->stride == end->length) {
        end->at = end->bases[part] + at;
        end->left = UINT64_MAX;
    } else {
        uint64_t length = (uint64_t)end->length;
        end->at = end->bases[part] + at / length * (uint64_t)end->stride + at % length;
        end->left = length - at % length;
    }
}

static void step(End *end, uint64_t nbytes) {
    end->at += nbytes;
    if (end->stride != end->length) {
        end->left -= nbytes;
        if (end->left == 0) {
            end->at += (uint64_t)(end->stride - end->length);
            end->left = (uint64_t)end->length;
        }
    }
}

/* The next request of a part, of whose bytes `left` are to be written: how many it takes. */
static uint64_t add_request(Maker *maker, uint64_t left) {
    uint64_t target = maker->target.left < left ? maker->target.left : left, filled = 0;
    int first = maker->row_count;
    while (filled < target && maker->row_count - first < maker->pieces_max) {
        uint64_t take = target - filled;
        take = maker->source.left < take ? maker->source.left : take;
        take = take < UINT32_MAX ? take : UINT32_MAX;
        maker->rows[maker->row_count++] = (Row){
            .address = maker->address + maker->source.at,
            .remote = maker->remote + maker->target.at,
            .nbytes = (uint32_t)take,
            .lkey = maker->lkey,
            .rkey = maker->rkey,
            .opcode = OPCODE_WRITE,
            .flags = ROW_MORE,
        };
        step(&maker->source, take);
        filled += take;
    }
    maker->rows[maker->row_count - 1].flags = 0;
    step(&maker->target, filled);
    maker->last_at = first;
    maker->requests++;
    return filled;
}

static int skipped(const Maker *maker, Py_ssize_t part) {
    return ((const uint8_t *)maker->skip.buf)[part >> 3] >> (part & 7) & 1;
}

/* Fill the rows; parts that are left out count as done as soon as they are next. */
static void fill(Maker *maker) {
    uint64_t begin = 0;
    for (Py_ssize_t part = 0; part < maker->parts && maker->offset < maker->end; part++) {
        uint64_t stop = begin + maker->sizes[part];
        stop = stop < maker->end ? stop : maker->end;
        if (maker->offset < stop) {
            if (skipped(maker, part)) {
                maker->offset = stop;
            } else {
                seek(&maker->source, part, maker->offset - begin);
                seek(&maker->target, part, maker->offset - begin);
                while (maker->offset < stop && maker->requests < maker->most) {
                    maker->offset += add_request(maker, stop - maker->offset);
                }
                if (maker->offset < stop) {
                    return;
                }
            }
        }
        begin += maker->sizes[part];
    }
}

static int right_end(End *end, Py_ssize_t parts) {
    if (end->length < 1 || end->stride < end->length) {
        PyErr_SetString(PyExc_ValueError, "the slices of a table are empty or overlap");
        return 0;
    }
    end->bases = end->places[0].buf;
    end->skips = end->places[1].buf;
    return dualpath_numbers(&end->places[0], parts) && dualpath_numbers(&end->places[1], parts);
}

static int right(Maker *maker) {
    uint64_t whole = 0;
    maker->parts = maker->numbers.len / (Py_ssize_t)sizeof(uint64_t);
    maker->sizes = maker->numbers.buf;
    if (!dualpath_numbers(&maker->numbers, maker->parts) ||
        !right_end(&maker->source, maker->parts) || !right_end(&maker->target, maker->parts)) {
        return 0;
    }
    int fits = maker->skip.len * 8 >= maker->parts;
    for (Py_ssize_t i = 0; fits && i < maker->parts; i++) {
        fits = !__builtin_add_overflow(whole, maker->sizes[i], &whole);
    }
    if (!fits || maker->offset > maker->end || maker->end > whole || maker->most < 1 ||
        maker->most > REQUESTS_MAX || maker->pieces_max < 1 || maker->pieces_max > PIECES_MAX) {
        PyErr_SetString(PyExc_ValueError, "bytes that a write does not have, or too many at once");
        return 0;
    }
    return 1;
}

static PyObject *answer_of(Maker *maker, long long immediate) {
    int more = maker->offset < maker->end;
    if (!more && maker->requests && immediate >= 0) {
        maker->rows[maker->last_at].opcode = OPCODE_WRITE_IMM;
        maker->rows[maker->last_at].immediate = (uint32_t)immediate;
    }
    PyObject *rows = PyByteArray_FromStringAndSize(
        (const char *)maker->rows, maker->row_count * (Py_ssize_t)sizeof(Row));
    if (rows == NULL) {
        return NULL;
    }
    return Py_BuildValue(
        "NiiK", rows, maker->requests, maker->last_at * (int)sizeof(Row),
        (unsigned long long)maker->offset);
}

PyObject *dualpath_rows_of(PyObject *module, PyObject *args) {
    Maker maker;
    PyObject *answer = NULL;
    unsigned long long offset, end;
    long long immediate;
    End *from = &maker.source, *to = &maker.target;
    if (!PyArg_ParseTuple(
            args, "y*(nny*y*)(nny*y*)KKy*(KI)(KI)iiL:rows_of", &maker.numbers, &from->stride,
            &from->length, &from->places[0], &from->places[1], &to->stride, &to->length,
            &to->places[0], &to->places[1], &offset, &end, &maker.skip, &maker.address, &maker.lkey,
            &maker.remote, &maker.rkey, &maker.pieces_max, &maker.most, &immediate)) {
        return NULL;
    }
    maker.offset = offset;
    maker.end = end;
    maker.row_count = maker.requests = maker.last_at = 0;
    if (right(&maker)) {
        fill(&maker);
        answer = answer_of(&maker, immediate);
    }
    Py_buffer *held[6] = {&maker.numbers,   &from->places[0], &from->places[1],
                          &to->places[0], &to->places[1],   &maker.skip};
    for (int i = 0; i < 6; i++) {
        PyBuffer_Release(held[i]);
    }
    return answer;
}
