/* See xxh3.h. Two kernels: AVX2 with streaming stores, chosen at run time, and portable C. */
#include "xxh3.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DUALPATH_AVX2 1
#include <immintrin.h>
#endif

#define LANES 8
#define STRIPE_BYTES 64
#define SECRET_BYTES 192
#define STRIPES ((SECRET_BYTES - STRIPE_BYTES) / 8) /* of a block */
#define BLOCK_BYTES (STRIPES * STRIPE_BYTES)
#define HASH_AHEAD_BYTES 384 /* without the stores; measured best from 256 to 2048 */
#define AHEAD_BYTES 1024 /* prefetched; measured best from 512 to 2048 */

static const uint64_t P32_1 = 0x9E3779B1U, P32_2 = 0x85EBCA77U, P32_3 = 0xC2B2AE3DU;
static const uint64_t P64_1 = 0x9E3779B185EBCA87ULL, P64_2 = 0xC2B2AE3D27D4EB4FULL;
static const uint64_t P64_3 = 0x165667B19E3779F9ULL, P64_4 = 0x85EBCA77C2B2AE63ULL;
static const uint64_t P64_5 = 0x27D4EB2F165667C5ULL, AVALANCHE = 0x165667919E3779F9ULL;

/* The default secret of the specification. */
static const unsigned char SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef struct {
    _Alignas(64) uint64_t lane[LANES];
} Lanes;

static uint64_t word(const void *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static void accumulate(Lanes *lanes, const char *stripe, const unsigned char *secret) {
    for (int i = 0; i < LANES; i++) {
        uint64_t value = word(stripe + 8 * i), keyed = value ^ word(secret + 8 * i);
        lanes->lane[i ^ 1] += value;
        lanes->lane[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
    }
}

static void scramble(Lanes *lanes) {
    for (int i = 0; i < LANES; i++) {
        uint64_t value = lanes->lane[i];
        value ^= value >> 47;
        value ^= word(SECRET + SECRET_BYTES - STRIPE_BYTES + 8 * i);
        lanes->lane[i] = value * P32_1;
    }
}

static uint64_t folded(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merged(const Lanes *lanes, size_t nbytes) {
    uint64_t hash = (uint64_t)nbytes * P64_1;
    for (int i = 0; i < 4; i++) {
        const unsigned char *secret = SECRET + 11 + 16 * i;
        hash += folded(lanes->lane[2 * i] ^ word(secret), lanes->lane[2 * i + 1] ^ word(secret + 8));
    }
    hash ^= hash >> 37;
    hash *= AVALANCHE;
    return hash ^ hash >> 32;
}

/* Copy and accumulate `stripes` stripes; the first is stripe number `number` of its block. */
static void stripes_portable(
    Lanes *lanes, char *target, const char *source, size_t stripes, size_t number, int hash) {
    memcpy(target, source, stripes * STRIPE_BYTES);
    for (size_t i = 0; hash && i < stripes; i++) {
        accumulate(lanes, target + i * STRIPE_BYTES, SECRET + 8 * number);
        if (++number == STRIPES) {
            scramble(lanes);
            number = 0;
        }
    }
}

#ifdef DUALPATH_AVX2
#define MIXED(sum, value, key) \
    _mm256_add_epi64( \
        _mm256_add_epi64(sum, _mm256_shuffle_epi32(value, 0x4e)), \
        _mm256_mul_epu32( \
            _mm256_xor_si256(value, key), \
            _mm256_srli_epi64(_mm256_xor_si256(value, key), 32)))

__attribute__((target("avx2"))) static __m256i scrambled(__m256i sum, const unsigned char *secret) {
    const __m256i prime = _mm256_set1_epi32((int)0x9E3779B1U);
    __m256i value = _mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47));
    value = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64(high, 32));
}

/* As stripes_portable; `target` is aligned to 32 bytes if `stream`. The flags are constants where
 * it is called, so that each of the four cases becomes a loop without a branch. */
__attribute__((target("avx2"), always_inline)) static inline void stripes_avx2_as(
    Lanes *lanes, char *target, const char *source, size_t stripes, size_t number, int hash,
    int stream) {
    __m256i low = _mm256_load_si256((__m256i *)lanes->lane);
    __m256i high = _mm256_load_si256((__m256i *)lanes->lane + 1);
    for (size_t i = 0; i < stripes; i++) {
        const __m256i *from = (const __m256i *)(source + i * STRIPE_BYTES);
        __m256i *to = (__m256i *)(target + i * STRIPE_BYTES);
        _mm_prefetch((const char *)from + AHEAD_BYTES, _MM_HINT_T0);
        __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
        if (stream) {
            _mm256_stream_si256(to, first);
            _mm256_stream_si256(to + 1, second);
        } else {
            _mm256_storeu_si256(to, first);
            _mm256_storeu_si256(to + 1, second);
        }
        if (!hash) {
            continue;
        }
        const unsigned char *secret = SECRET + 8 * number;
        low = MIXED(low, first, _mm256_loadu_si256((const __m256i *)secret));
        high = MIXED(high, second, _mm256_loadu_si256((const __m256i *)(secret + 32)));
        if (++number == STRIPES) {
            low = scrambled(low, SECRET + SECRET_BYTES - STRIPE_BYTES);
            high = scrambled(high, SECRET + SECRET_BYTES - STRIPE_BYTES + 32);
            number = 0;
        }
    }
    _mm256_store_si256((__m256i *)lanes->lane, low);
    _mm256_store_si256((__m256i *)lanes->lane + 1, high);
}

__attribute__((target("avx2"))) static void hash_stripes_avx2(
    Lanes *lanes, const char *source, size_t stripes) {
    __m256i low = _mm256_load_si256((__m256i *)lanes->lane);
    __m256i high = _mm256_load_si256((__m256i *)lanes->lane + 1);
    while (stripes > 0) {
        size_t some = stripes < STRIPES ? stripes : STRIPES;
#pragma GCC unroll 4
        for (size_t i = 0; i < some; i++, source += STRIPE_BYTES) {
            const __m256i *from = (const __m256i *)source;
            const unsigned char *secret = SECRET + 8 * i;
            _mm_prefetch(source + HASH_AHEAD_BYTES, _MM_HINT_T0);
            __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
            low = MIXED(low, first, _mm256_loadu_si256((const __m256i *)secret));
            high = MIXED(high, second, _mm256_loadu_si256((const __m256i *)(secret + 32)));
        }
        if (some == STRIPES) {
            low = scrambled(low, SECRET + SECRET_BYTES - STRIPE_BYTES);
            high = scrambled(high, SECRET + SECRET_BYTES - STRIPE_BYTES + 32);
        }
        stripes -= some;
    }
    _mm256_store_si256((__m256i *)lanes->lane, low);
    _mm256_store_si256((__m256i *)lanes->lane + 1, high);
}

__attribute__((target("avx2"))) static void stripes_avx2(
    Lanes *lanes, char *target, const char *source, size_t stripes, size_t number, int hash,
    int stream) {
    if (hash && stream) {
        stripes_avx2_as(lanes, target, source, stripes, number, 1, 1);
    } else if (hash) {
        stripes_avx2_as(lanes, target, source, stripes, number, 1, 0);
    } else {
        stripes_avx2_as(lanes, target, source, stripes, number, 0, 1);
    }
}
#endif

static void hash_stripes(Lanes *lanes, const char *source, size_t stripes) {
#ifdef DUALPATH_AVX2
    if (__builtin_cpu_supports("avx2")) {
        hash_stripes_avx2(lanes, source, stripes);
        return;
    }
#endif
    size_t number = 0;
    for (size_t i = 0; i < stripes; i++) {
        accumulate(lanes, source + i * STRIPE_BYTES, SECRET + 8 * number);
        if (++number == STRIPES) {
            scramble(lanes);
            number = 0;
        }
    }
}

static void copy_stripes(
    Lanes *lanes, char *target, const char *source, size_t stripes, size_t number, int hash,
    int stream) {
#ifdef DUALPATH_AVX2
    stream = stream && (uintptr_t)target % 32 == 0;
    if ((hash || stream) && __builtin_cpu_supports("avx2")) {
        stripes_avx2(lanes, target, source, stripes, number, hash, stream);
        return;
    }
#endif
    stripes_portable(lanes, target, source, stripes, number, hash);
}

_Static_assert(sizeof(Lanes) == sizeof(((DualpathCopyHash *)0)->lane), "the same lanes");

void dualpath_copy_hash_begin(DualpathCopyHash *state) {
    Lanes lanes = {{P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}};
    memcpy(state->lane, lanes.lane, sizeof lanes.lane);
    state->stripe = 0;
    state->nbytes = 0;
}

static void copy_and_count(
    DualpathCopyHash *state, char *target, const char *source, size_t stripes, int stream) {
    Lanes lanes;
    memcpy(lanes.lane, state->lane, sizeof lanes.lane);
    copy_stripes(&lanes, target, source, stripes, state->stripe, 1, stream);
    memcpy(state->lane, lanes.lane, sizeof lanes.lane);
    state->stripe = (state->stripe + stripes) % STRIPES;
    state->nbytes += stripes * STRIPE_BYTES;
}

void dualpath_copy_hash_piece(
    DualpathCopyHash *state, char *target, const char *source, size_t nbytes, int stream) {
    copy_and_count(state, target, source, nbytes / STRIPE_BYTES, stream);
}

uint64_t dualpath_copy_hash_end(
    DualpathCopyHash *state, char *target, const char *source, size_t nbytes, int stream) {
    Lanes lanes;
    size_t stripes = (nbytes - 1) / STRIPE_BYTES, body = stripes * STRIPE_BYTES;
    copy_and_count(state, target, source, stripes, stream);
    memcpy(target + body, source + body, nbytes - body);
    memcpy(lanes.lane, state->lane, sizeof lanes.lane);
    /* The last stripe overlaps; read from the target, so that what is hashed is what was stored. */
    accumulate(&lanes, target + nbytes - STRIPE_BYTES, SECRET + SECRET_BYTES - STRIPE_BYTES - 7);
    return merged(&lanes, state->nbytes + nbytes - body);
}

uint64_t dualpath_copy_and_hash(char *target, const char *source, size_t nbytes, int stream) {
    DualpathCopyHash state;
    dualpath_copy_hash_begin(&state);
    return dualpath_copy_hash_end(&state, target, source, nbytes, stream);
}

uint64_t dualpath_hash(const char *source, size_t nbytes) {
    Lanes lanes = {{P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}};
    hash_stripes(&lanes, source, (nbytes - 1) / STRIPE_BYTES);
    accumulate(&lanes, source + nbytes - STRIPE_BYTES, SECRET + SECRET_BYTES - STRIPE_BYTES - 7);
    return merged(&lanes, nbytes);
}

void dualpath_copy(char *target, const char *source, size_t nbytes, int stream) {
    Lanes lanes = {{0}};
    size_t body = stream ? nbytes / STRIPE_BYTES * STRIPE_BYTES : 0;
    copy_stripes(&lanes, target, source, body / STRIPE_BYTES, 0, 0, stream);
    memcpy(target + body, source + body, nbytes - body);
}

void dualpath_copy_fence(void) {
#ifdef DUALPATH_AVX2
    _mm_sfence();
#endif
    atomic_thread_fence(memory_order_seq_cst);
}
