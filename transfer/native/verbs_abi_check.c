/* Compiled only to be compiled: verbs_abi.h says the same as rdma-core's own header. */
#include <infiniband/verbs.h>

#include "verbs_abi.h"

#define SAME(theirs, their_field, ours, our_field)                                                  \
    _Static_assert(                                                                                 \
        offsetof(theirs, their_field) == offsetof(ours, our_field) &&                               \
            sizeof(((theirs *)0)->their_field) == sizeof(((ours *)0)->our_field),                   \
        #theirs "." #their_field)
#define SIZE(theirs, ours) _Static_assert(sizeof(theirs) == sizeof(ours), #theirs)
#define VALUE(theirs, ours) _Static_assert((int)(theirs) == (int)(ours), #theirs)

SAME(struct ibv_pd, context, VerbsDomain, context);
SAME(struct ibv_mr, lkey, VerbsMemory, lkey);
SAME(struct ibv_mr, rkey, VerbsMemory, rkey);
SAME(struct ibv_mw, rkey, VerbsWindow, rkey);
SAME(struct ibv_comp_channel, fd, VerbsChannel, fd);
SAME(struct ibv_cq, context, VerbsQueue, context);
SAME(struct ibv_cq, channel, VerbsQueue, channel);
SAME(struct ibv_qp, context, VerbsPair, context);
SAME(struct ibv_qp, qp_num, VerbsPair, number);

SIZE(struct ibv_sge, VerbsPiece);
SAME(struct ibv_sge, addr, VerbsPiece, address);
SAME(struct ibv_sge, length, VerbsPiece, nbytes);
SAME(struct ibv_sge, lkey, VerbsPiece, lkey);

SIZE(struct ibv_send_wr, VerbsSend);
SAME(struct ibv_send_wr, wr_id, VerbsSend, ident);
SAME(struct ibv_send_wr, next, VerbsSend, next);
SAME(struct ibv_send_wr, sg_list, VerbsSend, pieces);
SAME(struct ibv_send_wr, num_sge, VerbsSend, count);
SAME(struct ibv_send_wr, opcode, VerbsSend, opcode);
SAME(struct ibv_send_wr, send_flags, VerbsSend, flags);
SAME(struct ibv_send_wr, imm_data, VerbsSend, immediate);
SAME(struct ibv_send_wr, invalidate_rkey, VerbsSend, immediate);
SAME(struct ibv_send_wr, wr, VerbsSend, at);
SAME(struct ibv_send_wr, wr.rdma.remote_addr, VerbsSend, at.remote.address);
SAME(struct ibv_send_wr, wr.rdma.rkey, VerbsSend, at.remote.rkey);
SAME(struct ibv_send_wr, bind_mw.mw, VerbsSend, bind.window);
SAME(struct ibv_send_wr, bind_mw.rkey, VerbsSend, bind.rkey);
SAME(struct ibv_send_wr, bind_mw.bind_info.mr, VerbsSend, bind.memory);
SAME(struct ibv_send_wr, bind_mw.bind_info.addr, VerbsSend, bind.address);
SAME(struct ibv_send_wr, bind_mw.bind_info.length, VerbsSend, bind.nbytes);
SAME(struct ibv_send_wr, bind_mw.bind_info.mw_access_flags, VerbsSend, bind.access);

SIZE(struct ibv_recv_wr, VerbsReceive);
SAME(struct ibv_recv_wr, num_sge, VerbsReceive, count);

SIZE(struct ibv_wc, VerbsCompletion);
SAME(struct ibv_wc, status, VerbsCompletion, status);
SAME(struct ibv_wc, opcode, VerbsCompletion, opcode);
SAME(struct ibv_wc, byte_len, VerbsCompletion, nbytes);
SAME(struct ibv_wc, imm_data, VerbsCompletion, immediate);
SAME(struct ibv_wc, qp_num, VerbsCompletion, pair);

SIZE(struct ibv_context_ops, VerbsCalls);
SAME(struct ibv_context_ops, alloc_mw, VerbsCalls, alloc_window);
SAME(struct ibv_context_ops, dealloc_mw, VerbsCalls, free_window);
SAME(struct ibv_context_ops, poll_cq, VerbsCalls, poll);
SAME(struct ibv_context_ops, req_notify_cq, VerbsCalls, arm);
SAME(struct ibv_context_ops, post_send, VerbsCalls, post_send);
SAME(struct ibv_context_ops, post_recv, VerbsCalls, post_receive);
SAME(struct ibv_context, ops, VerbsContext, calls);

SIZE(struct ibv_device_attr, VerbsDeviceInfo);
SAME(struct ibv_device_attr, max_qp_wr, VerbsDeviceInfo, requests_max);
SAME(struct ibv_device_attr, device_cap_flags, VerbsDeviceInfo, flags);
SAME(struct ibv_device_attr, max_sge, VerbsDeviceInfo, pieces_max);
SAME(struct ibv_device_attr, max_cqe, VerbsDeviceInfo, completions_max);
SAME(struct ibv_device_attr, phys_port_cnt, VerbsDeviceInfo, ports);

_Static_assert(sizeof(struct ibv_port_attr) <= sizeof(VerbsPortInfo), "room for all of it");
SAME(struct ibv_port_attr, state, VerbsPortInfo, state);
SAME(struct ibv_port_attr, active_mtu, VerbsPortInfo, mtu);
SAME(struct ibv_port_attr, gid_tbl_len, VerbsPortInfo, gids);
SAME(struct ibv_port_attr, lid, VerbsPortInfo, lid);
SAME(struct ibv_port_attr, link_layer, VerbsPortInfo, link);

SIZE(struct ibv_gid_entry, VerbsGidEntry);
SAME(struct ibv_gid_entry, gid_index, VerbsGidEntry, row);
SAME(struct ibv_gid_entry, port_num, VerbsGidEntry, port);
SAME(struct ibv_gid_entry, gid_type, VerbsGidEntry, type);

SIZE(struct ibv_qp_init_attr, VerbsPairInfo);
SAME(struct ibv_qp_init_attr, send_cq, VerbsPairInfo, send_queue);
SAME(struct ibv_qp_init_attr, recv_cq, VerbsPairInfo, receive_queue);
SAME(struct ibv_qp_init_attr, cap, VerbsPairInfo, limits);
SAME(struct ibv_qp_init_attr, qp_type, VerbsPairInfo, type);
SAME(struct ibv_qp_init_attr, sq_sig_all, VerbsPairInfo, signal_all);
SAME(struct ibv_qp_cap, max_recv_wr, VerbsLimits, receives);
SAME(struct ibv_qp_cap, max_send_sge, VerbsLimits, send_pieces);

SIZE(struct ibv_ah_attr, VerbsAddress);
SAME(struct ibv_ah_attr, grh.dgid, VerbsAddress, route.gid);
SAME(struct ibv_ah_attr, grh.sgid_index, VerbsAddress, route.row);
SAME(struct ibv_ah_attr, grh.hop_limit, VerbsAddress, route.hops);
SAME(struct ibv_ah_attr, grh.traffic_class, VerbsAddress, route.traffic_class);
SAME(struct ibv_ah_attr, dlid, VerbsAddress, lid);
SAME(struct ibv_ah_attr, sl, VerbsAddress, service_level);
SAME(struct ibv_ah_attr, is_global, VerbsAddress, routed);
SAME(struct ibv_ah_attr, port_num, VerbsAddress, port);

SIZE(struct ibv_qp_attr, VerbsPairState);
SAME(struct ibv_qp_attr, qp_state, VerbsPairState, state);
SAME(struct ibv_qp_attr, path_mtu, VerbsPairState, mtu);
SAME(struct ibv_qp_attr, rq_psn, VerbsPairState, receive_packet);
SAME(struct ibv_qp_attr, sq_psn, VerbsPairState, send_packet);
SAME(struct ibv_qp_attr, dest_qp_num, VerbsPairState, peer);
SAME(struct ibv_qp_attr, qp_access_flags, VerbsPairState, access);
SAME(struct ibv_qp_attr, ah_attr, VerbsPairState, address);
SAME(struct ibv_qp_attr, pkey_index, VerbsPairState, key_index);
SAME(struct ibv_qp_attr, max_rd_atomic, VerbsPairState, reads);
SAME(struct ibv_qp_attr, max_dest_rd_atomic, VerbsPairState, peer_reads);
SAME(struct ibv_qp_attr, min_rnr_timer, VerbsPairState, receiver_timer);
SAME(struct ibv_qp_attr, port_num, VerbsPairState, port);
SAME(struct ibv_qp_attr, timeout, VerbsPairState, timeout);
SAME(struct ibv_qp_attr, retry_cnt, VerbsPairState, retries);
SAME(struct ibv_qp_attr, rnr_retry, VerbsPairState, receiver_retries);

VALUE(IBV_WR_RDMA_WRITE, WR_WRITE);
VALUE(IBV_WR_RDMA_WRITE_WITH_IMM, WR_WRITE_IMM);
VALUE(IBV_WR_SEND, WR_SEND);
VALUE(IBV_WR_LOCAL_INV, WR_INVALIDATE);
VALUE(IBV_WR_BIND_MW, WR_BIND);
VALUE(IBV_SEND_SIGNALED, SEND_SIGNALED);
VALUE(IBV_WC_RECV, WC_RECEIVED);
VALUE(IBV_WC_RECV_RDMA_WITH_IMM, WC_RECEIVED_IMM);
VALUE(IBV_ACCESS_LOCAL_WRITE, ACCESS_LOCAL_WRITE);
VALUE(IBV_ACCESS_REMOTE_WRITE, ACCESS_REMOTE_WRITE);
VALUE(IBV_ACCESS_MW_BIND, ACCESS_BIND);
VALUE(IBV_MW_TYPE_2, WINDOW_TYPE_2);
VALUE(IBV_DEVICE_MEM_WINDOW_TYPE_2B, DEVICE_WINDOW_2B);
VALUE(IBV_PORT_ACTIVE, PORT_ACTIVE);
VALUE(IBV_LINK_LAYER_INFINIBAND, LINK_INFINIBAND);
VALUE(IBV_QPT_RC, TYPE_RC);
VALUE(IBV_QPS_RESET, STATE_RESET);
VALUE(IBV_QPS_INIT, STATE_INIT);
VALUE(IBV_QPS_RTR, STATE_READY_TO_RECEIVE);
VALUE(IBV_QPS_RTS, STATE_READY_TO_SEND);
VALUE(IBV_QPS_ERR, STATE_ERROR);
VALUE(IBV_QP_STATE, SET_STATE);
VALUE(IBV_QP_ACCESS_FLAGS, SET_ACCESS);
VALUE(IBV_QP_PKEY_INDEX, SET_PKEY_INDEX);
VALUE(IBV_QP_PORT, SET_PORT);
VALUE(IBV_QP_AV, SET_ADDRESS);
VALUE(IBV_QP_PATH_MTU, SET_MTU);
VALUE(IBV_QP_TIMEOUT, SET_TIMEOUT);
VALUE(IBV_QP_RETRY_CNT, SET_RETRIES);
VALUE(IBV_QP_RNR_RETRY, SET_RECEIVER_RETRIES);
VALUE(IBV_QP_RQ_PSN, SET_RECEIVE_PACKET);
VALUE(IBV_QP_MAX_QP_RD_ATOMIC, SET_READS);
VALUE(IBV_QP_MIN_RNR_TIMER, SET_RECEIVER_TIMER);
VALUE(IBV_QP_SQ_PSN, SET_SEND_PACKET);
VALUE(IBV_QP_MAX_DEST_RD_ATOMIC, SET_PEER_READS);
VALUE(IBV_QP_DEST_QPN, SET_PEER);
