// A decoder as one object: made once from packed weights and a pool, then run step by step.
//
// `Layers` owns the activations and derived indices of a step (grown to the largest, never shrunk)
// and nothing else: weights, norms, caches and the pulse are kept as addresses, and the caller keeps
// their tensors alive. One thread at a time. Invariant: sizes are checked when a part is added,
// indices in every call.
#include <stdlib.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>

#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "tensors.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kRowsMin = 16;  // of the smallest buffers
constexpr int kParts = 6;         // of the activations: a buffer each

// What stands before the first layer and after the last.
struct Ends {
  const void* embedding;  // as in EmbeddingArgs
  int64_t tokens;         // in it; 0: the ends are not known yet
  DType dtype;            // of it
  bool packed;
  const float* norm;  // [hidden]
  LinearWeights head;
};

struct Freed {
  void operator()(float* p) const { free(p); }
};

class LayersObj : public tvm::ffi::Object {
 public:
  DecoderShape shape{};
  std::vector<LayerWeights> layers;
  int weights_left = 0;  // of the newest layer, still to come
  int64_t num_blocks = 0;
  Ends ends{};
  uint64_t* pulse = nullptr;  // or null: one more after each layer, for others to see

  // The buffers of a step of so many rows; the indices are left open.
  StepArgs buffers(int64_t rows) {
    const int64_t heads = shape.q_heads + 2 * shape.kv_heads;
    const int64_t widths[kParts] = {shape.hidden,    shape.hidden, heads * shape.dim,
                                    shape.q_heads * shape.dim, 2 * shape.inner, shape.inner};
    if (rows > capacity_) grow(rows > 2 * capacity_ ? rows : 2 * capacity_, widths);
    float* parts[kParts];
    float* next = memory_.get();
    for (int i = 0; i < kParts; ++i) {
      parts[i] = next;
      next += part_size(capacity_, widths[i]);
    }
    StepArgs step{};
    step.residual = parts[0], step.hidden = parts[1], step.qkv = parts[2];
    step.attention = parts[3], step.gate_up = parts[4], step.inner = parts[5], step.rows = rows;
    return step;
  }

  // Of the rows of a decode step, uninitialised; as `buffers`.
  int32_t* slots() { return indices_.get(); }
  int32_t* kv_len() { return indices_.get() + capacity_; }
  int32_t* qo_indptr() { return indices_.get() + 2 * capacity_; }  // [capacity + 1]

  // needed: of the last layer, or null for all rows.
  void run(int64_t level, const StepArgs& step, const LastRows* needed) const {
    const size_t count = layers.size();
    for (size_t i = 0; i < count; ++i) {
      const bool last = i + 1 == count;
      const LinearWeights* head = ends.tokens > 0 ? &ends.head : nullptr;
      table(level).layer({layers[i], shape, step, i == 0 ? nullptr : &layers[i - 1], last, last ? head : &layers[i + 1].qkv,
                          last ? needed : nullptr});
      if (pulse != nullptr) __atomic_store_n(pulse, *pulse + 1, __ATOMIC_RELAXED);  // one writer
    }
  }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("diptych.Layers", LayersObj, tvm::ffi::Object);

 private:
  static int64_t part_size(int64_t rows, int64_t width) { return round_up(rows * width, 16); }

  void grow(int64_t rows, const int64_t (&widths)[kParts]) {
    if (rows < kRowsMin) rows = kRowsMin;
    int64_t size = 0;
    for (int64_t width : widths) size += part_size(rows, width);
    memory_.reset(static_cast<float*>(aligned_alloc(64, static_cast<size_t>(size) * 4)));
    if (memory_ == nullptr) throw std::bad_alloc();
    indices_ = std::make_unique<int32_t[]>(static_cast<size_t>(3 * rows + 1));
    capacity_ = rows;
  }

  std::unique_ptr<float, Freed> memory_;
  std::unique_ptr<int32_t[]> indices_;
  int64_t capacity_ = 0;  // rows
};

class Layers : public tvm::ffi::ObjectRef {
 public:
  explicit Layers(tvm::ffi::ObjectPtr<LayersObj> made) : ObjectRef(std::move(made)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layers, tvm::ffi::ObjectRef, LayersObj);
};

Layers new_layers(TensorView cos_sin, double eps, double scale, Optional<TensorView> pulse) {
  auto made = tvm::ffi::make_object<LayersObj>();
  if (pulse.has_value()) {
    CHECK(is_type(*pulse, kDLInt, 64) && (*pulse).numel() == 1);
    made->pulse = data<uint64_t>(*pulse);
  }
  DecoderShape& shape = made->shape;
  shape.cos_sin = dense_floats(cos_sin, 2);
  shape.positions = cos_sin.size(0), shape.dim = cos_sin.size(1);
  shape.eps = static_cast<float>(eps), shape.scale = static_cast<float>(scale);
  return Layers(std::move(made));
}

const float* norm_of(const Optional<TensorView>& norm, int64_t size) {
  if (!norm.has_value()) return nullptr;
  CHECK((*norm).size(0) == size);
  return dense_floats(*norm, 1);
}

// One more layer; `add_weights` follows four times.
void add_layer(Layers layers, TensorView attn_norm, TensorView mlp_norm,
               Optional<TensorView> q_norm, Optional<TensorView> k_norm, TensorView k_cache,
               TensorView v_cache, int64_t window) {
  DecoderShape& shape = layers->shape;
  LayerWeights layer{};
  layer.k_cache = cache_view(k_cache), layer.v_cache = cache_view(v_cache);
  check_same_cache(k_cache, v_cache);
  CHECK(layers->weights_left == 0 && layer.k_cache.dim == shape.dim);
  if (layers->layers.empty()) {
    shape.hidden = attn_norm.size(0), shape.kv_heads = k_cache.size(1);
    layers->num_blocks = k_cache.size(0);
  }
  CHECK(k_cache.size(0) == layers->num_blocks && k_cache.size(1) == shape.kv_heads);
  CHECK(layers->layers.empty() ||
        layers->layers[0].k_cache.block_size == layer.k_cache.block_size);
  CHECK(q_norm.has_value() == k_norm.has_value());
  layer.attn_norm = norm_of(attn_norm, shape.hidden);
  layer.mlp_norm = norm_of(mlp_norm, shape.hidden);
  layer.q_norm = norm_of(q_norm, shape.dim), layer.k_norm = norm_of(k_norm, shape.dim);
  layer.window = window;
  layers->layers.push_back(layer);
  layers->weights_left = 4;
}

// The next of qkv, o, gate_up and down of the newest layer; scales: of narrow weights.
void add_weights(Layers layers, TensorView packed, Optional<TensorView> scales,
                 Optional<TensorView> bias, int64_t num_out, int64_t num_in, int64_t bits,
                 int64_t group, int64_t act_bits) {
  CHECK(layers->weights_left > 0);
  const LinearWeights weights =
      scales.has_value()
          ? narrow_weights(packed, *scales, bias, num_out, num_in, bits, group, act_bits)
          : model_weights(packed, bias, num_out, num_in);
  LayerWeights& layer = layers->layers.back();
  DecoderShape& shape = layers->shape;
  const bool first = layers->layers.size() == 1;
  switch (layers->weights_left--) {
    case 4:
      if (first) shape.q_heads = num_out / shape.dim - 2 * shape.kv_heads;
      CHECK(num_in == shape.hidden && shape.q_heads > 0 && shape.q_heads % shape.kv_heads == 0);
      CHECK(num_out == (shape.q_heads + 2 * shape.kv_heads) * shape.dim);
      layer.qkv = weights;
      break;
    case 3:
      CHECK(num_in == shape.q_heads * shape.dim && num_out == shape.hidden);
      layer.o = weights;
      break;
    case 2:
      if (first) shape.inner = num_out / 2;
      CHECK(num_in == shape.hidden && num_out == 2 * shape.inner);
      layer.gate_up = weights;
      break;
    default:
      CHECK(num_in == shape.inner && num_out == shape.hidden);
      layer.down = weights;
  }
}

// The embedding ([tokens, hidden], or the packed weights of a linear layer with `tokens` outputs), the
// last norm and the output head. All layers were added before.
void add_ends(Layers layers, TensorView embedding, int64_t tokens, TensorView norm,
              TensorView head, Optional<TensorView> head_bias, int64_t vocab) {
  const int64_t hidden = layers->shape.hidden;
  const DType dtype = model_dtype(embedding);
  const bool packed = embedding.ndim() == 1;
  CHECK(!layers->layers.empty() && layers->weights_left == 0 && tokens > 0);
  CHECK(embedding.IsContiguous() && embedding.device().device_type == kDLCPU);
  CHECK(embedding.numel() ==
        (packed ? packed_size(tokens, hidden, dtype == DType::kBF16) : tokens * hidden));
  layers->ends = {data<void>(embedding), tokens, dtype, packed, norm_of(norm, hidden),
                  model_weights(head, head_bias, vocab, hidden)};
}

// The last tokens of the sequences in `outputs` (ascending) as the rows that the last layer ends with.
// Indices are put into `indices`.
LastRows last_rows(const StepArgs& step, const int32_t* outputs, int64_t count,
                   std::vector<int32_t>& indices) {
  indices.resize(static_cast<size_t>(4 * count + 1));
  int32_t *rows = indices.data(), *kv_indptr = rows + count, *kv_len = kv_indptr + count,
          *qo_indptr = kv_len + count;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t seq = outputs[i];
    CHECK(i == 0 || outputs[i - 1] < seq);
    CHECK(step.qo_indptr[seq] < step.qo_indptr[seq + 1]);
    rows[i] = step.qo_indptr[seq + 1] - 1;
    kv_indptr[i] = step.kv_indptr[seq];  // only where a table starts is read
    kv_len[i] = step.kv_len[seq];
    qo_indptr[i] = static_cast<int32_t>(i);
  }
  qo_indptr[count] = static_cast<int32_t>(count);
  LastRows last{step, rows};
  last.step.rows = last.step.num_seqs = count;
  last.step.qo_indptr = qo_indptr, last.step.kv_indptr = kv_indptr, last.step.kv_len = kv_len;
  return last;
}

// All layers of a step over `residual`, [rows, hidden]; the rest as in single calls. outputs: the
// sequences, ascending, whose last rows are needed after the last layer; without it all rows are.
void run_layers(int64_t level, Layers layers, TensorView residual, TensorView positions,
                TensorView slots, TensorView qo_indptr, TensorView kv_indptr,
                TensorView kv_indices, TensorView kv_len, Optional<TensorView> outputs) {
  const int64_t rows = residual.size(0), seqs = kv_len.size(0);
  CHECK(layers->weights_left == 0);
  CHECK(residual.ndim() == 2 && residual.size(1) == layers->shape.hidden);
  if (layers->layers.empty() || rows == 0) return;
  const int64_t block_size = layers->layers[0].k_cache.block_size;
  StepArgs step = layers->buffers(rows);
  step.residual = dense_floats(residual, 2);
  step.positions = ints(positions, rows), step.slots = ints(slots, rows);
  step.qo_indptr = ints(qo_indptr, seqs + 1), step.kv_indptr = ints(kv_indptr, seqs + 1);
  step.kv_indices = ints(kv_indices, kv_indices.size(0)), step.kv_len = ints(kv_len, seqs);
  step.num_seqs = seqs;
  check_range(step.positions, rows, 0, layers->shape.positions);
  check_range(step.slots, rows, -1, layers->num_blocks * block_size);
  check_sequences(step.qo_indptr, step.kv_indptr, step.kv_indices, kv_indices.size(0), step.kv_len,
                  seqs, rows, layers->num_blocks, block_size);
  if (!outputs.has_value()) return layers->run(level, step, nullptr);
  const int64_t count = (*outputs).numel();
  check_range(ints(*outputs, count), count, 0, seqs);
  std::vector<int32_t> indices;
  const LastRows needed = last_rows(step, ints(*outputs, count), count, indices);
  layers->run(level, step, &needed);
}

// Fills in what follows from a decode step's positions and tables; false: a row needs a block that
// its table lacks. num_indices: in `step.kv_indices`.
bool place_rows(LayersObj& layers, StepArgs& step, int64_t num_indices) {
  const int64_t block_size = layers.layers[0].k_cache.block_size;
  int32_t *slots = layers.slots(), *kv_len = layers.kv_len(), *qo_indptr = layers.qo_indptr();
  check_range(step.positions, step.rows, 0, layers.shape.positions);
  for (int64_t r = 0; r < step.rows; ++r) {
    const int64_t begin = step.kv_indptr[r], end = step.kv_indptr[r + 1];
    const int64_t position = step.positions[r], last = position / block_size;
    CHECK(0 <= begin && begin <= end && end <= num_indices);
    if (begin + last >= end) return false;
    const int32_t* blocks = step.kv_indices + begin;
    check_range(blocks, last + 1, 0, layers.num_blocks);
    slots[r] = static_cast<int32_t>(blocks[last] * block_size + position % block_size);
    kv_len[r] = static_cast<int32_t>(position + 1);
    qo_indptr[r] = static_cast<int32_t>(r);
  }
  qo_indptr[step.rows] = static_cast<int32_t>(step.rows);
  step.slots = slots, step.kv_len = kv_len, step.qo_indptr = qo_indptr;
  step.num_seqs = step.rows;
  return true;
}

// A whole step of `rows` sequences with one token each, from token ids to logits ([rows, vocab]), and
// where `choose` says so to the greedy choice. Tensors may be longer than the step; row r's blocks
// are kv_indices[kv_indptr[r]:kv_indptr[r + 1]], at least those that it needs. False, and nothing
// done: a row needs more blocks than that.
bool decode(int64_t level, Layers layers, int64_t rows, TensorView ids, TensorView positions,
            TensorView kv_indptr, TensorView kv_indices, TensorView logits, TensorView chosen,
            TensorView logprobs, bool choose) {
  const Ends& ends = layers->ends;
  const DecoderShape& shape = layers->shape;
  CHECK(ends.tokens > 0 && rows > 0);
  const int32_t* tokens = ints_of(ids, rows);
  check_range(tokens, rows, 0, ends.tokens);
  StepArgs step = layers->buffers(rows);
  step.positions = ints_of(positions, rows), step.kv_indptr = ints_of(kv_indptr, rows + 1);
  step.kv_indices = ints_of(kv_indices, 0);
  CHECK(logits.size(0) >= rows && logits.size(1) == ends.head.num_out);
  const LogitsArgs choice{dense_floats(logits, 2), rows, ends.head.num_out,
                          const_cast<int32_t*>(ints_of(chosen, rows)), dense_floats(logprobs, 1),
                          nullptr};
  CHECK(logprobs.size(0) >= rows);
  if (!place_rows(*layers.operator->(), step, kv_indices.size(0))) return false;
  const KernelTable& kernels = table(level);
  kernels.embedding({step.residual, ends.embedding, tokens, rows, shape.hidden, ends.dtype,
                     ends.packed});
  layers->run(level, step, nullptr);
  kernels.norm({step.hidden, nullptr, step.residual, ends.norm, rows, shape.hidden, shape.eps});
  kernels.linear({ends.head, dense_floats(logits, 2), step.hidden, rows, {}});
  if (choose) kernels.logits(choice);
  return true;
}

}  // namespace
}  // namespace diptych::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(new_layers, diptych::cpu::new_layers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_layer, diptych::cpu::add_layer)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_weights, diptych::cpu::add_weights)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_ends, diptych::cpu::add_ends)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_layers, diptych::cpu::run_layers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, diptych::cpu::decode)
