// The kernels without XLA, for a processor that is emulated: FORMAT OUT IN ROWS, then GGUF blocks and x on standard
// input; the products [ROWS, OUT] and the weights [OUT, IN], float32, on standard output.
#include "../../qwen_jax/kernels/native/kernels.c"
#include <stdio.h>

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int fmt = atoi(argv[1]);
  const int64_t out = atoi(argv[2]), in = atoi(argv[3]), rows = atoi(argv[4]), blocks = in / 32;
  const format f = formats[fmt];
  const int64_t raw_bytes = out * (in / f.raw_inputs) * f.raw_bytes, strip_bytes = qwen_strip_bytes(fmt, in, f.raw_inputs / 32);
  uint8_t *raw = malloc(raw_bytes), *strips = malloc(out / 16 * strip_bytes);
  float *x = malloc(4 * rows * in), *y = malloc(4 * rows * out), *dense = malloc(4 * out * in);
  block* rounded = aligned_alloc(64, rows * blocks * sizeof(block));
  if (fread(raw, 1, raw_bytes, stdin) != (size_t)raw_bytes || fread(x, 4, rows * in, stdin) != (size_t)(rows * in)) return 2;
  qwen_pack_gguf(fmt, raw, out, in, strips);
  const weight w = {strips, fmt, out / 16, blocks, f.raw_inputs / 32, strip_bytes};
  for (int64_t i = 0; i < rows * blocks; i++) round_block(x + 32 * i, rounded + i);
  for (int64_t s = 0; s < w.strips; s++) product(&w, s, rounded, rows, y + 16 * s, out);
  for (int64_t n = 0; n < out; n++) widen(&w, n, dense + n * in);
  fprintf(stderr, "%s", ISA);
  fwrite(y, 4, rows * out, stdout);
  fwrite(dense, 4, out * in, stdout);
  return 0;
}
