#include "container_entry.h"
#include "kv_attention.cuh"

namespace {

bitpalette::KvRotation rotation_of(const float* matrix, int64_t width) {
    const int64_t whole = width & -width;
    int log2 = 0;
    while (int64_t{1} << log2 < whole)
        ++log2;
    return {matrix, static_cast<int>(width / whole), log2, static_cast<float>(1 / std::sqrt(double(whole)))};
}

// numbers: bits_k, bits_v, table_row, then of each of three pieces: slots and six strides, dense_dtype, batch, kv_heads,
// group, tokens, head_dim, head_dim_v, sliding_window, q_dtype, out_dtype, rotate, splits, dense_splits, shared_limit
bitpalette::KvAttentionArgs args_of(const int64_t* n) {
    bitpalette::KvAttentionArgs args{};
    const auto next = [&] { return static_cast<int>(*n++); };
    args.bits_k = next();
    args.bits_v = next();
    args.table_row = next();
    for (auto& d : args.dense) {
        d.slots = next();
        for (int64_t* stride :
             {&d.key_batch, &d.key_token, &d.key_head, &d.value_batch, &d.value_token, &d.value_head})
            *stride = next();
    }
    args.dense_dtype = static_cast<bitpalette::Dtype>(next());
    args.batch = next();
    args.kv_heads = next();
    args.group = next();
    args.tokens = next();
    args.head_dim = next();
    args.head_dim_v = next();
    args.sliding_window = next();
    args.q_dtype = static_cast<bitpalette::Dtype>(next());
    args.out_dtype = static_cast<bitpalette::Dtype>(next());
    args.rotate_q = args.rotate_out = next() != 0;
    args.splits = next();
    args.dense_splits = next();
    return args;
}

} // namespace

// pieces: keys, values, lengths, first of sinks, window, fresh; null where there are none. reals: scale, softcap.
extern "C" int run_kv_attention(const int64_t* numbers, int shared_limit, const float* reals, const uint8_t* k_codes,
                                const uint8_t* v_codes, const uint16_t* k_gain, const uint16_t* v_gain,
                                const int32_t* table, const int32_t* lengths, const void* sink_k, const void* sink_v,
                                const int32_t* sink_length, const void* window_k, const void* window_v,
                                const int32_t* window_length, const int32_t* window_first, const void* fresh_k,
                                const void* fresh_v, const int32_t* fresh_length, const int32_t* start,
                                const float* sink_logits, const float* matrix_k, const float* matrix_v, const void* q,
                                void* out, float* parts) {
    bitpalette::KvAttentionArgs args = args_of(numbers);
    args.scale = reals[0];
    args.softcap = reals[1];
    args.k_codes = k_codes;
    args.v_codes = v_codes;
    args.k_gain = k_gain;
    args.v_gain = v_gain;
    args.block_table = table;
    args.lengths = lengths;
    const void* keys[] = {sink_k, window_k, fresh_k};
    const void* values[] = {sink_v, window_v, fresh_v};
    const int32_t* pieces[] = {sink_length, window_length, fresh_length};
    for (int i = 0; i < 3; ++i) {
        args.dense[i].keys = keys[i];
        args.dense[i].values = values[i];
        args.dense[i].lengths = pieces[i];
    }
    args.dense[1].first = window_first;
    args.start = start;
    args.sink_logits = sink_logits;
    args.rotation_q = rotation_of(matrix_k, args.head_dim);
    args.rotation_out = rotation_of(matrix_v, args.head_dim_v);
    args.q = q;
    args.out = out;
    args.parts = parts;
    try {
        return bitpalette::kv_attention(args, shared_limit, nullptr);
    } catch (const std::invalid_argument& error) {
        std::snprintf(bitpalette::refusal, sizeof bitpalette::refusal, "%s", error.what());
        return -1;
    }
}
