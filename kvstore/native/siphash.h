/* SipHash-1-3 of whole words, with a secret seed: nobody can choose keys that collide. */
#ifndef DUALPATH_SIPHASH_H
#define DUALPATH_SIPHASH_H

#include <stdint.h>

#define SIP_ROTATE(x, b) (((x) << (b)) | ((x) >> (64 - (b))))

static inline void sip_round(uint64_t v[4]) {
    v[0] += v[1], v[1] = SIP_ROTATE(v[1], 13) ^ v[0], v[0] = SIP_ROTATE(v[0], 32);
    v[2] += v[3], v[3] = SIP_ROTATE(v[3], 16) ^ v[2];
    v[0] += v[3], v[3] = SIP_ROTATE(v[3], 21) ^ v[0];
    v[2] += v[1], v[1] = SIP_ROTATE(v[1], 17) ^ v[2], v[2] = SIP_ROTATE(v[2], 32);
}

static inline uint64_t siphash(const uint64_t seed[2], const uint64_t *words, int count) {
    uint64_t v[4] = {
        seed[0] ^ 0x736f6d6570736575u,
        seed[1] ^ 0x646f72616e646f6du,
        seed[0] ^ 0x6c7967656e657261u,
        seed[1] ^ 0x7465646279746573u,
    };
    for (int i = 0; i < count; i++) {
        v[3] ^= words[i];
        sip_round(v);
        v[0] ^= words[i];
    }
    v[2] ^= 0xff;
    sip_round(v);
    sip_round(v);
    sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#endif
