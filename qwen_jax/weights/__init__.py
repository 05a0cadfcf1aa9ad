"""Other people's formats, in and out: safetensors, .bin, GGUF; Orbax is ours. `open_checkpoint` is the way in."""
