// Copies of KV blocks and their digests, in one pass over the bytes.
#pragma once

#include <stdint.h>

namespace diptych::cpu {

constexpr int64_t kDigestBytesMin = 241;  // below that the hash has other rules

// xxh3-64 (seed 0) of `bytes` >= kDigestBytesMin bytes at `data`. What is asked for next, if known,
// is fetched on the way.
uint64_t digest(const char* data, int64_t bytes, const char* next);

// Copies and returns the digest of what it wrote. The bytes bypass the caches where that is
// possible: a pulled block is read again only much later.
uint64_t copy_digest(char* to, const char* from, int64_t bytes, const char* next);

}  // namespace diptych::cpu
