// A decoder's layers as one object: made once from packed weights and a pool, then run step by step.
//
// `Layers` owns the activations inside a layer (grown to the largest step, never shrunk) and
// nothing else: weights, norms and caches are kept as addresses, and the caller keeps their tensors
// alive. One thread at a time. Invariant: sizes are checked when a layer is added, indices in every
// call.
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

struct Freed {
  void operator()(float* p) const { free(p); }
};

class LayersObj : public tvm::ffi::Object {
 public:
  DecoderShape shape{};
  std::vector<LayerWeights> layers;
  int weights_left = 0;  // of the newest layer, still to come
  int64_t num_blocks = 0;

  // The buffers of a step of so many rows; `residual` and the indices are left open.
  StepArgs buffers(int64_t rows) {
    const int64_t heads = shape.q_heads + 2 * shape.kv_heads;
    const int64_t widths[] = {shape.hidden, heads * shape.dim, shape.q_heads * shape.dim,
                              2 * shape.inner, shape.inner};
    if (rows > capacity_) grow(rows > 2 * capacity_ ? rows : 2 * capacity_, widths);
    float* parts[5];
    float* next = memory_.get();
    for (int i = 0; i < 5; ++i) {
      parts[i] = next;
      next += part_size(capacity_, widths[i]);
    }
    StepArgs step{};
    step.hidden = parts[0], step.qkv = parts[1], step.attention = parts[2];
    step.gate_up = parts[3], step.inner = parts[4], step.rows = rows;
    return step;
  }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("diptych.Layers", LayersObj, tvm::ffi::Object);

 private:
  static int64_t part_size(int64_t rows, int64_t width) { return round_up(rows * width, 16); }

  void grow(int64_t rows, const int64_t (&widths)[5]) {
    if (rows < kRowsMin) rows = kRowsMin;
    int64_t size = 0;
    for (int64_t width : widths) size += part_size(rows, width);
    memory_.reset(static_cast<float*>(aligned_alloc(64, static_cast<size_t>(size) * 4)));
    if (memory_ == nullptr) throw std::bad_alloc();
    capacity_ = rows;
  }

  std::unique_ptr<float, Freed> memory_;
  int64_t capacity_ = 0;  // rows
};

class Layers : public tvm::ffi::ObjectRef {
 public:
  explicit Layers(tvm::ffi::ObjectPtr<LayersObj> made) : ObjectRef(std::move(made)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layers, tvm::ffi::ObjectRef, LayersObj);
};

Layers new_layers(TensorView cos_sin, double eps, double scale) {
  auto made = tvm::ffi::make_object<LayersObj>();
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

// Layers [begin, end) of a step over `residual`, [rows, hidden]; the rest as in single calls. The
// layers of a step are run in order, by calls that differ in nothing else.
void run_layers(int64_t level, Layers layers, int64_t begin, int64_t end, TensorView residual,
                TensorView positions, TensorView slots, TensorView qo_indptr, TensorView kv_indptr,
                TensorView kv_indices, TensorView kv_len) {
  const int64_t count = static_cast<int64_t>(layers->layers.size());
  const int64_t rows = residual.size(0), seqs = kv_len.size(0);
  CHECK(layers->weights_left == 0 && 0 <= begin && begin <= end && end <= count);
  CHECK(residual.ndim() == 2 && residual.size(1) == layers->shape.hidden);
  if (count == 0 || rows == 0) return;
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
  for (int64_t i = begin; i < end; ++i)
    table(level).layer({layers->layers[i], layers->shape, step, i == 0, i + 1 == count});
}

}  // namespace
}  // namespace diptych::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(new_layers, diptych::cpu::new_layers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_layer, diptych::cpu::add_layer)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_weights, diptych::cpu::add_weights)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_layers, diptych::cpu::run_layers)
