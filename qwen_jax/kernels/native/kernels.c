// Products with weights of few bits, and attention of single queries, as XLA FFI handlers in plain C.
//
// Packed weights [O, K]: rows in strips of 16, inputs in blocks of 32, all of a strip in one stream of bytes. A block is
// 8 groups [16 rows][4 inputs], so 64 bytes are a register of AVX-512, two of AVX2, four of NEON. In a strip, for every
// `group` blocks the scales that they share, then for each block its own scales, high bits and low bits:
//   scales   MIN, NONE: float16 scale[16] (and min[16]); FLOAT: float32 scale[16], min[16];
//            SUB_MIN, SUB_16: float16 scale[16] (and min[16]) per group, and bytes per block: scale[16] (and min[16]) or
//            two scale[16], of 16 inputs each
//   high     5 bits: one byte [16][4], bit g that of group g; 6 bits: two of 4 groups each, two bits a group
//   low      4 groups to 64 bytes, group g in low nibbles and g + 4 in high ones; 8 bits: 8 groups
// Activations are rounded to int8 with a scale for 32, and sums within a block are integers.
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "xla/ffi/api/c_api.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(PORTABLE)
#define ISA "avx512-vnni"
#define VNNI
#define LANES 16
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__) && !defined(PORTABLE)
#define ISA "avx2"
#define LANES 8
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(PORTABLE)
#define ISA "neon-dotprod"
#define SDOT
#define LANES 16
#else
#define ISA "portable"
#define LANES 16
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE()
#endif
#define INLINE static inline __attribute__((always_inline))

const char* qwen_isa(void) { return ISA; }

// --- formats ---------------------------------------------------------------------------------------------------------

enum { NONE, MIN, FLOAT, SUB_MIN, SUB_16 };  // what scales there are
enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3_K, Q4_K, Q5_K, Q6_K, INT4, INT8, FORMATS };
#ifdef VNNI
#define BIAS 128  // vpdpbusd takes unsigned weights
#else
#define BIAS 0
#endif
// format, stored bits, what is subtracted from them, scales, bytes and inputs of a block of GGUF
#define EACH_FORMAT(X) \
  X(Q4_0, 4, 8, NONE, 18, 32) X(Q4_1, 4, 0, MIN, 20, 32) X(Q5_0, 5, 16, NONE, 22, 32) X(Q5_1, 5, 0, MIN, 24, 32) \
  X(Q8_0, 8, BIAS, NONE, 34, 32) X(Q3_K, 4, 4, SUB_16, 110, 256) X(Q4_K, 4, 0, SUB_MIN, 144, 256) \
  X(Q5_K, 5, 0, SUB_MIN, 176, 256) X(Q6_K, 6, 32, SUB_16, 210, 256) X(INT4, 4, 0, FLOAT, 0, 0) X(INT8, 8, BIAS, FLOAT, 0, 0)
typedef struct { int bits, zero, scales, raw_bytes, raw_inputs; } format;
#define ROW(NAME, ...) [NAME] = {__VA_ARGS__},
static const format formats[FORMATS] = {EACH_FORMAT(ROW)};

INLINE int shared_bytes(int scales) { return scales == FLOAT ? 128 : scales == MIN || scales == SUB_MIN ? 64 : 32; }
INLINE int own_bytes(int scales) { return scales == SUB_MIN || scales == SUB_16 ? 32 : 0; }
INLINE int high_bytes(int bits) { return bits == 5 ? 64 : bits == 6 ? 128 : 0; }
INLINE int low_bytes(int bits) { return bits == 8 ? 512 : 256; }

// Bytes of a strip of 16 rows; `group` blocks share scales.
int64_t qwen_strip_bytes(int fmt, int64_t inputs, int64_t group) {
  const format f = formats[fmt];
  return inputs / 32 / group * shared_bytes(f.scales) +
         inputs / 32 * (own_bytes(f.scales) + high_bytes(f.bits) + low_bytes(f.bits));
}

// --- packing ---------------------------------------------------------------------------------------------------------

INLINE uint16_t half_at(const uint8_t* p) { uint16_t h; memcpy(&h, p, 2); return h; }

// The six-bit scale and minimum of block j of Q4_K and Q5_K.
static void six_bits(const uint8_t* p, int j, uint8_t* scale, uint8_t* min) {
  *scale = j < 4 ? p[j] & 63 : (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
  *min = j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | (p[j] >> 6) << 4;
}

// The stored integers of block j (of 32 inputs) within a GGUF block.
static void integers(int fmt, const uint8_t* raw, int j, uint8_t* v) {
  const uint8_t *low = raw + (fmt == Q4_0 ? 2 : fmt == Q4_1 ? 4 : fmt == Q5_0 ? 6 : 8), *high;
  uint32_t fifth = 0;
  switch (fmt) {
    case Q5_0: case Q5_1:
      memcpy(&fifth, low - 4, 4);  // falls through
    case Q4_0: case Q4_1:
      for (int i = 0; i < 16; i++) {
        v[i] = (low[i] & 15) | (fifth >> i & 1) << 4;
        v[i + 16] = low[i] >> 4 | (fifth >> (i + 16) & 1) << 4;
      }
      break;
    case Q8_0:
      for (int i = 0; i < 32; i++) v[i] = raw[2 + i] + BIAS;
      break;
    case Q3_K:
      for (int i = 0; i < 32; i++) v[i] = (raw[32 + j / 4 * 32 + i] >> j % 4 * 2 & 3) | (raw[i] >> j & 1) << 2;
      break;
    case Q4_K: case Q5_K:
      low = raw + (fmt == Q4_K ? 16 : 48) + j / 2 * 32;
      for (int i = 0; i < 32; i++) v[i] = low[i] >> j % 2 * 4 & 15;
      if (fmt == Q5_K) for (int i = 0; i < 32; i++) v[i] |= (raw[16 + i] >> j & 1) << 4;
      break;
    case Q6_K:
      low = raw + j / 4 * 64 + j % 2 * 32, high = raw + 128 + j / 4 * 32;
      for (int i = 0; i < 32; i++) v[i] = (low[i] >> (j % 4 < 2 ? 0 : 4) & 15) | (high[i] >> j % 4 * 2 & 3) << 4;
  }
}

// The integers of one row's block into its place in a strip; `to` is where the block's high bits begin.
static void put(const uint8_t* v, int bits, int row, uint8_t* to) {
  uint32_t w[8], high[2] = {0, 0};
  memcpy(w, v, 32);
  if (bits == 8) {
    for (int g = 0; g < 8; g++) memcpy(to + 64 * g + 4 * row, &w[g], 4);
    return;
  }
  for (int g = 0; g < 8; g++) {
    if (bits == 5) high[0] |= (w[g] >> 4 & 0x01010101) << g;
    if (bits == 6) high[g / 4] |= (w[g] >> 4 & 0x03030303) << g % 4 * 2;
  }
  for (int h = 0; h < high_bytes(bits) / 64; h++) memcpy(to + 64 * h + 4 * row, &high[h], 4);
  to += high_bytes(bits);
  for (int g = 0; g < 4; g++) {
    const uint32_t both = (w[g] & 0x0f0f0f0f) | (w[g + 4] & 0x0f0f0f0f) << 4;
    memcpy(to + 64 * g + 4 * row, &both, 4);
  }
}

// Rows of GGUF blocks, one after the other, to strips. `rows` is a multiple of 16.
void qwen_pack_gguf(int fmt, const uint8_t* raw, int64_t rows, int64_t inputs, uint8_t* out) {
  const format f = formats[fmt];
  const int per = f.raw_inputs / 32;
  for (int64_t n = 0; n < rows; n++) {
    uint8_t* to = out + n / 16 * qwen_strip_bytes(fmt, inputs, per);
    const int row = n % 16;
    for (int64_t b = 0; b < inputs / f.raw_inputs; b++, raw += f.raw_bytes) {
      const uint8_t* at = fmt == Q3_K ? raw + 108 : fmt == Q6_K ? raw + 208 : raw;
      const uint16_t min = half_at(raw + 2) ^ (f.scales == MIN ? 0x8000 : 0);  // ours is subtracted
      memcpy(to + 2 * row, at, 2);
      if (shared_bytes(f.scales) == 64) memcpy(to + 32 + 2 * row, &min, 2);
      to += shared_bytes(f.scales);
      for (int j = 0; j < per; j++) {
        uint8_t v[32];
        if (f.scales == SUB_MIN) six_bits(raw + 4, j, to + row, to + 16 + row);
        if (fmt == Q6_K) to[row] = raw[192 + 2 * j], to[16 + row] = raw[193 + 2 * j];
        if (fmt == Q3_K)
          for (int h = 0; h < 2; h++) {
            const int k = 2 * j + h;
            const uint8_t* s = raw + 96;
            to[16 * h + row] = ((s[k % 8] >> k / 8 * 4 & 15) | (s[8 + k % 4] >> k / 4 * 2 & 3) << 4) - 32;
          }
        to += own_bytes(f.scales);
        integers(fmt, raw, j, v);
        put(v, f.bits, row, to);
        to += high_bytes(f.bits) + low_bytes(f.bits);
      }
    }
  }
}

// INT4 (q of 0 to 15) and INT8: q [rows, inputs], scale and min [rows, inputs / (32 * group)]; scale * q - min.
void qwen_pack_groups(int fmt, const uint8_t* q, const float* scale, const float* min, int64_t rows, int64_t inputs,
                      int64_t group, uint8_t* out) {
  const format f = formats[fmt];
  for (int64_t n = 0; n < rows; n++) {
    uint8_t* to = out + n / 16 * qwen_strip_bytes(fmt, inputs, group);
    const int row = n % 16;
    for (int64_t b = 0; b < inputs / 32; b++) {
      if (b % group == 0) {
        memcpy(to + 4 * row, scale++, 4), memcpy(to + 64 + 4 * row, min++, 4);
        to += 128;
      }
      uint8_t v[32];
      for (int i = 0; i < 32; i++) v[i] = *q++ + f.zero;
      put(v, f.bits, row, to);
      to += low_bytes(f.bits);
    }
  }
}

// --- vectors ---------------------------------------------------------------------------------------------------------

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef int8_t vc __attribute__((vector_size(LANES)));
enum { WIDTH = 4 * LANES, PARTS = 16 / LANES };  // bytes of a vector, vectors to 16 rows

INLINE vu load(const void* p) { vu v; memcpy(&v, p, WIDTH); return v; }
INLINE vf loadf(const void* p) { return (vf)load(p); }
INLINE vf all(float x) { return x - (vf){0}; }

#if LANES == 8
INLINE vf halves(const uint8_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void*)p)); }
INLINE vf bytes(const uint8_t* p) { return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void*)p))); }
INLINE vf signs(const uint8_t* p) { return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void*)p))); }
#else
INLINE vf bytes(const uint8_t* p) { vb v; memcpy(&v, p, LANES); return __builtin_convertvector(v, vf); }
INLINE vf signs(const uint8_t* p) { vc v; memcpy(&v, p, LANES); return __builtin_convertvector(v, vf); }
#ifdef VNNI
INLINE vf halves(const uint8_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void*)p)); }
#else
INLINE vf halves(const uint8_t* p) {  // subnormal numbers as integers, for XLA's threads take subnormal floats for 0
  vh h;
  memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu), magnitude = u & 0x7fff;
  const vi tiny = (vi)(magnitude < 0x400), special = (vi)(magnitude >= 0x7c00);
  const vi bits = ((vi)magnitude << 13) + ((112 << 23) & ~special) + (special & (224 << 23));
  const vi small = (vi)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-24f);
  return (vf)((small & tiny) | (bits & ~tiny) | (vi)((u & 0x8000) << 16));
}
#endif
#endif

// Sums of w * x over `count` groups of 4 inputs: w [count] of bits (unsigned with BIAS, or below 8 bits), x int8.
INLINE vi dot(const vu* w, const int8_t* x, int count, int bits) {
  vi sum = {0};
#if LANES == 8
  // Pairs of products are added in 16 bits: 2 * 15 * 127 of them 8 times, 2 * 31 * 127 4 times, 2 * 63 * 127 twice
  const int times = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
  for (int g = 0; g < count; g += times) {
    __m256i pairs = _mm256_setzero_si256();
    for (int i = g; i < g + times && i < count; i++) {
      int32_t four;
      memcpy(&four, x + 4 * i, 4);
      const __m256i v = _mm256_set1_epi32(four);
      const __m256i product = bits < 8 ? _mm256_maddubs_epi16((__m256i)w[i], v)
                                       : _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w[i]), _mm256_sign_epi8(v, (__m256i)w[i]));
      pairs = i == g ? product : _mm256_add_epi16(pairs, product);
    }
    sum += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  for (int i = 0; i < count; i++) {
    int32_t four;
    memcpy(&four, x + 4 * i, 4);
#ifdef VNNI
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w[i], _mm512_set1_epi32(four));
#elif defined(SDOT)
    int32x4_t a[4];
    int8x16_t b[4];
    memcpy(a, &sum, 64), memcpy(b, &w[i], 64);
    for (int k = 0; k < 4; k++) a[k] = vdotq_s32(a[k], b[k], vreinterpretq_s8_s32(vdupq_n_s32(four)));
    memcpy(&sum, a, 64);
#else
    for (int k = 0; k < 4; k++) sum += ((vi)w[i] << (24 - 8 * k) >> 24) * (int32_t)(int8_t)(four >> 8 * k);
#endif
  }
#endif
  return sum;
}

INLINE float largest(vi v) {  // of the bits of positive floats
  int32_t t[LANES];
  memcpy(t, &v, WIDTH);
  for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) t[i] = t[i] > t[i + n] ? t[i] : t[i + n];
  float most;
  memcpy(&most, t, 4);
  return most;
}
INLINE vf max(vf a, vf b) { const vi more = a > b; return (vf)(((vi)a & more) | ((vi)b & ~more)); }
INLINE float total(vf v) {
  float t[LANES];
  memcpy(t, &v, WIDTH);
  for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) t[i] += t[i + n];
  return t[0];
}

// exp(x) within 2e-7 relative: 2^n times a polynomial of degree 6 on [-log(2) / 2, log(2) / 2] (its Taylor series).
INLINE vf exponential(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, in the low bits
  x = max(all(-87.0f), -max(all(-88.0f), -x));
  const vf shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vf r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  vf y = r * (1.0f / 720) + 1.0f / 120;
  y = y * r + 1.0f / 24, y = y * r + 1.0f / 6, y = y * r + 0.5f, y = y * r + 1, y = y * r + 1;
  return y * (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
}

// --- work shared by XLA's threads ------------------------------------------------------------------------------------

enum { MAX_PHASES = 3 };
typedef struct work {  // in phases: the chunks of one begin when those before are done
  atomic_int next[MAX_PHASES], done[MAX_PHASES], users;
  int chunks[MAX_PHASES];
  void (*run)(struct work*, int phase, int chunk);
} work;

static void leave(work* w) { if (atomic_fetch_sub(&w->users, 1) == 1) free(w); }

static void take_part(work* w) {
  for (int phase = 0; phase < MAX_PHASES; phase++) {
    for (int i; (i = atomic_fetch_add(&w->next[phase], 1)) < w->chunks[phase];) {
      w->run(w, phase, i);
      atomic_fetch_add(&w->done[phase], 1);
    }
    // another thread may have lost its core with a chunk in hand
    for (int turns = 0; atomic_load(&w->done[phase]) < w->chunks[phase]; turns++)
      if (turns < 4096) PAUSE(); else sched_yield();
  }
}

// A thread of XLA's that has helped waits a moment for the next call, which comes soon in decoding: waking it again
// takes as long as a small product. Each waiting thread has a seat: 0 is free, WAITING, or the work it is given.
enum { SEATS = 64, WAITING = 1, TURNS = 2048 };
static struct { _Alignas(64) _Atomic(uintptr_t) state; } seats[SEATS];

static int swapped(int seat, uintptr_t from, uintptr_t to) {
  return atomic_compare_exchange_strong(&seats[seat].state, &from, to);
}

static void helper(void* given) {
  work* w = given;
  int seat = -1;
  while (w) {
    take_part(w);
    leave(w);
    w = NULL;
    if (seat >= 0) atomic_store(&seats[seat].state, WAITING);
    else for (int i = 0; i < SEATS && seat < 0; i++) if (swapped(i, 0, WAITING)) seat = i;
    if (seat < 0) return;
    for (int turns = 0; turns < TURNS && atomic_load(&seats[seat].state) == WAITING; turns++) PAUSE();
    if (!swapped(seat, WAITING, 0)) w = (work*)atomic_load(&seats[seat].state);
  }
}

static void ignore(const XLA_FFI_CallFrame* c, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args a = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
  if (error) c->api->XLA_FFI_Error_Destroy(&a);
}

static int num_threads(const XLA_FFI_CallFrame* c) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args a = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, .ctx = c->ctx,
                                          .num_threads = &threads};
  ignore(c, c->api->XLA_FFI_ThreadPool_NumThreads(&a));
  return threads < 1 ? 1 : (int)threads;
}

// Runs and frees w. A thread that comes late may hold it longer than this call, so nothing of it is on the stack.
static void run(const XLA_FFI_CallFrame* c, work* w, int threads) {
  atomic_store(&w->users, threads);
  int helpers = 1;
  for (int i = 0; i < SEATS && helpers < threads; i++) helpers += swapped(i, WAITING, (uintptr_t)w);
  for (; helpers < threads; helpers++) {
    XLA_FFI_ThreadPool_Schedule_Args a = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, .ctx = c->ctx,
                                          .task = helper, .data = w};
    XLA_FFI_Error* error = c->api->XLA_FFI_ThreadPool_Schedule(&a);
    if (error) leave(w);
    ignore(c, error);
  }
  take_part(w);
  leave(w);
}

static XLA_FFI_Error* fail(const XLA_FFI_CallFrame* c, const char* message) {
  XLA_FFI_Error_Create_Args a = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE, .message = message,
                                 .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return c->api->XLA_FFI_Error_Create(&a);
}

// XLA asks every handler for its version when it is registered.
static int is_question(XLA_FFI_CallFrame* c) {
  if (!c->extension_start || c->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata* m = ((XLA_FFI_Metadata_Extension*)c->extension_start)->metadata;
  m->api_version.major_version = XLA_FFI_API_MAJOR;
  m->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

INLINE XLA_FFI_Buffer* argument(const XLA_FFI_CallFrame* c, int i) { return c->args.args[i]; }
INLINE XLA_FFI_Buffer* result(const XLA_FFI_CallFrame* c, int i) { return c->rets.rets[i]; }

// --- products --------------------------------------------------------------------------------------------------------

// 32 rounded inputs: q, and the sums of q (of its halves, of both) and of scale * q; a line of the cache.
typedef struct { _Alignas(64) int8_t q[32]; float scale, sum; int32_t sums[3]; } block;

typedef struct {
  const uint8_t* data;
  int fmt;
  int64_t strips, blocks, group, strip_bytes;
} weight;

static void round_block(const float* x, block* out) {
  vf v[32 / LANES];
  vi top = {0};
  for (int i = 0; i < 32 / LANES; i++) {
    v[i] = loadf(x + LANES * i);
    const vi bits = (vi)v[i] & 0x7fffffff, more = bits > top;  // positive floats compare as integers do, NaN above all
    top = (bits & more) | (top & ~more);
  }
  const float most = largest(top), inverse = most > 0 ? 127 / most : 0, magic = 12582912.0f;
  for (int h = 0; h < 2; h++) {
    vi sum = {0};
    for (int i = h * 16 / LANES; i < (h + 1) * 16 / LANES; i++) {
      const vi q = (vi)(v[i] * inverse + magic) - 0x4b400000;  // to the nearest integer
      const vc narrow = __builtin_convertvector(q, vc);
      memcpy(out->q + LANES * i, &narrow, LANES);
      sum += q;
    }
    int32_t t[LANES];
    memcpy(t, &sum, WIDTH);
    for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) t[i] += t[i + n];
    out->sums[h] = t[0];
  }
  out->sums[2] = out->sums[0] + out->sums[1];
  out->scale = most / 127;
  out->sum = out->scale * out->sums[2];
}

// 16 outputs of `rows` rows of x, each w->blocks blocks: y[n * stride + 0 .. 15].
INLINE void strip_rows(const weight* w, int64_t strip, const block* x, int rows, float* y, int64_t stride,
                       const int bits, const int zero, const int scales) {
  const uint8_t* p = w->data + strip * w->strip_bytes;
  const int64_t blocks = w->blocks, group = w->group;
  vf f[8][PARTS];
  for (int n = 0; n < rows; n++) for (int h = 0; h < PARTS; h++) f[n][h] = (vf){0};
  for (int64_t b = 0; b < blocks;) {
    vf scale[PARTS], min[PARTS];
    for (int h = 0; h < PARTS; h++) {
      if (scales == FLOAT) scale[h] = loadf(p + WIDTH * h), min[h] = loadf(p + 64 + WIDTH * h);
      else scale[h] = halves(p + WIDTH / 2 * h);
      if (scales == MIN || scales == SUB_MIN) min[h] = halves(p + 32 + WIDTH / 2 * h);
    }
    p += shared_bytes(scales);
    for (const int64_t stop = b + group; b < stop; b++) {
      const uint8_t *own = p, *high = p + own_bytes(scales), *low = high + high_bytes(bits);
      p = low + low_bytes(bits);
      for (const uint8_t* ahead = own; ahead < p; ahead += 64) __builtin_prefetch(ahead + 2048);
      for (int h = 0; h < PARTS; h++) {
        vu q[8];
        if (bits == 8) {
          for (int g = 0; g < 8; g++) q[g] = load(low + 64 * g + WIDTH * h);
        } else {
          for (int g = 0; g < 4; g++) {
            const vu both = load(low + 64 * g + WIDTH * h);
            q[g] = both & 0x0f0f0f0f;
            q[g + 4] = both >> 4 & 0x0f0f0f0f;
          }
        }
        if (bits == 5) {
          const vu fifth = load(high + WIDTH * h);
          for (int g = 0; g < 8; g++) q[g] |= (g < 4 ? fifth << (4 - g) : fifth >> (g - 4)) & 0x10101010;
        }
        if (bits == 6)
          for (int k = 0; k < 2; k++) {
            const vu two = load(high + 64 * k + WIDTH * h);
            q[4 * k] |= two << 4 & 0x30303030;
            q[4 * k + 1] |= two << 2 & 0x30303030;
            q[4 * k + 2] |= two & 0x30303030;
            q[4 * k + 3] |= two >> 2 & 0x30303030;
          }
        vf s = scale[h], s1 = s, m = min[h];
        if (scales == SUB_MIN) s *= bytes(own + LANES * h), m *= bytes(own + 16 + LANES * h);
        if (scales == SUB_16) s1 *= signs(own + 16 + LANES * h), s *= signs(own + LANES * h);
        for (int n = 0; n < rows; n++) {
          const block* a = x + n * blocks + b;
          if (scales == SUB_16) {
            const vi first = dot(q, a->q, 4, bits) - (a->sums[0] - (vi){0}) * zero;
            const vi second = dot(q + 4, a->q + 16, 4, bits) - (a->sums[1] - (vi){0}) * zero;
            f[n][h] += (__builtin_convertvector(first, vf) * s + __builtin_convertvector(second, vf) * s1) * a->scale;
          } else {
            vi sum = dot(q, a->q, 8, bits);
            if (zero) sum -= (a->sums[2] - (vi){0}) * zero;
            f[n][h] += __builtin_convertvector(sum, vf) * (s * a->scale);
          }
          if (scales == MIN || scales == FLOAT || scales == SUB_MIN) f[n][h] -= m * a->sum;
        }
      }
    }
  }
  for (int n = 0; n < rows; n++) memcpy(y + n * stride, f[n], 64);
}

#define STRIP(NAME, BITS, ZERO, SCALES, ...) \
  static void strip_##NAME(const weight* w, int64_t strip, const block* x, int64_t rows, float* y, int64_t stride) { \
    for (; rows >= 8; rows -= 8, x += 8 * w->blocks, y += 8 * stride) strip_rows(w, strip, x, 8, y, stride, BITS, ZERO, SCALES); \
    if (rows & 4) { strip_rows(w, strip, x, 4, y, stride, BITS, ZERO, SCALES); x += 4 * w->blocks, y += 4 * stride; } \
    if (rows & 2) { strip_rows(w, strip, x, 2, y, stride, BITS, ZERO, SCALES); x += 2 * w->blocks, y += 2 * stride; } \
    if (rows & 1) strip_rows(w, strip, x, 1, y, stride, BITS, ZERO, SCALES); \
  }
EACH_FORMAT(STRIP)
#define STRIP_NAME(NAME, ...) [NAME] = strip_##NAME,
typedef void strip_product(const weight*, int64_t, const block*, int64_t, float*, int64_t);
static strip_product* const strip_products[FORMATS] = {EACH_FORMAT(STRIP_NAME)};
static void product(const weight* w, int64_t strip, const block* x, int64_t rows, float* y, int64_t stride) {
  strip_products[w->fmt](w, strip, x, rows, y, stride);
}

// The weight in argument i; its format and group are numbers 2 k and 2 k + 1 of the attribute.
static int get_weight(const XLA_FFI_CallFrame* c, int i, int k, int64_t inputs, weight* w) {
  const XLA_FFI_Array* numbers = c->attrs.attrs[0];
  const XLA_FFI_Buffer* data = argument(c, i);
  if (numbers->dtype != XLA_FFI_DataType_S64 || (int64_t)numbers->size < 2 * k + 2) return 0;
  const int64_t* pair = (const int64_t*)numbers->data + 2 * k;
  if (pair[0] < 0 || pair[0] >= FORMATS || pair[1] < 1 || inputs % (32 * pair[1]) || data->rank != 2) return 0;
  *w = (weight){data->data, (int)pair[0], data->dims[0], inputs / 32, pair[1], data->dims[1]};
  return w->strip_bytes == qwen_strip_bytes(w->fmt, inputs, w->group);
}

INLINE int range(int chunks, int64_t count, int chunk, int64_t* begin) {  // evenly cut
  *begin = count * chunk / chunks;
  return (int)(count * (chunk + 1) / chunks - *begin);
}

enum { ROUND, FIRST, SECOND };
typedef struct {
  _Alignas(64) work base;
  int64_t rows, inputs;
  const float* x;
  float *y[3];
  block *rounded, *hidden;  // [rows, inputs / 32], [rows, features / 32]
  int num;
  weight w[3];
} products;

static void round_rows(products* p, int chunk) {
  int64_t begin;
  const int64_t count = p->rows * (p->inputs / 32);
  for (int n = range(p->base.chunks[ROUND], count, chunk, &begin); n--; begin++) round_block(p->x + 32 * begin, p->rounded + begin);
}

static void run_matmul(work* base, int phase, int chunk) {
  products* p = (products*)base;
  if (phase == ROUND) return round_rows(p, chunk);
  int64_t all_strips = 0, begin;
  for (int k = 0; k < p->num; k++) all_strips += p->w[k].strips;
  int count = range(base->chunks[phase], all_strips, chunk, &begin);
  for (int k = 0; k < p->num; begin -= p->w[k++].strips)
    for (; count && begin < p->w[k].strips; count--, begin++)
      product(&p->w[k], begin, p->rounded, p->rows, p->y[k] + 16 * begin, 16 * p->w[k].strips);
}

// silu(gate) * up of 32 features at a time, rounded where it is made.
static void run_mlp(work* base, int phase, int chunk) {
  products* p = (products*)base;
  if (phase == ROUND) return round_rows(p, chunk);
  int64_t begin;
  const int64_t features = p->w[0].strips * 16;
  if (phase == SECOND) {
    for (int n = range(base->chunks[phase], p->w[2].strips, chunk, &begin); n--; begin++)
      product(&p->w[2], begin, p->hidden, p->rows, p->y[0] + 16 * begin, 16 * p->w[2].strips);
    return;
  }
  for (int count = range(base->chunks[phase], features / 32, chunk, &begin); count--; begin++)
    for (int64_t row = 0; row < p->rows; row += 8) {
      const int64_t rows = p->rows - row < 8 ? p->rows - row : 8;
      const block* x = p->rounded + row * (p->inputs / 32);
      float gate[8][32], up[8][32];
      for (int h = 0; h < 2; h++) {
        product(&p->w[0], 2 * begin + h, x, rows, gate[0] + 16 * h, 32);
        product(&p->w[1], 2 * begin + h, x, rows, up[0] + 16 * h, 32);
      }
      for (int n = 0; n < rows; n++) {
        for (int i = 0; i < 32; i += LANES) {
          const vf g = loadf(gate[n] + i), y = g / (1 + exponential(-g)) * loadf(up[n] + i);
          memcpy(gate[n] + i, &y, WIDTH);
        }
        round_block(gate[n], p->hidden + (row + n) * (features / 32) + begin);
      }
    }
}

static int chunks_of(int64_t units, int threads) { return (int)(units < 8 * threads ? units : 8 * threads); }

static products* begin_products(const XLA_FFI_CallFrame* c, int64_t hidden, int threads) {
  const int64_t rows = argument(c, 0)->dims[0], inputs = argument(c, 0)->dims[1], blocks = rows * (inputs + hidden) / 32;
  products* p = aligned_alloc(64, sizeof(products) + blocks * sizeof(block));
  if (!p) return NULL;
  memset(p, 0, sizeof *p);
  p->rows = rows, p->inputs = inputs, p->x = argument(c, 0)->data;
  p->rounded = (block*)(p + 1), p->hidden = p->rounded + rows * (inputs / 32);
  p->base.chunks[ROUND] = rows < 8 ? 1 : threads;
  return p;
}

static int is_matrix(const XLA_FFI_Buffer* b, int64_t multiple) {
  return b->rank == 2 && b->dtype == XLA_FFI_DataType_F32 && b->dims[1] % multiple == 0;
}

// x float32 [N, K] times up to three weights [O, K], each packed uint8 [O / 16, bytes]: float32 [N, O] of each.
XLA_FFI_Error* qwen_matmul(XLA_FFI_CallFrame* c) {
  if (is_question(c)) return NULL;
  int threads = num_threads(c);
  const int num = (int)c->args.size - 1;
  if (num < 1 || num > 3 || !is_matrix(argument(c, 0), 32)) return fail(c, "qwen_matmul: float32 [N, K] and 1 to 3 weights");
  products* p = begin_products(c, 0, threads);
  if (!p) return fail(c, "qwen_matmul: no memory");
  p->base.run = run_matmul, p->num = num;
  int64_t strips = 0, bytes = 0;
  for (int k = 0; k < num; k++) {
    p->y[k] = result(c, k)->data;
    if (!get_weight(c, k + 1, k, p->inputs, &p->w[k])) { free(p); return fail(c, "qwen_matmul: a weight of another format or size"); }
    strips += p->w[k].strips, bytes += p->w[k].strips * p->w[k].strip_bytes;
  }
  if (bytes * p->rows < 1 << 16) threads = 1;
  p->base.chunks[FIRST] = chunks_of(strips, threads);
  run(c, &p->base, threads);
  return NULL;
}

// x float32 [N, D]; gate and up [F, D], F a multiple of 32, and down [D', F], packed: float32 [N, D'].
XLA_FFI_Error* qwen_mlp(XLA_FFI_CallFrame* c) {
  if (is_question(c)) return NULL;
  const int threads = num_threads(c);
  if (c->args.size != 4 || !is_matrix(argument(c, 0), 32)) return fail(c, "qwen_mlp: float32 [N, D] and 3 weights");
  const int64_t features = argument(c, 1)->dims[0] * 16;
  products* p = begin_products(c, features, threads);
  if (!p) return fail(c, "qwen_mlp: no memory");
  p->base.run = run_mlp, p->num = 3, p->y[0] = result(c, 0)->data;
  int good = features % 32 == 0;
  for (int k = 0; k < 3; k++) good = good && get_weight(c, k + 1, k, k < 2 ? p->inputs : features, &p->w[k]);
  if (!good || p->w[1].strips != p->w[0].strips) { free(p); return fail(c, "qwen_mlp: a weight of another format or size"); }
  p->base.chunks[FIRST] = chunks_of(features / 32, threads);
  p->base.chunks[SECOND] = chunks_of(p->w[2].strips, threads);
  run(c, &p->base, threads);
  return NULL;
}

// --- weights as they are ---------------------------------------------------------------------------------------------

// The weights of a packed row. Scales of 16 bits times codes are exact in float32.
static void widen(const weight* w, int64_t row, float* out) {
  const format f = formats[w->fmt];
  const uint8_t* p = w->data + row / 16 * w->strip_bytes;
  const int r = row % 16;
  for (int64_t b = 0; b < w->blocks;) {
    float lanes[16], scale, min = 0;
    for (int h = 0; f.scales != FLOAT && h < PARTS; h++) { const vf v = halves(p + WIDTH / 2 * h); memcpy(lanes + LANES * h, &v, WIDTH); }
    scale = lanes[r];
    for (int h = 0; shared_bytes(f.scales) == 64 && h < PARTS; h++) {
      const vf v = halves(p + 32 + WIDTH / 2 * h);
      memcpy(lanes + LANES * h, &v, WIDTH);
      min = lanes[r];
    }
    if (f.scales == FLOAT) memcpy(&scale, p + 4 * r, 4), memcpy(&min, p + 64 + 4 * r, 4);
    p += shared_bytes(f.scales);
    for (const int64_t stop = b + w->group; b < stop; b++) {
      const uint8_t *own = p, *high = p + own_bytes(f.scales), *low = high + high_bytes(f.bits);
      p = low + low_bytes(f.bits);
      const float m = f.scales == SUB_MIN ? min * own[16 + r] : min;
      for (int i = 0; i < 32; i++) {
        const int g = i / 4, at = 4 * r + i % 4;
        int q = f.bits == 8 ? BIAS ? low[64 * g + at] : (int8_t)low[64 * g + at] : low[64 * (g % 4) + at] >> g / 4 * 4 & 15;
        if (f.bits == 5) q |= (high[at] >> g & 1) << 4;
        if (f.bits == 6) q |= (high[64 * (g / 4) + at] >> g % 4 * 2 & 3) << 4;
        float s = scale;
        if (f.scales == SUB_MIN) s *= own[r];
        if (f.scales == SUB_16) s *= (int8_t)own[i / 16 * 16 + r];
        *out++ = s * (q - f.zero) - m;
      }
    }
  }
}

typedef struct { work base; int64_t count, inputs; const int32_t* ids; float* y; weight w; } rows;
static void run_rows(work* base, int phase, int chunk) {
  rows* p = (rows*)base;
  int64_t begin;
  for (int n = range(base->chunks[phase], p->count, chunk, &begin); n--; begin++) {
    float* y = p->y + begin * p->inputs;
    const int64_t id = p->ids[begin];
    if (id >= 0 && id < 16 * p->w.strips) widen(&p->w, id, y);
    else memset(y, 0, 4 * p->inputs);
  }
}

// Rows ids int32 [N] of a packed weight [O, K]: float32 [N, K], zeros where an id is none of the rows.
XLA_FFI_Error* qwen_rows(XLA_FFI_CallFrame* c) {
  if (is_question(c)) return NULL;
  const int threads = num_threads(c);
  if (c->args.size != 2 || argument(c, 0)->dtype != XLA_FFI_DataType_S32) return fail(c, "qwen_rows: int32 [N] and a weight");
  rows* p = calloc(1, sizeof(rows));
  if (!p) return fail(c, "qwen_rows: no memory");
  p->base.run = run_rows, p->count = argument(c, 0)->dims[0], p->ids = argument(c, 0)->data;
  p->y = result(c, 0)->data, p->inputs = result(c, 0)->dims[1];
  if (!get_weight(c, 1, 0, p->inputs, &p->w)) { free(p); return fail(c, "qwen_rows: a weight of another format or size"); }
  p->base.chunks[0] = chunks_of(p->count, threads);
  run(c, &p->base, p->count > 64 ? threads : 1);
  return NULL;
}

// --- attention of single queries -------------------------------------------------------------------------------------

typedef struct {
  work base;
  int64_t batch, heads, kv_heads, width, page, pages, splits;
  int64_t head_step, page_step;  // in floats, from one to the next
  const float *q, *k, *v;
  const int32_t *tables, *begins, *ends;
  float *y, *parts;  // of each split of each row and head: [splits, batch, heads] of (largest score, sum, output [width])
} attention;

// Keys begin to end of one row for the query heads that share a key head, in one pass (arXiv 2205.14135, 2.3.1).
static void attend_part(const attention* a, int64_t row, int64_t head, int64_t begin, int64_t end, int64_t split) {
  enum { KEYS = 32 };
  const int64_t group = a->heads / a->kv_heads, h = a->width;
  const float scale = sqrtf(h);
  float scores[KEYS];
  for (int64_t g = 0; g < group; g++) {
    float* part = a->parts + ((split * a->batch + row) * a->heads + head * group + g) * (h + 2);
    part[0] = -1e30f;
    memset(part + 1, 0, 4 * (h + 1));
  }
  for (int64_t key = begin, count; key < end; key += count) {
    const int64_t left = a->page - key % a->page;
    count = end - key < KEYS ? end - key : KEYS;
    count = count < left ? count : left;
    int64_t page = a->tables[row * a->pages + key / a->page];
    const int64_t at = page * a->page_step + head * a->head_step + key % a->page * h;
    for (int64_t g = 0; g < group; g++) {
      const float* q = a->q + (row * a->heads + head * group + g) * h;
      float* part = a->parts + ((split * a->batch + row) * a->heads + head * group + g) * (h + 2);
      float top = part[0];
      for (int64_t j = 0; j < count; j++) {
        vf sum[2] = {{0}, {0}};
        for (int64_t i = 0; i < h; i += 16)
          for (int n = 0; n < 16; n += LANES) sum[n / LANES % 2] += loadf(q + i + n) * loadf(a->k + at + j * h + i + n);
        scores[j] = total(sum[0] + sum[1]) / scale;
        top = scores[j] > top ? scores[j] : top;
      }
      for (int64_t j = count; j < KEYS; j++) scores[j] = -1e30f;
      vf sum = {0};
      for (int j = 0; j < KEYS; j += LANES) {
        const vf e = exponential(loadf(scores + j) - top);
        memcpy(scores + j, &e, WIDTH);
      }
      for (int64_t j = count; j < KEYS; j++) scores[j] = 0;
      for (int j = 0; j < KEYS; j += LANES) sum += loadf(scores + j);
      const vf old = exponential(all(part[0] - top));
      part[0] = top;
      part[1] = part[1] * old[0] + total(sum);
      for (int64_t i = 0; i < h; i += LANES) {
        vf out = loadf(part + 2 + i) * old;
        for (int64_t j = 0; j < count; j++) out += scores[j] * loadf(a->v + at + j * h + i);
        memcpy(part + 2 + i, &out, WIDTH);
      }
    }
  }
}

static void run_attention(work* base, int phase, int chunk) {
  attention* a = (attention*)base;
  if (phase == 0) {
    const int64_t split = chunk % a->splits, head = chunk / a->splits % a->kv_heads, row = chunk / a->splits / a->kv_heads;
    const int64_t begin = a->begins[row] < 0 ? 0 : a->begins[row];
    const int64_t stop = a->ends[row] < a->page * a->pages ? a->ends[row] : a->page * a->pages, count = stop > begin ? stop - begin : 0;
    attend_part(a, row, head, begin + count * split / a->splits, begin + count * (split + 1) / a->splits, split);
    return;
  }
  int64_t at;
  for (int n = range(base->chunks[1], a->batch * a->heads, chunk, &at); n--; at++) {
    const int64_t step = a->batch * a->heads * (a->width + 2);
    const float* part = a->parts + at * (a->width + 2);
    float* y = a->y + at * a->width;
    float top = -1e30f, sum = 0;
    for (int64_t s = 0; s < a->splits; s++) top = part[s * step] > top ? part[s * step] : top;
    memset(y, 0, 4 * a->width);
    for (int64_t s = 0; s < a->splits; s++) {
      const vf old = exponential(all(part[s * step] - top));
      sum += part[s * step + 1] * old[0];
      for (int64_t i = 0; i < a->width; i++) y[i] += part[s * step + 2 + i] * old[0];
    }
    for (int64_t i = 0; i < a->width; i++) y[i] /= sum;
  }
}

// q float32 [B, H, h]; k and v float32 pools of pages, of which tables int32 [B, M] name each row's; begins and ends
// int32 [B]: places of the keys that are seen. Pools are [K, P, page, h], or with attribute by_row [B, K, S, h], of
// which each row is a page. Returns float32 [B, H, h]; NaN for a row that sees no key.
XLA_FFI_Error* qwen_attention(XLA_FFI_CallFrame* c) {
  if (is_question(c)) return NULL;
  const int threads = num_threads(c);
  const XLA_FFI_Buffer *q = argument(c, 0), *k = argument(c, 1), *tables = argument(c, 3);
  if (c->args.size != 6 || q->rank != 3 || k->rank != 4 || q->dims[2] != k->dims[3] || q->dims[2] % 16)
    return fail(c, "qwen_attention: q [B, H, h], k and v of four axes with h a multiple of 16");
  const int by_row = *(const uint8_t*)((const XLA_FFI_Scalar*)c->attrs.attrs[0])->value;
  const int64_t batch = q->dims[0], heads = q->dims[1], width = q->dims[2], kv_heads = k->dims[by_row ? 1 : 0];
  const int64_t units = batch * kv_heads, capacity = tables->dims[1] * k->dims[2];
  int64_t splits = 1;
  while (units * splits < 2 * threads && capacity / (2 * splits) >= 128) splits *= 2;
  attention* a = malloc(sizeof(attention) + 4 * splits * batch * heads * (width + 2));
  if (!a) return fail(c, "qwen_attention: no memory");
  *a = (attention){.batch = batch, .heads = heads, .kv_heads = kv_heads, .width = width, .page = k->dims[2],
                   .pages = tables->dims[1], .splits = splits, .q = q->data, .k = k->data, .v = argument(c, 2)->data,
                   .tables = tables->data, .begins = argument(c, 4)->data, .ends = argument(c, 5)->data,
                   .y = result(c, 0)->data, .parts = (float*)(a + 1)};
  a->head_step = (by_row ? 1 : k->dims[1]) * a->page * width;
  a->page_step = (by_row ? kv_heads : 1) * a->page * width;
  a->base.run = run_attention, a->base.chunks[0] = (int)(units * splits), a->base.chunks[1] = 1;
  run(c, &a->base, threads);
  return NULL;
}
