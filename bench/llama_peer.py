"""Prefill and decode rates of llama.cpp, for `bench.cpu`: a script for an interpreter that has llama-cpp-python.

    python bench/llama_peer.py FILE.gguf NEW_TOKENS REPETITIONS THREADS < prompt.json

To be a fair peer it must be compiled for this processor, from its sources:
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
"""

import ctypes
import json
import sys
import time

import llama_cpp as llama  # pyright: ignore[reportMissingImports]


def main() -> None:
    path, new_tokens, repetitions, threads = sys.argv[1], *map(int, sys.argv[2:5])
    prompt = json.load(sys.stdin)
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    memory = llama.llama_get_memory(context)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def read(tokens: list[int]) -> int:
        """The likeliest token after these."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = llama.llama_get_logits_ith(context, -1)
        values = (ctypes.c_float * vocabulary).from_address(ctypes.addressof(logits.contents))
        return max(range(0, vocabulary, 1024), key=values.__getitem__)  # any token costs as much to follow

    rates = {f"prefill {len(prompt)}": 0.0, "decode batch 1": 0.0}
    for _ in range(repetitions + 1):
        llama.llama_memory_clear(memory, True)
        began = time.perf_counter()
        token = read(prompt)
        prefilled = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = read([token])
        done = time.perf_counter()
        found = (len(prompt) / (prefilled - began), (new_tokens - 1) / (done - prefilled))
        rates = {name: max(rate, new) for (name, rate), new in zip(rates.items(), found, strict=True)}
    print(json.dumps(rates))


main()
