"""How fast a GPU embeds passages in bfloat16, against sentence-transformers and against the GPU's own limit.

Random weights of a shape, the same on all sides, and made-up passages whose words are tokens. sentence-transformers is
given texts and embeds them in batches of its best size; the time that it spends on tokens is measured and taken off
("model only"), since Sparring has token ids in its shards. It leaves padding out by itself where the package flash_attn
is installed; without that package, the table says so and it pads. Sides take turns; numbers are medians over the turns.
FLOP are those of the linear layers and of attention over real tokens. MFU is their share of --peak-tflops, the data
sheet's; "share of a product" is the share of a large matrix product's speed, measured on the same device.

    python benchmarks/encode_gpu.py [--shapes bert-base,bert-large] [--peak-tflops 989]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from benchmarks.work import flop, matrix_peak, wait
from engine.models.encode import Encoder, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from launcher.plan.models import named_settings

WORDS = ["time", "river", "the", "a", "of", "built", "in", "city", "was", "language", "first", "known"]
MAX_LENGTH = 128
SPECIAL_TOKENS = 2


def compare(shape: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one shape."""
    device = torch.device(arguments.device)
    tokenizer = load_tokenizer(str(make_random_model(folder / "tiny", WORDS)))
    settings = named_settings(shape)
    torch.manual_seed(0)
    BertModel(settings).save_pretrained(folder / shape)
    tokenizer.save_pretrained(folder / shape)
    retriever = Retriever.load(str(folder / shape), pooling="mean", similarity="dot", tied=True)
    retriever = retriever.to(device=device, dtype=torch.bfloat16).eval()
    encoders = {"packed": retriever.document_encoder()}
    if device.type == "cuda":
        retriever.compiles = True
        encoders["packed, compiled"] = retriever.document_encoder()
    template = InputTemplate.from_tokenizer(tokenizer)
    peer, rows = _Peer(folder / shape, device), []
    for mix, lengths in _mixes(arguments.passages).items():
        rng = np.random.default_rng(1)
        texts = [" ".join(rng.choice(WORDS, length - SPECIAL_TOKENS)) for length in lengths.tolist()]
        listed = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [np.asarray(row, dtype=np.uint32) for row in listed]  # as shards give them
        work = flop(settings, [len(row) + SPECIAL_TOKENS for row in ids])

        def ours(encoder: Encoder, tokens: int, ids: Any = ids) -> Callable[[], float]:
            options: dict[str, Any] = {"max_length": MAX_LENGTH, "tokens_per_batch": tokens, "device": device}
            return lambda: _seconds(device, lambda: encode_queries(encoder, template, ids, **options))

        sides: dict[str, Callable[[], float]] = {
            f"{name}, {tokens} tokens": ours(encoder, tokens)
            for name, encoder in encoders.items()
            for tokens in arguments.tokens
        }
        sides[f"padded, {arguments.tokens[0]} tokens"] = ours(retriever.encode_documents, arguments.tokens[0])
        trials = {size: peer.encode(texts, size) for size in arguments.batch_sizes}
        best = min(trials, key=lambda size: trials[size])
        sides[f"sentence-transformers{peer.unpads}, batches of {best}"] = lambda texts=texts, best=best: peer.encode(  # type: ignore[misc]
            texts, best
        )
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peak = matrix_peak(device, torch.bfloat16, None if device.type == "cuda" else 512)
        for turn in range(arguments.rounds + 1):
            for name, side in sides.items():
                found = side()
                if turn:
                    seconds[name].append(found)
        base = statistics.median(seconds[next(iter(sides))])
        for name, found_seconds in seconds.items():
            middle = statistics.median(found_seconds)
            rows.append(
                {
                    "shape": shape,
                    "lengths": mix,
                    "side": name,
                    "passages/s": len(ids) / middle,
                    "ratio": middle / base,
                    "TFLOP/s": work / middle / 1e12,
                    "MFU": work / middle / 1e12 / arguments.peak_tflops if arguments.peak_tflops else None,
                    "share of a product": work / middle / peak,
                }
            )
    return rows


class _Peer:
    """sentence-transformers in bfloat16; times the model alone."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        can_unpad = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if can_unpad else "sdpa"
        options = {"dtype": torch.bfloat16, "attn_implementation": attention}
        backbone = Transformer(str(folder), max_seq_length=MAX_LENGTH, model_kwargs=options)
        self.unpads = " (unpadded)" if can_unpad else " (padded: no flash_attn)"
        self._model: Any = SentenceTransformer(
            modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")], device=str(device)
        )
        self._device, self._tokenizing = device, 0.0
        preprocess = self._model.preprocess

        def timed(*words: Any, **options: Any) -> Any:
            start = time.perf_counter()
            features = preprocess(*words, **options)
            self._tokenizing += time.perf_counter() - start
            return features

        self._model.preprocess = timed

    def encode(self, texts: list[str], batch_size: int) -> float:
        """Return the seconds that the texts took, those for tokens left out."""
        self._tokenizing = 0.0
        total = _seconds(
            self._device, lambda: self._model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        )
        return total - self._tokenizing


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def _mixes(count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return tokens of passages, special ones included."""
    lengths = np.random.default_rng(0).lognormal(np.log(60) - 0.5**2 / 2, 0.5, count)
    return {"all 128": np.full(count, MAX_LENGTH), "log-normal, mean 60": lengths.clip(4, MAX_LENGTH).astype(int)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="bert-base,bert-large")
    parser.add_argument("--passages", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536], help="of a forward, for our sides")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512], help="tried for the peer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in dense bfloat16")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU"
    print(f"{machine_line()}; {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes.split(","):
            print(f"\n## {shape}\n\n{table(compare(shape, Path(folder), arguments))}", flush=True)


if __name__ == "__main__":
    main()
