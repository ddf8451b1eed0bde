// The long-input half of XXH3 (64 bits, seed 0), written for blocks of KV: eight lanes of 64 bits
// take one stripe of 64 bytes after another, and are mixed after every sixteenth.
//
// One variant per instruction set, chosen once; all give the same digest. Each can store the
// stripes that it reads, which makes a checked copy cost hardly more than a copy.
#include "blocks.h"

#include <string.h>

#include "machine.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace diptych::cpu {
namespace {

constexpr uint32_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
                                  0x85EBCA77C2B2AE63u, 0x27D4EB2F165667C5u};
constexpr int64_t kStripe = 64, kStripes = 16, kLanes = 8;
constexpr int64_t kSecretBytes = 192;

// The default secret that the hash's definition fixes.
alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
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
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

uint64_t word(const void* at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

// What a variant does: `stripes` stripes from `in`, keyed from `secret` on, 8 bytes further each
// (the last stripe of all has its own place); stored to `out` unless it is null.
using StripesFn = void (*)(uint64_t* lanes, const char* in, char* out, const uint8_t* secret,
                           int64_t stripes);

void plain_stripes(uint64_t* lanes, const char* in, char* out, const uint8_t* secret,
                   int64_t stripes) {
  for (int64_t s = 0; s < stripes; ++s, in += kStripe, secret += 8) {
    if (out != nullptr) memcpy(out + s * kStripe, in, kStripe);
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t value = word(in + 8 * i), keyed = value ^ word(secret + 8 * i);
      lanes[i ^ 1] += value;
      lanes[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
    }
  }
}

#if defined(__x86_64__)
constexpr int64_t kAhead = 8 * kStripe;  // fetched early: the hardware does not cross pages

__attribute__((target("avx2"))) void avx2_stripes(uint64_t* lanes, const char* in, char* out,
                                                  const uint8_t* secret, int64_t stripes) {
  auto* acc = reinterpret_cast<__m256i*>(lanes);
  __m256i a[2] = {_mm256_load_si256(acc), _mm256_load_si256(acc + 1)};
  for (int64_t s = 0; s < stripes; ++s, in += kStripe, secret += 8) {
    _mm_prefetch(in + kAhead, _MM_HINT_T0);
    for (int half = 0; half < 2; ++half) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + half);
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + half);
      if (out != nullptr)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + s * kStripe) + half, value);
      const __m256i keyed = _mm256_xor_si256(value, key);
      const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
      a[half] = _mm256_add_epi64(_mm256_add_epi64(product, swapped), a[half]);
    }
  }
  _mm256_store_si256(acc, a[0]);
  _mm256_store_si256(acc + 1, a[1]);
}

__attribute__((target("avx512f"))) void avx512_stripes(uint64_t* lanes, const char* in, char* out,
                                                       const uint8_t* secret, int64_t stripes) {
  __m512i a = _mm512_load_si512(lanes);
  for (int64_t s = 0; s < stripes; ++s, in += kStripe, secret += 8) {
    _mm_prefetch(in + kAhead, _MM_HINT_T0);
    const __m512i value = _mm512_loadu_si512(in);
    if (out != nullptr)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + s * kStripe), value);
    const __m512i keyed = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
    a = _mm512_add_epi64(_mm512_add_epi64(product, swapped), a);
  }
  _mm512_store_si512(lanes, a);
}
#endif

StripesFn choose() {
#if defined(__x86_64__)
  if (machine_has(Level::kAvx512)) return avx512_stripes;
  if (machine_has(Level::kAvx2)) return avx2_stripes;
#endif
  return plain_stripes;
}

void scramble(uint64_t* lanes) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t key = word(kSecret + kSecretBytes - kStripe + 8 * i);
    lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ key) * kPrime32[0];
  }
}

uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t finish(const uint64_t* lanes, int64_t bytes) {
  uint64_t hash = static_cast<uint64_t>(bytes) * kPrime64[0];
  for (int64_t i = 0; i < kLanes; i += 2) {
    const uint8_t* secret = kSecret + 11 + 8 * i;
    hash += fold(lanes[i] ^ word(secret), lanes[i + 1] ^ word(secret + 8));
  }
  hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9u;
  return hash ^ (hash >> 32);
}

// `out` null: only reads. Else `bytes` is a multiple of the stripe.
uint64_t run(const char* in, char* out, int64_t bytes) {
  static const StripesFn stripes = choose();
  alignas(64) uint64_t lanes[kLanes] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                                        kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  constexpr int64_t kChunk = kStripe * kStripes;
  const int64_t chunks = (bytes - 1) / kChunk;
  auto at = [out](int64_t offset) { return out == nullptr ? nullptr : out + offset; };
  for (int64_t c = 0; c < chunks; ++c) {
    stripes(lanes, in + c * kChunk, at(c * kChunk), kSecret, kStripes);
    scramble(lanes);
  }
  const int64_t done = chunks * kChunk, left = (bytes - 1 - done) / kStripe;
  stripes(lanes, in + done, at(done), kSecret, left);
  stripes(lanes, in + bytes - kStripe, at(bytes - kStripe), kSecret + kSecretBytes - kStripe - 7,
          1);
  return finish(lanes, bytes);
}

}  // namespace

uint64_t digest(const char* data, int64_t bytes) { return run(data, nullptr, bytes); }

uint64_t copy_digest(char* to, const char* from, int64_t bytes) {
  if (bytes % kStripe != 0 || reinterpret_cast<uintptr_t>(to) % kStripe != 0) {
    memcpy(to, from, static_cast<size_t>(bytes));
    return digest(to, bytes);
  }
  const uint64_t found = run(from, to, bytes);
#if defined(__x86_64__)
  _mm_sfence();  // what went round the caches is in order with what follows
#endif
  return found;
}

}  // namespace diptych::cpu
