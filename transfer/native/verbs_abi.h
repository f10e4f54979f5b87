/* What of libibverbs' binary interface is used here (IBVERBS_1.1 and later additions, unchanged
 * since rdma-core 17). Declared rather than included, so that the extension is built alike where
 * rdma-core's headers are not installed; verbs_abi_check.c holds it against them where they are. */
#ifndef DUALPATH_VERBS_ABI_H
#define DUALPATH_VERBS_ABI_H

#include <stddef.h>
#include <stdint.h>

enum {
    WR_WRITE = 0,
    WR_WRITE_IMM = 1,
    WR_SEND = 2,
    WR_INVALIDATE = 7,
    WR_BIND = 8,
    SEND_SIGNALED = 1 << 1,
    WC_RECEIVED = 1 << 7,
    WC_RECEIVED_IMM = (1 << 7) + 1,
    ACCESS_LOCAL_WRITE = 1,
    ACCESS_REMOTE_WRITE = 1 << 1,
    ACCESS_BIND = 1 << 4,
    WINDOW_TYPE_2 = 2,
    DEVICE_WINDOW_2B = 1 << 24,
    PORT_ACTIVE = 4,
    LINK_INFINIBAND = 1,
    TYPE_RC = 2,
    STATE_RESET = 0,
    STATE_INIT = 1,
    STATE_READY_TO_RECEIVE = 2,
    STATE_READY_TO_SEND = 3,
    STATE_ERROR = 6,
    SET_STATE = 1 << 0,
    SET_ACCESS = 1 << 3,
    SET_PKEY_INDEX = 1 << 4,
    SET_PORT = 1 << 5,
    SET_ADDRESS = 1 << 7,
    SET_MTU = 1 << 8,
    SET_TIMEOUT = 1 << 9,
    SET_RETRIES = 1 << 10,
    SET_RECEIVER_RETRIES = 1 << 11,
    SET_RECEIVE_PACKET = 1 << 12,
    SET_READS = 1 << 13,
    SET_RECEIVER_TIMER = 1 << 15,
    SET_SEND_PACKET = 1 << 16,
    SET_PEER_READS = 1 << 17,
    SET_PEER = 1 << 20,
};

typedef struct VerbsContext VerbsContext;

typedef struct {
    VerbsContext *context;
    uint32_t handle;
} VerbsDomain; /* ibv_pd */

typedef struct {
    VerbsContext *context;
    VerbsDomain *domain;
    void *address;
    size_t length;
    uint32_t handle, lkey, rkey;
} VerbsMemory; /* ibv_mr */

typedef struct {
    VerbsContext *context;
    VerbsDomain *domain;
    uint32_t rkey, handle;
    int type;
} VerbsWindow; /* ibv_mw */

typedef struct {
    VerbsContext *context;
    int fd, users;
} VerbsChannel; /* ibv_comp_channel */

typedef struct {
    VerbsContext *context;
    VerbsChannel *channel;
} VerbsQueue; /* ibv_cq; goes on */

typedef struct {
    VerbsContext *context;
    void *user;
    VerbsDomain *domain;
    VerbsQueue *send_queue, *receive_queue;
    void *shared;
    uint32_t handle, number;
} VerbsPair; /* ibv_qp; goes on */

typedef struct {
    uint64_t address;
    uint32_t nbytes, lkey;
} VerbsPiece; /* ibv_sge */

typedef struct VerbsSend {
    uint64_t ident;
    struct VerbsSend *next;
    VerbsPiece *pieces;
    int count, opcode;
    unsigned flags;
    uint32_t immediate; /* big endian, or the key to invalidate */
    union {
        struct {
            uint64_t address;
            uint32_t rkey;
        } remote;
        uint64_t room[4];
    } at;
    uint32_t shared;
    struct {
        VerbsWindow *window;
        uint32_t rkey;
        VerbsMemory *memory;
        uint64_t address, nbytes;
        unsigned access;
    } bind;
} VerbsSend; /* ibv_send_wr */

typedef struct VerbsReceive {
    uint64_t ident;
    struct VerbsReceive *next;
    VerbsPiece *pieces;
    int count;
} VerbsReceive; /* ibv_recv_wr */

typedef struct {
    uint64_t ident;
    int status, opcode;
    uint32_t vendor, nbytes;
    uint32_t immediate; /* big endian */
    uint32_t pair, peer;
    unsigned flags;
    uint16_t pkey_index, slid;
    uint8_t level, path_bits;
} VerbsCompletion; /* ibv_wc */

typedef struct {
    void *unused_before[7];
    VerbsWindow *(*alloc_window)(VerbsDomain *, int type);
    void *unused_bind;
    int (*free_window)(VerbsWindow *);
    void *unused_create;
    int (*poll)(VerbsQueue *, int most, VerbsCompletion *);
    int (*arm)(VerbsQueue *, int solicited_only);
    void *unused_between[12];
    int (*post_send)(VerbsPair *, VerbsSend *, VerbsSend **bad);
    int (*post_receive)(VerbsPair *, VerbsReceive *, VerbsReceive **bad);
    void *unused_after[5];
} VerbsCalls; /* ibv_context_ops */

struct VerbsContext {
    void *device;
    VerbsCalls calls;
    int command_fd, event_fd, vectors;
}; /* ibv_context; goes on */

typedef struct {
    char firmware[64];
    uint64_t node_guid, image_guid, memory_max, page_sizes;
    uint32_t vendor, part, version;
    int pairs_max, requests_max;
    unsigned flags;
    int pieces_max, pieces_read_max, queues_max, completions_max;
    int unused[22];
    uint16_t keys_max;
    uint8_t delay, ports;
} VerbsDeviceInfo; /* ibv_device_attr */

typedef struct {
    int state, mtu_max, mtu, gids;
    uint32_t flags, message_max, bad_keys, bad_qkeys;
    uint16_t keys, lid, manager_lid;
    uint8_t mask, lanes, manager_level, timeout, init, width, speed, physical, link, more_flags;
    uint16_t flags2;
    uint32_t room[8]; /* for what later versions fill in */
} VerbsPortInfo; /* ibv_port_attr */

typedef union {
    uint8_t bytes[16];
    uint64_t words[2];
} VerbsGid;

typedef struct {
    VerbsGid gid;
    uint32_t row, port, type, interface;
} VerbsGidEntry; /* ibv_gid_entry */

typedef struct {
    uint32_t sends, receives, send_pieces, receive_pieces, inlined;
} VerbsLimits; /* ibv_qp_cap */

typedef struct {
    void *user;
    VerbsQueue *send_queue, *receive_queue;
    void *shared;
    VerbsLimits limits;
    int type, signal_all;
} VerbsPairInfo; /* ibv_qp_init_attr */

typedef struct {
    struct {
        VerbsGid gid;
        uint32_t flow;
        uint8_t row, hops, traffic_class;
    } route;
    uint16_t lid;
    uint8_t service_level, path_bits, rate, routed, port;
} VerbsAddress; /* ibv_ah_attr */

typedef struct {
    int state, current, mtu, migration;
    uint32_t qkey, receive_packet, send_packet, peer;
    unsigned access;
    VerbsLimits limits;
    VerbsAddress address, other_address;
    uint16_t key_index, other_key_index;
    uint8_t notify, draining, reads, peer_reads, receiver_timer, port, timeout, retries;
    uint8_t receiver_retries, other_port, other_timeout;
    uint32_t rate;
} VerbsPairState; /* ibv_qp_attr */

#endif
