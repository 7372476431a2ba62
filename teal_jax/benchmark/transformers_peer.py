"""The peer: HuggingFace transformers with a static kv_cache under torch.compile, a process of its own.

Reads sizes as JSON on stdin and prints a line of JSON for each mode of compilation as it comes, so that what was
measured before a time limit counts. torch is optional: nothing else in this library imports it.
"""

import importlib
import json
import sys
import time
from typing import Any

MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")
"""Compilation modes in the order they are tried: the one that needs less time to compile first."""


def measure(sizes: dict[str, Any], mode: str, device: str) -> dict[str, Any]:
    """Tokens a second of a random Llama of these sizes, and seconds until its first compiled token."""
    torch = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes["config"], attn_implementation="sdpa")
    dtype = getattr(torch, sizes["dtype"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(default)
    prompt, tokens = sizes["prompt"], sizes["tokens"]
    cache = transformers.StaticCache(
        config=config, max_cache_len=prompt + tokens, max_batch_size=1, device=device, dtype=dtype
    )
    text = torch.randint(0, config.vocab_size, (1, prompt), device=device)

    def forward(token: Any, position: Any) -> Any:
        # Both positions: which of them a forward pass reads depends on the version of transformers.
        out = model(
            input_ids=token,
            position_ids=position[None],
            cache_position=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(forward, mode=None if device == "cpu" else mode)
    where = [torch.tensor([prompt + i], device=device) for i in range(tokens)]

    def run() -> float:
        cache.reset()
        token = forward(text, torch.arange(prompt, device=device))
        wait(torch, device)
        start = time.perf_counter()
        for position in where:
            torch.compiler.cudagraph_mark_step_begin()
            # A clone: the next replay of a CUDA graph overwrites its output.
            token = step(token, position).clone()
        wait(torch, device)
        return time.perf_counter() - start

    with torch.no_grad():
        first = run()
        best = min(run() for _ in range(sizes["repeats"]))
    return {
        "mode": mode,
        "seconds_per_token": best / tokens,
        "first_token_s": first - best + best / tokens,
        "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def wait(torch: Any, device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure every mode; a mode that fails is a line with `error`."""
    sizes = json.loads(sys.stdin.read())
    device = sizes.get("device", "cuda")
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        print(json.dumps({"error": "torch has no CUDA device"}), flush=True)
        return
    for mode in MODES:
        try:
            line = measure(sizes, mode, device)
        except Exception as error:
            line = {"mode": mode, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
