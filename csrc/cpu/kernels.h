// The table of functions that one instruction-set level provides, and the plain data they take.
//
// Included by the binding (compiled for the baseline machine) and by every level (compiled with its
// own -m flags), so it holds declarations and plain data only: an inline function of a header,
// compiled with AVX-512, could be the copy that the linker keeps for everybody.
#pragma once

#include <stdint.h>

namespace diptych::cpu {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };  // kI8: of KV only

// How the weights of a linear layer are held: in the model's dtype or as small integers.
enum class Width : int32_t { kModel = 0, kInt8 = 1, kInt4 = 2 };

constexpr int kPanel = 16;  // columns of one packed weight panel
constexpr int64_t kPairInputs = 32;    // packed bf16 weights: K is padded to a multiple of this
constexpr int64_t kNarrowInputs = 64;  // packed int8 and int4 weights: likewise, or of the group
constexpr int64_t kNarrowInputsMax = 1 << 16;  // more could overflow a sum of products
constexpr int kTile = 64;   // keys of one attention tile, aligned to the sequence's first token
constexpr int kSplit = 8 * kTile;  // keys of one independently computed part of a row's softmax
constexpr int kVocabChunk = 2048;  // logits of one independently computed part of a row's logsumexp

// A packed linear layer, see linear.h and integers.h.
struct LinearWeights {
  const void* w;
  const float* bias;  // [num_out] or null
  int64_t num_out, num_in;
  DType dtype;          // of w, where width is kModel
  Width width;
  const void* scales;   // kInt8: [num_out] fp32; kInt4: [panels][groups][kPanel] bf16
  int64_t group;        // kInt4: inputs that share a scale
  int64_t act_bits;     // narrow: what x is rounded to, 8 or 16 (kPairs levels: bf16)
};

// Makes row `row` of a linear layer's input just before it is read, so that it is still in the cache:
// in its place, or elsewhere for who only reads it once.
struct RowMaker {
  void (*make)(const void* args, int64_t row, float* to);  // null: the input is there
  const void* args;
  int64_t values;  // that it reads and computes for one row
};

struct LinearArgs : LinearWeights {
  float* out;         // [rows, num_out], or of half the width, see silu
  const float* x;     // [rows, num_in]
  int64_t rows;
  RowMaker maker;     // of x
  const LinearWeights* next = nullptr;  // likely to be read after this layer's, if known
  bool silu = false;  // the first half of the outputs are gates: out is silu(gate) * the other half.
                      // num_out is a multiple of 2 * kPanel
  // Where layers say so (takes_rounded, takes_rounded_rows, adds_up; linear.h, linear_tiles.h):
  bool rounded_x = false, rounded_out = false;  // rows as the layer, or `next`, reads them
  bool add = false;                             // the result is added to what is in `out`
};

struct PackArgs {
  void* packed;
  const void* weight;  // [num_out, num_in]
  int64_t num_out, num_in;
  DType dtype;
};

struct EmbeddingArgs {
  float* out;          // [rows, dim]
  const void* table;   // [vocab, dim], or packed as the weights of a linear layer
  const int32_t* ids;  // [rows]
  int64_t rows, dim;
  DType dtype;
  bool packed;
};

struct NormArgs {
  float* out;           // [rows, dim]
  float* residual;      // [rows, dim] or null: added to x in place, then normed
  const float* x;       // [rows, dim]
  const float* weight;  // [dim]
  int64_t rows, dim;
  float eps;
};

struct RopeArgs {
  float *q, *k;  // [rows, heads, dim], rows strided
  int64_t q_stride, k_stride;
  const int32_t* positions;  // [rows]
  const float* cos_sin;      // [max positions, dim]
  int64_t rows, q_heads, k_heads, dim;
};

struct SiluArgs {
  float* out;            // [rows, dim]
  const float* gate_up;  // [rows, 2 * dim]
  int64_t rows, dim;
};

// One layer's K or V in the pool. Block b's piece of head h starts at b * block_stride + h *
// block_size * dim and holds, with unit 2 for bf16 and 1 otherwise, keys as panels of 16 tokens
// [block_size/16][dim/unit][16][unit], as a packed weight of 16 outputs, and values as
// [block_size/unit][dim][unit]: what attention multiplies lies side by side. int8 is laid out as bf16,
// and every 16 tokens of a head are followed by their 16 scales, see kv_int8.h.
struct CacheView {
  char* data;
  int64_t block_stride;  // elements, of which a row of kI8 has dim + 4
  int64_t block_size, heads, dim;
  DType dtype;
};

struct WriteKvArgs {
  CacheView k_cache, v_cache;
  const float *k, *v;  // [rows, heads, dim], rows strided
  int64_t k_stride, v_stride;
  const int32_t* slots;  // [rows], -1 skips
  int64_t rows;
};

struct AttentionArgs {
  float* out;      // [rows, q_heads, dim]
  const float* q;  // [rows, q_heads, dim], rows strided
  int64_t q_stride;
  CacheView k_cache, v_cache;
  const int32_t *qo_indptr, *kv_indptr, *kv_indices, *kv_len;
  int64_t num_seqs, q_heads;
  float scale;
  int64_t window;  // <= 0: none
  bool rounded = false;  // out as bf16
};

struct LogitsArgs {
  const float* logits;  // [rows, vocab]
  int64_t rows, vocab;
  int32_t* ids;     // [rows] or null
  float* logprobs;  // [rows] or null
  float* out;       // [rows, vocab] or null
};

struct DrawArgs {
  const float* logits;     // [any, vocab]
  const int32_t* index;    // [rows] which of them
  const double* inverses;  // [rows] of the temperatures
  const double* numbers;   // [rows] in [0, 1)
  int64_t rows, vocab;
  int32_t* tokens;  // [rows], -1 where there is doubt
};

// One decoder layer, whole: its packed weights and its part of the pool.
struct LayerWeights {
  LinearWeights qkv, o, gate_up, down;
  const float *attn_norm, *mlp_norm;  // [hidden]
  const float *q_norm, *k_norm;       // [dim], or null: heads are not normed
  CacheView k_cache, v_cache;
  int64_t window;  // <= 0: none
};

// What all layers of a decoder share.
struct DecoderShape {
  const float* cos_sin;  // [positions, dim]
  int64_t positions, hidden, inner, q_heads, kv_heads, dim;
  float eps, scale;
};

// A step's tokens, as in RopeArgs, WriteKvArgs and AttentionArgs, and the memory it computes in.
struct StepArgs {
  float* residual;  // [rows, hidden]
  float *hidden, *qkv, *attention, *gate_up, *inner;  // [rows, ...], nothing in them before a layer
                                                      // but `hidden`: what the last layer added
  const int32_t *positions, *slots;
  const int32_t *qo_indptr, *kv_indptr, *kv_indices, *kv_len;
  int64_t rows, num_seqs;
};

// What of a step is needed after its last layer's keys and values: the last tokens of some sequences,
// a row each in the same memory.
struct LastRows {
  StepArgs step;        // of these rows
  const int32_t* rows;  // [step.rows] of the whole step, ascending
};

struct LayerArgs {
  const LayerWeights& weights;
  const DecoderShape& shape;
  const StepArgs& step;
  const LayerWeights* previous;  // null: nothing is in `hidden` yet
  bool last;  // of the step: all that was computed is in `residual` in the end
  const LinearWeights* next;  // that are read after the layer, or null
  const LastRows* needed;     // null: all rows
};

struct ProbeArgs {
  const float* data;  // [size]: read it all; null: multiply and add instead
  int64_t size;       // floats, or rounds of probe_operations()
  bool pairs;         // bf16 dot products where the level has them
  float factor;
  float* sums;  // [items]
  int64_t items;
};

struct KernelTable {
  const char* name;
  void (*pack)(const PackArgs&);
  void (*linear)(const LinearArgs&);
  void (*embedding)(const EmbeddingArgs&);
  void (*norm)(const NormArgs&);
  void (*rope)(const RopeArgs&);
  void (*silu_mul)(const SiluArgs&);
  void (*write_kv)(const WriteKvArgs&);
  void (*attention)(const AttentionArgs&);
  void (*logits)(const LogitsArgs&);
  void (*draw)(const DrawArgs&);
  void (*layer)(const LayerArgs&);
  void (*probe)(const ProbeArgs&);
  int64_t (*probe_operations)(bool pairs);  // floating-point operations of one round
};

extern const KernelTable kPlain;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
extern const KernelTable kAmx;

}  // namespace diptych::cpu
