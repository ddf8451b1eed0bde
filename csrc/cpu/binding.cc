// What Python calls: checks the tensors, fills the plain arguments, and runs them on the asked
// level.
//
// No function keeps a tensor. A failed check is a bug of the caller and raises ValueError with the
// broken condition.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "blocks.h"
#include "cores.h"
#include "kernels.h"
#include "machine.h"
#include "pool.h"
#include "ranks.h"
#include "tensors.h"

namespace diptych::cpu {
namespace {

using tvm::ffi::String;

const KernelTable* const kLevels[] = {  // in the order of `Level`
    &kPlain,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512,
    &kAvx512Bf16,
    &kAmx,
#endif
};
constexpr int64_t kNumLevels = sizeof kLevels / sizeof kLevels[0];

}  // namespace

const KernelTable& table(int64_t level) {
  CHECK(level >= 0 && level < kNumLevels);
  return *kLevels[level];
}

namespace {

int64_t size_of_packed(int64_t num_out, int64_t num_in, bool bf16) {
  return packed_size(num_out, num_in, bf16);
}

void pack_linear(int64_t level, TensorView packed, TensorView weight) {
  CHECK(weight.ndim() == 2 && weight.IsContiguous() && packed.IsContiguous());
  const DType dtype = model_dtype(weight);
  const int64_t num_out = weight.size(0), num_in = weight.size(1);
  CHECK(model_dtype(packed) == dtype &&
        packed.numel() == packed_size(num_out, num_in, dtype == DType::kBF16));
  table(level).pack({data<void>(packed), data<void>(weight), num_out, num_in, dtype});
}

void linear(int64_t level, TensorView out, TensorView x, TensorView packed,
            Optional<TensorView> bias) {
  const int64_t rows = x.size(0);
  CHECK(out.size(0) == rows);
  table(level).linear({model_weights(packed, bias, out.size(1), x.size(1)), dense_floats(out, 2),
                       dense_floats(x, 2), rows, {}});
}

void linear_narrow(int64_t level, TensorView out, TensorView x, TensorView packed,
                   TensorView scales, Optional<TensorView> bias, int64_t bits, int64_t group,
                   int64_t act_bits) {
  const int64_t rows = x.size(0);
  CHECK(out.size(0) == rows);
  table(level).linear(
      {narrow_weights(packed, scales, bias, out.size(1), x.size(1), bits, group, act_bits),
       dense_floats(out, 2), dense_floats(x, 2), rows, {}});
}

void embedding(int64_t level, TensorView out, TensorView weights, TensorView ids) {
  CHECK(weights.ndim() == 2 && weights.IsContiguous() && out.size(1) == weights.size(1));
  const int64_t rows = out.size(0);
  const int32_t* tokens = ints(ids, rows);
  check_range(tokens, rows, 0, weights.size(0));
  table(level).embedding(
      {dense_floats(out, 2), data<void>(weights), tokens, rows, out.size(1), model_dtype(weights),
       false});
}

// The same from the packed weights of a linear layer with `vocab` outputs.
void embedding_packed(int64_t level, TensorView out, TensorView packed, TensorView ids,
                      int64_t vocab) {
  const int64_t rows = out.size(0), dim = out.size(1);
  const DType dtype = model_dtype(packed);
  const int32_t* tokens = ints(ids, rows);
  CHECK(packed.IsContiguous() &&
        packed.numel() == packed_size(vocab, dim, dtype == DType::kBF16));
  check_range(tokens, rows, 0, vocab);
  table(level).embedding(
      {dense_floats(out, 2), data<void>(packed), tokens, rows, dim, dtype, true});
}

void rms_norm(int64_t level, TensorView out, TensorView x, TensorView weight, double eps) {
  const int64_t rows = x.size(0), dim = x.size(1);
  CHECK(out.size(0) == rows && out.size(1) == dim && weight.size(0) == dim);
  table(level).norm({dense_floats(out, 2), nullptr, dense_floats(x, 2), dense_floats(weight, 1),
                     rows, dim, static_cast<float>(eps)});
}

void add_rms_norm(int64_t level, TensorView out, TensorView residual, TensorView x,
                  TensorView weight, double eps) {
  const int64_t rows = x.size(0), dim = x.size(1);
  CHECK(out.size(0) == rows && out.size(1) == dim && weight.size(0) == dim);
  CHECK(residual.size(0) == rows && residual.size(1) == dim);
  table(level).norm({dense_floats(out, 2), dense_floats(residual, 2), dense_floats(x, 2),
                     dense_floats(weight, 1), rows, dim, static_cast<float>(eps)});
}

void rope(int64_t level, TensorView q, TensorView k, TensorView positions, TensorView cos_sin) {
  const int64_t rows = q.size(0), dim = q.size(2);
  CHECK(k.size(0) == rows && k.size(2) == dim && dim % 2 == 0 && cos_sin.size(1) == dim);
  const int32_t* at = ints(positions, rows);
  check_range(at, rows, 0, cos_sin.size(0));
  table(level).rope({floats(q, 3), floats(k, 3), row_stride(q), row_stride(k), at,
                     dense_floats(cos_sin, 2), rows, q.size(1), k.size(1), dim});
}

void silu_mul(int64_t level, TensorView out, TensorView gate_up) {
  CHECK(gate_up.size(0) == out.size(0) && gate_up.size(1) == 2 * out.size(1));
  table(level).silu_mul({dense_floats(out, 2), dense_floats(gate_up, 2), out.size(0), out.size(1)});
}

void write_kv(int64_t level, TensorView k_cache, TensorView v_cache, TensorView k, TensorView v,
              TensorView slots) {
  const CacheView keys = cache_view(k_cache), values = cache_view(v_cache);
  const int64_t rows = k.size(0);
  check_same_cache(k_cache, v_cache);
  CHECK(k.size(1) == keys.heads && k.size(2) == keys.dim);
  CHECK(v.size(0) == rows && v.size(1) == keys.heads && v.size(2) == keys.dim);
  const int32_t* to = ints(slots, rows);
  check_range(to, rows, -1, k_cache.size(0) * keys.block_size);
  table(level).write_kv(
      {keys, values, floats(k, 3), floats(v, 3), row_stride(k), row_stride(v), to, rows});
}

void attention(int64_t level, TensorView out, TensorView q, TensorView k_cache, TensorView v_cache,
               TensorView qo_indptr, TensorView kv_indptr, TensorView kv_indices, TensorView kv_len,
               double scale, int64_t window) {
  const CacheView keys = cache_view(k_cache), values = cache_view(v_cache);
  const int64_t seqs = kv_len.size(0), heads = q.size(1), rows = q.size(0);
  check_same_cache(k_cache, v_cache);
  CHECK(q.size(2) == keys.dim && heads % keys.heads == 0);
  CHECK(out.size(0) == rows && out.size(1) == heads && out.size(2) == keys.dim);
  AttentionArgs args{dense_floats(out, 3),
                     floats(q, 3),
                     row_stride(q),
                     keys,
                     values,
                     ints(qo_indptr, seqs + 1),
                     ints(kv_indptr, seqs + 1),
                     ints(kv_indices, kv_indices.size(0)),
                     ints(kv_len, seqs),
                     seqs,
                     heads,
                     static_cast<float>(scale),
                     window};
  check_sequences(args.qo_indptr, args.kv_indptr, args.kv_indices, kv_indices.size(0),
                  args.kv_len, seqs, rows, k_cache.size(0), keys.block_size);
  table(level).attention(args);
}

void argmax_logprob(int64_t level, TensorView ids, TensorView logprobs, TensorView logits) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  CHECK(logprobs.size(0) == rows && vocab > 0);
  int32_t* chosen = const_cast<int32_t*>(ints(ids, rows));
  table(level).logits(
      {dense_floats(logits, 2), rows, vocab, chosen, dense_floats(logprobs, 1), nullptr});
}

void log_softmax(int64_t level, TensorView out, TensorView logits) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  CHECK(out.size(0) == rows && out.size(1) == vocab && vocab > 0);
  table(level).logits(
      {dense_floats(logits, 2), rows, vocab, nullptr, nullptr, dense_floats(out, 2)});
}

void sum_of_parts(TensorView out, TensorView parts) {
  CHECK(parts.ndim() == 2 && parts.size(0) > 0 && parts.size(1) == out.numel());
  CHECK(is_type(out, kDLFloat, 32) && out.IsContiguous() && out.device().device_type == kDLCPU);
  sum_parts(data<float>(out), dense_floats(parts, 2), parts.size(0), out.numel());
}

void meet_ranks(TensorView meeting, int64_t num_ranks) {
  int32_t* words = const_cast<int32_t*>(ints(meeting, kMeetingWords));
  CHECK(reinterpret_cast<uintptr_t>(words) % 64 == 0 && num_ranks > 0);
  meet(words, num_ranks);
}

int64_t meeting_words() { return kMeetingWords; }

// Reads `data` once with every thread; returns nothing that matters.
void probe_read(int64_t level, TensorView data_read) {
  const float* from = dense_floats(data_read, 1);
  const int64_t items = num_threads();
  auto* sums = static_cast<float*>(scratch(kScratchCall, static_cast<size_t>(items) * 4));
  table(level).probe({from, data_read.numel(), false, 0.0f, sums, items});
}

// Multiplies and adds, `rounds` times on every thread; returns the operations done.
int64_t probe_compute(int64_t level, int64_t rounds, bool pairs) {
  const int64_t items = num_threads();
  auto* sums = static_cast<float*>(scratch(kScratchCall, static_cast<size_t>(items) * 4));
  table(level).probe({nullptr, rounds, pairs, 1e-9f, sums, items});
  return items * rounds * table(level).probe_operations(pairs);
}

// The digest of each of these blocks of a pool, which is given by address: it may be mapped without
// the right to write.
void digest_blocks(int64_t pool, TensorView blocks, int64_t block_bytes, TensorView digests) {
  const int64_t count = digests.numel();
  CHECK(block_bytes >= kDigestBytesMin && is_type(digests, kDLInt, 64) && digests.IsContiguous());
  const int32_t* wanted = ints(blocks, count);
  auto* found = data<int64_t>(digests);
  auto block = [&](int64_t i) {
    return i < count ? reinterpret_cast<const char*>(pool) + wanted[i] * block_bytes : nullptr;
  };
  for (int64_t i = 0; i < count; ++i) CHECK(wanted[i] >= 0);
  for (int64_t i = 0; i < count; ++i)
    found[i] = static_cast<int64_t>(digest(block(i), block_bytes, block(i + 1)));
}

// Copies block from_blocks[i] of one pool over block to_blocks[i] of another; digests[i] is that of
// the copy.
void copy_blocks(int64_t to, TensorView to_blocks, int64_t from, TensorView from_blocks,
                 int64_t block_bytes, TensorView digests) {
  const int64_t count = digests.numel();
  CHECK(block_bytes >= kDigestBytesMin && is_type(digests, kDLInt, 64) && digests.IsContiguous());
  const int32_t* mine = ints(to_blocks, count);
  const int32_t* theirs = ints(from_blocks, count);
  auto* found = data<int64_t>(digests);
  auto source = [&](int64_t i) {
    return i < count ? reinterpret_cast<const char*>(from) + theirs[i] * block_bytes : nullptr;
  };
  for (int64_t i = 0; i < count; ++i) CHECK(mine[i] >= 0 && theirs[i] >= 0);
  for (int64_t i = 0; i < count; ++i) {
    auto* target = reinterpret_cast<char*>(to) + mine[i] * block_bytes;
    found[i] =
        static_cast<int64_t>(copy_digest(target, source(i), block_bytes, source(i + 1)));
  }
}

String level_name(int64_t level) { return table(level).name; }

int64_t num_levels() { return kNumLevels; }

bool has_level(int64_t level) { return machine_has(static_cast<Level>(level)); }

int64_t rank_of_level(int64_t level) { return level_rank(static_cast<Level>(level)); }

const uint8_t* core_table(const TensorView& t) {
  CHECK(is_type(t, kDLUInt, 8) && t.ndim() == 1 && t.IsContiguous());
  return data<const uint8_t>(t);
}

// Unlike all others this keeps a tensor's memory: the caller leaves it mapped.
void share(TensorView states, int64_t slot, TensorView cores, int64_t prefill_share) {
  const int64_t slots = states.size(0), num_cores = cores.size(0);
  CHECK(slot >= 0 && slot < slots && num_cores > 0 && num_cores <= kCoresMax);
  CHECK(prefill_share >= 0 && prefill_share <= 100);
  share_cores(core_table(states), static_cast<int>(slots), static_cast<int>(slot),
              ints(cores, num_cores), static_cast<int>(num_cores),
              static_cast<int>(prefill_share));
}

// out: begin, end and seat of the span (cores.h).
void span(TensorView out, TensorView states, int64_t slot, int64_t num_cores,
          int64_t prefill_share, int64_t limit) {
  CHECK(slot >= 0 && slot < states.size(0) && num_cores > 0 && limit > 0);
  const CoreSpan found = seated_span(core_table(states), static_cast<int>(states.size(0)),
                                     static_cast<int>(slot), static_cast<int>(num_cores),
                                     static_cast<int>(prefill_share), static_cast<int>(limit));
  auto* to = const_cast<int32_t*>(ints(out, 3));
  to[0] = found.begin, to[1] = found.end, to[2] = found.seat;
}

void count_items(TensorView out) {
  CHECK(is_type(out, kDLInt, 64) && out.ndim() == 1 && out.IsContiguous());
  CHECK(out.size(0) <= kCoresMax);
  items_of_cores(data<int64_t>(out), static_cast<int>(out.size(0)));
}

void set_threads(int64_t num_threads) { set_num_threads(static_cast<int>(num_threads)); }

}  // namespace
}  // namespace diptych::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_levels, diptych::cpu::num_levels)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(level_name, diptych::cpu::level_name)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(machine_has, diptych::cpu::has_level)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(level_rank, diptych::cpu::rank_of_level)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, diptych::cpu::set_threads)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(share_cores, diptych::cpu::share)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(core_span, diptych::cpu::span)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(items_of_cores, diptych::cpu::count_items)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_size, diptych::cpu::size_of_packed)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_linear, diptych::cpu::pack_linear)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear, diptych::cpu::linear)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_narrow, diptych::cpu::linear_narrow)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embedding, diptych::cpu::embedding)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embedding_packed, diptych::cpu::embedding_packed)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, diptych::cpu::rms_norm)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, diptych::cpu::add_rms_norm)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope, diptych::cpu::rope)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, diptych::cpu::silu_mul)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_kv, diptych::cpu::write_kv)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, diptych::cpu::attention)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(argmax_logprob, diptych::cpu::argmax_logprob)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sum_parts, diptych::cpu::sum_of_parts)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(meet, diptych::cpu::meet_ranks)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(meeting_words, diptych::cpu::meeting_words)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_read, diptych::cpu::probe_read)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_compute, diptych::cpu::probe_compute)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(log_softmax, diptych::cpu::log_softmax)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(digest_blocks, diptych::cpu::digest_blocks)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_blocks, diptych::cpu::copy_blocks)
