// What the bindings share: tensors of Python checked and taken apart, and the table of a level.
//
// A failed check is a bug of the caller and raises AssertionError with the broken condition.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include "kernels.h"

namespace diptych::cpu {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (__builtin_expect(!(condition), 0)) TVM_FFI_THROW(AssertionError) << "not so: " #condition; \
  } while (0)

const KernelTable& table(int64_t level);  // of a number of `Level`

inline bool is_type(const TensorView& t, uint8_t code, uint8_t bits) {
  const DLDataType d = t.dtype();
  return d.code == code && d.bits == bits && d.lanes == 1;
}

inline DType model_dtype(const TensorView& t) {
  if (is_type(t, kDLFloat, 32)) return DType::kF32;
  if (is_type(t, kDLBfloat, 16)) return DType::kBF16;
  CHECK(is_type(t, kDLFloat, 16));
  return DType::kF16;
}

inline DType kv_dtype(const TensorView& t) {
  return is_type(t, kDLInt, 8) ? DType::kI8 : model_dtype(t);
}

// Elements between neighbours along the first dimension; all other dimensions are dense.
inline int64_t row_stride(const TensorView& t) {
  int64_t dense = 1;
  for (int32_t d = t.ndim() - 1; d > 0; --d) {
    CHECK(t.size(d) == 1 || t.stride(d) == dense);
    dense *= t.size(d);
  }
  return t.size(0) == 1 ? dense : t.stride(0);
}

template <class T>
T* data(const TensorView& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

inline float* floats(const TensorView& t, int32_t ndim) {
  CHECK(is_type(t, kDLFloat, 32) && t.ndim() == ndim && t.device().device_type == kDLCPU);
  return data<float>(t);
}

inline float* dense_floats(const TensorView& t, int32_t ndim) {
  CHECK(t.IsContiguous());
  return floats(t, ndim);
}

inline const int32_t* ints_of(const TensorView& t, int64_t size_min) {
  CHECK(is_type(t, kDLInt, 32) && t.ndim() == 1 && t.IsContiguous() &&
        t.device().device_type == kDLCPU);
  CHECK(t.size(0) >= size_min);
  return data<const int32_t>(t);
}

inline const int32_t* ints(const TensorView& t, int64_t size) {
  CHECK(t.size(0) == size);
  return ints_of(t, size);
}

// Every index in [low, end). A wrong one would read or write foreign memory.
inline void check_range(const int32_t* indices, int64_t size, int64_t low, int64_t end) {
  bool inside = true;
  for (int64_t i = 0; i < size; ++i) inside &= indices[i] >= low && indices[i] < end;
  CHECK(inside);
}

inline CacheView cache_view(const TensorView& t) {
  CHECK(t.ndim() == 4 && t.device().device_type == kDLCPU);
  const DType dtype = kv_dtype(t);
  const int64_t dim = t.size(3) - (dtype == DType::kI8 ? 4 : 0);  // a row ends with its scale
  CHECK(t.size(2) % kPanel == 0 && dim > 0 && dim % 2 == 0);
  return {data<char>(t), row_stride(t), t.size(2), t.size(1), dim, dtype};
}

inline void check_same_cache(const TensorView& k, const TensorView& v) {
  for (int32_t d = 0; d < 4; ++d) CHECK(k.size(d) == v.size(d));
  CHECK(kv_dtype(k) == kv_dtype(v));
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline int64_t packed_size(int64_t num_out, int64_t num_in, bool bf16) {
  return round_up(num_out, kPanel) * (bf16 ? round_up(num_in, kPairInputs) : num_in);
}

inline const float* bias_of(const Optional<TensorView>& bias, int64_t num_out) {
  if (!bias.has_value()) return nullptr;
  CHECK((*bias).size(0) == num_out);
  return dense_floats(*bias, 1);
}

// Weights in the model's dtype.
inline LinearWeights model_weights(const TensorView& packed, const Optional<TensorView>& bias,
                                   int64_t num_out, int64_t num_in) {
  const DType dtype = model_dtype(packed);
  CHECK(packed.IsContiguous() && packed.device().device_type == kDLCPU);
  CHECK(packed.numel() == packed_size(num_out, num_in, dtype == DType::kBF16));
  return {data<void>(packed), bias_of(bias, num_out), num_out, num_in, dtype, Width::kModel,
          nullptr, 0, 0};
}

// Weights of `bits` bits, see integers.h; packed: bytes. scales are per output (bits 8) or per group
// of inputs.
inline LinearWeights narrow_weights(const TensorView& packed, const TensorView& scales,
                                    const Optional<TensorView>& bias, int64_t num_out,
                                    int64_t num_in, int64_t bits, int64_t group,
                                    int64_t act_bits) {
  CHECK((act_bits == 8 || act_bits == 16) && num_in <= kNarrowInputsMax);
  CHECK(bits == 8 || (bits == 4 && (group == 32 || group == 64 || group == 128)));
  const int64_t padded = round_up(num_in, bits == 4 && group == 128 ? 128 : kNarrowInputs);
  const int64_t outputs = round_up(num_out, kPanel);
  CHECK(is_type(packed, kDLUInt, 8) && packed.IsContiguous());
  CHECK(packed.device().device_type == kDLCPU && packed.numel() == outputs * padded * bits / 8);
  CHECK(scales.ndim() == 1 && scales.IsContiguous() && scales.device().device_type == kDLCPU);
  CHECK(model_dtype(scales) == (bits == 8 ? DType::kF32 : DType::kBF16));
  CHECK(scales.size(0) == (bits == 8 ? num_out : outputs * (padded / group)));
  return {data<void>(packed), bias_of(bias, num_out), num_out, num_in, DType::kBF16,
          bits == 8 ? Width::kInt8 : Width::kInt4, data<void>(scales), group, act_bits};
}

// That a step's sequences lie in a pool of `num_blocks` blocks and in their rows.
inline void check_sequences(const int32_t* qo_indptr, const int32_t* kv_indptr,
                            const int32_t* kv_indices, int64_t num_indices, const int32_t* kv_len,
                            int64_t seqs, int64_t rows, int64_t num_blocks, int64_t block_size) {
  const int64_t first = kv_indptr[0], end = kv_indptr[seqs];
  CHECK(qo_indptr[0] == 0 && qo_indptr[seqs] == rows);
  CHECK(first >= 0 && first <= end && end <= num_indices);
  check_range(kv_indices + first, end - first, 0, num_blocks);
  for (int64_t s = 0; s < seqs; ++s) {
    const int64_t tokens = qo_indptr[s + 1] - qo_indptr[s],
                  blocks = kv_indptr[s + 1] - kv_indptr[s];
    CHECK(tokens >= 0 && tokens <= kv_len[s] && blocks * block_size >= kv_len[s]);
  }
}

}  // namespace diptych::cpu
