// The kernels, and beside them what memory delivers: an array read by the same threads in the same chunks.
#include "../qwen_jax/kernels/native/kernels.c"

typedef struct { work base; const uint8_t* data; int64_t lines; uint32_t* sum; } reading;

static void read_lines(work* base, int phase, int chunk) {
  reading* r = (reading*)base;
  int64_t begin;
  const int count = range(base->chunks[phase], r->lines, chunk, &begin);
  vu sums[256 / WIDTH] = {{0}};
  for (const uint8_t* p = r->data + 256 * begin; p < r->data + 256 * (begin + count); p += 256)
    for (int i = 0; i < 256 / WIDTH; i++) {
      sums[i] += load(p + WIDTH * i);
      if (i % (64 / WIDTH) == 0) __builtin_prefetch(p + 2048 + WIDTH * i);
    }
  for (int i = 1; i < 256 / WIDTH; i++) sums[0] += sums[i];
  if (chunk == 0) memcpy(r->sum, &sums[0], WIDTH);
}

// Bytes [N] after an array uint32 [16] that it waits for: uint32 [16].
XLA_FFI_Error* qwen_stream(XLA_FFI_CallFrame* c) {
  if (is_question(c)) return NULL;
  const int threads = num_threads(c);
  reading* r = calloc(1, sizeof *r);
  if (!r) return fail(c, "qwen_stream: no memory");
  r->base.run = read_lines, r->data = argument(c, 0)->data, r->lines = argument(c, 0)->dims[0] / 256;
  r->sum = result(c, 0)->data;
  r->base.chunks[0] = 8 * threads;
  run(c, &r->base, threads);
  return NULL;
}
