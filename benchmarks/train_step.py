"""The fast training step beside the plain one: time, memory, FLOP.

    python -m benchmarks.train_step [--quick] [--json FILE]

The plain step is the released structure (tests/plain.py): captions padded to 32 tokens, three
passes, full logits, the whole embedding table a parameter with optimiser state. Both steps include
backward, clipping, AdamW and the rescaling of the [IMG] rows. Random weights; an OPT-125M-sized
language model; one CPU thread, timed in CPU seconds, which a busy machine disturbs least; captions
of 11 tokens on average.

The released step also runs CLIP ViT-L/14 three times per picture, which is measured on one picture
and multiplied. FLOP are counted on meta tensors at OPT-6.7B's sizes, with and without packing.

With a GPU, OPT-1.3B and OPT-6.7B in bfloat16 follow, beside a measured matrix product.
"""

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, OPTConfig, OPTForCausalLM

from pipeline.batch import CaptionBatch
from pipeline.heads import Heads, HeadSizes
from pipeline.image_tokens import rescale_image_rows
from pipeline.language_model import LanguageModel
from pipeline.objective import PackingDraws, training_losses
from pipeline.settings import Objective
from tests.plain import Plain
from tests.tiny_language_models import tiny_tokenizer

NUM_ROWS = 50266
LENGTHS = (5, 8, 9, 10, 11, 12, 14, 19)
OBJECTIVE = Objective.released()
OPT_1_3B: dict[str, Any] = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24}
OPT_6_7B: dict[str, Any] = {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32}
for sizes in (OPT_1_3B, OPT_6_7B):
    sizes.update(word_embed_proj_dim=sizes["hidden_size"], num_attention_heads=32)


def opt_gill(device: str, dtype: torch.dtype, **sizes: Any) -> MultimodalLanguageModel:
    """Random GILL at the paper's head sizes around an OPT of these sizes (default OPT-125M's)."""
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = OPTForCausalLM(OPTConfig(**sizes))
        finally:
            torch.set_default_dtype(default)
        language_model = LanguageModel(model, tiny_tokenizer(), num_rows=NUM_ROWS)
        return MultimodalLanguageModel(
            language_model, Heads(HeadSizes(d=1024, e=language_model.width))
        )


def captions_of(num_examples: int) -> list[list[int]]:
    """Captions of 11 tokens on average, cut where the released code cuts them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(5, 50000, (LENGTHS[i % len(LENGTHS)],), generator=generator).tolist()
        for i in range(num_examples)
    ]


def batch_of(num_examples: int, device: str) -> CaptionBatch:
    """A random batch at the paper's sizes."""
    generator = torch.Generator().manual_seed(0)
    return CaptionBatch.from_lists(
        captions_of(num_examples),
        torch.randn(num_examples, 1024, generator=generator),
        torch.randn(num_examples, 77, 768, generator=generator),
        torch.arange(num_examples),
        max_tokens=23,
    ).to(device)


Step = Callable[[CaptionBatch, bool], None]
"""One whole optimiser step on a batch, packed or not."""


def adamw(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The released optimiser, with its state already there: no step is measured creating it."""
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.95), weight_decay=0.01)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def fast_step(gill: MultimodalLanguageModel) -> Step:
    """The fast formulation."""
    trained = list(gill.heads.parameters())
    optimizer = adamw(trained)
    norm = gill.language_model.mean_row_norm()

    def step(batch: CaptionBatch, packed: bool) -> None:
        draws = PackingDraws.same(len(batch), packed)
        training_losses(gill, batch, OBJECTIVE, draws).total.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rescale_image_rows(gill.heads.image_embeddings, norm)

    return step


def plain_step(plain: Plain) -> Step:
    """The released structure."""
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = adamw(trained)
    table, r = plain.input_table, plain.r

    def step(batch: CaptionBatch, packed: bool) -> None:
        captions = [part.tolist() for part in batch.tokens.split(batch.lengths)]
        draws = PackingDraws.same(len(batch), packed)
        losses = plain.losses(captions, batch.pooled, batch.targets, OBJECTIVE, draws)
        losses["total"].backward()
        assert table.grad is not None
        table.grad[:-r] = 0
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            mean = table[:-r].norm(dim=-1).mean()
            table[-r:] *= mean / table[-r:].norm(dim=-1, keepdim=True)

    return step


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def held_mib() -> float:
    """Resident memory, after the allocator has given back what it kept of freed tensors."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_mib(call: Callable[[], object]) -> float:
    """The most resident memory during a call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return _status("VmHWM")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def clip_seconds() -> float:
    """CLIP ViT-L/14 on one picture: a quarter of its layers, times four."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.01)
            else:
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
        picture = torch.randn(1, 3, 224, 224)
        return 4 * min(cpu_seconds(lambda: model(picture)) for _ in range(2))


def flop_per_example() -> dict[str, float]:
    """Of the fast step at OPT-6.7B's sizes, forward and backward, counted on meta tensors."""
    gill = opt_gill("meta", torch.float32, **OPT_6_7B)
    batch = batch_of(32, "meta")
    flop = {}
    for name, packed in {"flop_per_example": False, "flop_per_example_packed": True}.items():
        draws = PackingDraws.same(len(batch), packed)
        with FlopCounterMode(display=False) as counter:
            training_losses(gill, batch, OBJECTIVE, draws).total.backward()
        flop[name] = counter.get_total_flops() / len(batch)
    return flop


def on_cpu(cases: list[tuple[int, bool]], repetitions: int) -> dict[str, float]:
    """Both steps in turn on each case (examples, packed); the first case is the headline."""
    torch.set_num_threads(1)
    gill = opt_gill("cpu", torch.float32)
    plain = Plain(gill.language_model.model, gill.heads, NUM_ROWS, [2], pad_to=32)
    fast, slow = fast_step(gill), plain_step(plain)
    clip = clip_seconds()
    print(
        f"CLIP ViT-L/14, one picture: {clip:.2f} s; the released step runs it 3 times per example"
    )
    print("examples  packed   fast s  plain s  ratio  with CLIP  fast MiB  plain MiB  ratio")
    results: dict[str, float] = {}
    for num_examples, packed in cases:
        batch = batch_of(num_examples, "cpu")
        run_fast = partial(fast, batch, packed)
        run_slow = partial(slow, batch, packed)
        held = held_mib()
        fast_mib = peak_mib(run_fast) - held
        held, fast_times, slow_times = held_mib(), [cpu_seconds(run_fast)], []
        slow_mib = peak_mib(lambda: slow_times.append(cpu_seconds(run_slow))) - held  # noqa: B023
        for _ in range(repetitions - 1):
            fast_times.append(cpu_seconds(run_fast))
            slow_times.append(cpu_seconds(run_slow))
        fast_s, slow_s = min(fast_times), min(slow_times)
        with_clip = (slow_s + 3 * num_examples * clip) / fast_s
        print(
            f"{num_examples:8d}  {packed!s:>6}  {fast_s:7.2f}  {slow_s:7.2f}"
            f"  {slow_s / fast_s:5.2f}  {with_clip:9.1f}"
            f"  {fast_mib:8.0f}  {slow_mib:9.0f}  {fast_mib / slow_mib:5.2f}"
        )
        name = "" if not results else f"_{num_examples}{'_packed' if packed else ''}"
        results[f"speedup{name}"] = slow_s / fast_s
        results[f"speedup_with_clip{name}"] = with_clip
        results[f"memory_ratio{name}"] = fast_mib / slow_mib
    return results


def on_gpu(models: dict[str, dict[str, Any]], num_examples: int = 200) -> dict[str, float]:
    """Whole fast steps in bfloat16, and how much of the measured matrix-product rate they reach."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / min(_gpu_seconds(lambda: a @ a) for _ in range(10))
    print(f"product of two 8192 x 8192 matrices in bfloat16: {rate / 1e12:.0f} TFLOP/s")
    print("model      packed   s/step  TFLOP/s  of product  peak GiB  h for 20 000 steps")
    batch = batch_of(num_examples, "cuda")
    results: dict[str, float] = {}
    for name, sizes in models.items():
        gill = opt_gill("cuda", torch.bfloat16, **sizes)
        fast = fast_step(gill)
        for packed in (False, True):
            with FlopCounterMode(display=False) as counter:
                fast(batch, packed)
            fast(batch, packed)
            torch.cuda.reset_peak_memory_stats()
            elapsed = min(_gpu_seconds(lambda: fast(batch, packed)) for _ in range(5))  # noqa: B023
            reached = counter.get_total_flops() / elapsed
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"{name:9}  {packed!s:>6}  {elapsed:7.3f}  {reached / 1e12:7.0f}"
                f"  {reached / rate:10.2f}  {peak:8.1f}  {elapsed * 20_000 / 3600:18.2f}"
            )
            suffix = f"{name}{'_packed' if packed else ''}"
            results[f"gpu_seconds_{suffix}"] = elapsed
            results[f"gpu_utilisation_{suffix}"] = reached / rate
        del gill, fast
        torch.cuda.empty_cache()
    return results


def _gpu_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case once, within 50 s")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    cases = [(16, False)]
    if not arguments.quick:
        cases += [(32, False), (16, True), (32, True)]
    results = on_cpu(cases, repetitions=1 if arguments.quick else 3)
    flop = flop_per_example()
    print(
        "OPT-6.7B, TFLOP per example, alone and packed:",
        *(f"{f / 1e12:.3f}" for f in flop.values()),
    )
    results |= flop
    if torch.cuda.is_available():
        models = {"OPT-1.3B": OPT_1_3B}
        results |= on_gpu(models if arguments.quick else models | {"OPT-6.7B": OPT_6_7B})
    line = json.dumps(results)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
