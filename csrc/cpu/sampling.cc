// Drawing tokens: counter-based random numbers, and where they fall in sums of weights.
//
// Owns nothing. Exact integers, and additions of doubles in the order that kernels/reference.py has,
// so every machine and level gives the same tokens.
#include <tvm/ffi/function.h>

#include <vector>

#include "tensors.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kSpan = 256;  // tokens that are summed together, kernels/base.py
constexpr int kRounds = 10;

// Philox4x32-10, see kernels/philox.py: a number in [0, 1) with 53 random bits.
double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32),
           c2 = static_cast<uint32_t>(choice), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t{c0} * 0xD2511F53, b = uint64_t{c2} * 0xCD9E8D57;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c0} >> 5 << 26) + (c1 >> 6)) * 0x1p-53;
}

// The first token up to which more than `number` of the whole weight lies.
int64_t find_token(const double* weights, int64_t vocab, const double* spans, int64_t num_spans,
                   double number) {
  const double target = number * spans[num_spans - 1];
  int64_t span = 0;
  while (span < num_spans && spans[span] <= target) ++span;
  CHECK(span < num_spans);
  const double before = span > 0 ? spans[span - 1] : 0.0;
  const int64_t begin = span * kSpan, end = begin + kSpan < vocab ? begin + kSpan : vocab;
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    sum += weights[i];
    if (before + sum > target) return i;
  }
  int64_t last = end - 1;  // only by the rounding of the two sums
  while (last > begin && weights[last] == 0.0) --last;
  return last;
}

const double* doubles(const TensorView& t) {
  CHECK(is_type(t, kDLFloat, 64) && t.ndim() == 2 && t.IsContiguous());
  CHECK(t.device().device_type == kDLCPU);
  return data<const double>(t);
}

// tokens: [R]; keys: [R, 3] uint64 (seed, choice, position); weights: [R, V]; spans: [R, V / kSpan,
// rounded up], the weight up to the end of each span.
void draw(TensorView tokens, TensorView keys, TensorView weights, TensorView spans) {
  const int64_t rows = weights.size(0), vocab = weights.size(1);
  const int64_t num_spans = (vocab + kSpan - 1) / kSpan;
  const double *weight = doubles(weights), *sums = doubles(spans);
  CHECK(vocab > 0 && spans.size(0) == rows && spans.size(1) == num_spans);
  CHECK(is_type(keys, kDLUInt, 64) && keys.IsContiguous() && keys.numel() == 3 * rows);
  const auto* key = data<const uint64_t>(keys);
  auto* out = const_cast<int32_t*>(ints(tokens, rows));
  for (int64_t r = 0; r < rows; ++r, key += 3) {
    out[r] = static_cast<int32_t>(find_token(weight + r * vocab, vocab, sums + r * num_spans,
                                             num_spans, uniform(key[0], key[1], key[2])));
  }
}

// The same from logits ([any, V], rows `index`), and temperatures above 0, where there is no doubt;
// else -1. temperatures: [R].
void draw_plain(int64_t level, TensorView tokens, TensorView keys, TensorView logits,
                TensorView index, TensorView temperatures) {
  const int64_t rows = index.size(0), vocab = logits.size(1);
  CHECK(vocab > 0 && is_type(keys, kDLUInt, 64) && keys.IsContiguous() && keys.numel() == 3 * rows);
  CHECK(is_type(temperatures, kDLFloat, 64) && temperatures.IsContiguous());
  CHECK(temperatures.numel() == rows);
  const auto* key = data<const uint64_t>(keys);
  const auto* temperature = data<const double>(temperatures);
  const int32_t* wanted = ints(index, rows);
  check_range(wanted, rows, 0, logits.size(0));
  std::vector<double> numbers, inverses;
  for (int64_t r = 0; r < rows; ++r, key += 3) {
    CHECK(temperature[r] > 0.0);
    numbers.push_back(uniform(key[0], key[1], key[2]));
    // Below 1e-300 only the best tokens are left either way; 0 times infinity would be no number.
    inverses.push_back(temperature[r] < 1e-300 ? 1e300 : 1.0 / temperature[r]);
  }
  table(level).draw({dense_floats(logits, 2), wanted, inverses.data(), numbers.data(), rows, vocab,
                     const_cast<int32_t*>(ints(tokens, rows))});
}

}  // namespace
}  // namespace diptych::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(draw, diptych::cpu::draw)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draw_plain, diptych::cpu::draw_plain)
