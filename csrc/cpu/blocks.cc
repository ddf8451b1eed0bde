// The long-input half of XXH3 (64 bits, seed 0), written for blocks of KV: eight lanes of 64 bits
// take one stripe of 64 bytes after another, and are mixed after every sixteenth (a chunk).
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

// What a variant does: all stripes of one block into `lanes`, stored to `out` unless it is null.
// `next` is where the next block begins, if there is one: it is fetched early too.
using StripesFn = void (*)(uint64_t* lanes, const char* in, char* out, int64_t bytes,
                           const char* next);

// The rest of a block after its full chunks: stripes keyed as a chunk's, then the last 64 bytes,
// which may overlap them, keyed from a place of their own.
struct Rest {
  int64_t begin, stripes;
};

constexpr int64_t kChunk = kStripe * kStripes;
constexpr const uint8_t* kScrambleKey = kSecret + kSecretBytes - kStripe;
constexpr const uint8_t* kLastKey = kSecret + kSecretBytes - kStripe - 7;

Rest rest_of(int64_t bytes) {
  const int64_t begin = (bytes - 1) / kChunk * kChunk;
  return {begin, (bytes - 1 - begin) / kStripe};
}

void plain_stripe(uint64_t* lanes, const char* in, char* out, const uint8_t* key) {
  if (out != nullptr) memcpy(out, in, kStripe);
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t value = word(in + 8 * i), keyed = value ^ word(key + 8 * i);
    lanes[i ^ 1] += value;
    lanes[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
  }
}

void plain_stripes(uint64_t* lanes, const char* in, char* out, int64_t bytes, const char*) {
  const Rest rest = rest_of(bytes);
  auto at = [out](int64_t offset) { return out == nullptr ? nullptr : out + offset; };
  for (int64_t c = 0; c < rest.begin; c += kChunk) {
    for (int64_t s = 0; s < kStripes; ++s)
      plain_stripe(lanes, in + c + s * kStripe, at(c + s * kStripe), kSecret + 8 * s);
    for (int64_t i = 0; i < kLanes; ++i)
      lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ word(kScrambleKey + 8 * i)) * kPrime32[0];
  }
  for (int64_t s = 0; s < rest.stripes; ++s) {
    const int64_t offset = rest.begin + s * kStripe;
    plain_stripe(lanes, in + offset, at(offset), kSecret + 8 * s);
  }
  plain_stripe(lanes, in + bytes - kStripe, at(bytes - kStripe), kLastKey);
}

#if defined(__x86_64__)
// Fetched early: the hardware does not cross pages, and half of one covers what a core can have
// under way.
constexpr int64_t kAhead = 32 * kStripe;

inline void fetch(const char* in, int64_t offset, int64_t bytes, const char* next) {
  const int64_t ahead = offset + kAhead;
  _mm_prefetch(ahead < bytes ? in + ahead : next + (ahead - bytes), _MM_HINT_T0);
}

__attribute__((target("avx2"))) inline void avx2_stripe(__m256i* a, const char* in, char* out,
                                                        const uint8_t* key) {
  for (int half = 0; half < 2; ++half) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + half);
    if (out != nullptr) _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + half, value);
    const __m256i keyed = _mm256_xor_si256(
        value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key) + half));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    a[half] = _mm256_add_epi64(_mm256_add_epi64(product, swapped), a[half]);
  }
}

__attribute__((target("avx2"))) void avx2_stripes(uint64_t* lanes, const char* in, char* out,
                                                  int64_t bytes, const char* next) {
  auto* stored = reinterpret_cast<__m256i*>(lanes);
  __m256i a[2] = {_mm256_load_si256(stored), _mm256_load_si256(stored + 1)};
  const __m256i prime = _mm256_set1_epi64x(kPrime32[0]);
  const Rest rest = rest_of(bytes);
  auto at = [out](int64_t offset) { return out == nullptr ? nullptr : out + offset; };
  for (int64_t c = 0; c < rest.begin; c += kChunk) {
    for (int64_t s = 0; s < kStripes; ++s) {
      const int64_t offset = c + s * kStripe;
      fetch(in, offset, bytes, next);
      avx2_stripe(a, in + offset, at(offset), kSecret + 8 * s);
    }
    for (int half = 0; half < 2; ++half) {
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kScrambleKey) + half);
      const __m256i mixed =
          _mm256_xor_si256(_mm256_xor_si256(a[half], _mm256_srli_epi64(a[half], 47)), key);
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
      a[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }
  }
  for (int64_t s = 0; s < rest.stripes; ++s) {
    const int64_t offset = rest.begin + s * kStripe;
    avx2_stripe(a, in + offset, at(offset), kSecret + 8 * s);
  }
  avx2_stripe(a, in + bytes - kStripe, at(bytes - kStripe), kLastKey);
  _mm256_store_si256(stored, a[0]);
  _mm256_store_si256(stored + 1, a[1]);
}

__attribute__((target("avx512f"))) inline __m512i avx512_stripe(__m512i a, const char* in,
                                                                char* out, const uint8_t* key) {
  const __m512i value = _mm512_loadu_si512(in);
  if (out != nullptr) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), value);
  const __m512i keyed = _mm512_xor_si512(value, _mm512_loadu_si512(key));
  const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
  const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
  return _mm512_add_epi64(_mm512_add_epi64(product, swapped), a);
}

__attribute__((target("avx512f"))) void avx512_stripes(uint64_t* lanes, const char* in, char* out,
                                                       int64_t bytes, const char* next) {
  __m512i a = _mm512_load_si512(lanes);
  const __m512i prime = _mm512_set1_epi64(kPrime32[0]);
  const __m512i key = _mm512_loadu_si512(kScrambleKey);
  const Rest rest = rest_of(bytes);
  auto at = [out](int64_t offset) { return out == nullptr ? nullptr : out + offset; };
  for (int64_t c = 0; c < rest.begin; c += kChunk) {
    for (int64_t s = 0; s < kStripes; ++s) {
      const int64_t offset = c + s * kStripe;
      fetch(in, offset, bytes, next);
      a = avx512_stripe(a, in + offset, at(offset), kSecret + 8 * s);
    }
    const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(a, _mm512_srli_epi64(a, 47)), key);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
    a = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
  }
  for (int64_t s = 0; s < rest.stripes; ++s) {
    const int64_t offset = rest.begin + s * kStripe;
    a = avx512_stripe(a, in + offset, at(offset), kSecret + 8 * s);
  }
  a = avx512_stripe(a, in + bytes - kStripe, at(bytes - kStripe), kLastKey);
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
uint64_t run(const char* in, char* out, int64_t bytes, const char* next) {
  static const StripesFn stripes = choose();
  alignas(64) uint64_t lanes[kLanes] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                                        kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  stripes(lanes, in, out, bytes, next == nullptr ? in : next);
  return finish(lanes, bytes);
}

}  // namespace

uint64_t digest(const char* data, int64_t bytes, const char* next) {
  return run(data, nullptr, bytes, next);
}

uint64_t copy_digest(char* to, const char* from, int64_t bytes, const char* next) {
  if (bytes % kStripe != 0 || reinterpret_cast<uintptr_t>(to) % kStripe != 0) {
    memcpy(to, from, static_cast<size_t>(bytes));
    return digest(to, bytes, nullptr);
  }
  const uint64_t found = run(from, to, bytes, next);
#if defined(__x86_64__)
  _mm_sfence();  // what went round the caches is in order with what follows
#endif
  return found;
}

}  // namespace diptych::cpu
