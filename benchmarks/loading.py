"""What loading a model takes: seconds, and memory at its peak, beside the weights that stay.

usage: python benchmarks/loading.py [--json FILE] [--source FOLDER]

A Llama of 510 M random weights (hidden 2048, 8 layers, vocabulary 32,000), or one in FOLDER, in BF16, is loaded in
processes of their own: from a GGUF file in Q4_0, from the folder with --weights int4-group32, and from what `narrowcast
pack` makes of that. Prints MB of the file; seconds; MB more than the process had before: `held`, of its own once it is
loaded; `peak`, the most of that meanwhile, looked at every ms; `resident`, VmHWM, which counts pages of mapped files.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import reporting
from peers.gguf_file import write_gguf

from narrowcast.engines import load_engine
from narrowcast.engines.transformers.files.random_llama import save_random_llama

SIZES = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 4992, "num_layers": 8, "num_heads": 16}
MB = 1e6


def loaded(path: Path, weights: str) -> reporting.Row:
    """What this process finds that loads a model."""
    engine = load_engine()
    engine.skeleton(path)  # imports what all of them import
    before, start = _status(), time.perf_counter()
    with _watched() as peaks:
        model = engine.load(path, weights=weights)
    seconds, after = time.perf_counter() - start, _status()
    del model
    return {
        "seconds": seconds,
        "held_mb": after["RssAnon"] - before["RssAnon"],
        "peak_mb": max(peaks) - before["RssAnon"],
        "resident_mb": after["VmHWM"] - before["VmRSS"],
    }


@contextmanager
def _watched() -> Iterator[list[float]]:
    """The process's own memory, every now and then."""
    found, done = [_status()["RssAnon"]], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found.append(_status()["RssAnon"])

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    done.set()
    thread.join()
    found.append(_status()["RssAnon"])


def _status() -> dict[str, float]:
    """MB by name."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) / MB for words in lines if words[2:] == ["kB"]}


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--source", type=Path, metavar="FOLDER")
    parser.add_argument("--load", type=Path, help="for its own use")
    parser.add_argument("--weights", help="for its own use")
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(loaded(asked.load, asked.weights)))
        return
    rows: list[reporting.Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        file, packed = Path(temporary) / "q4_0.gguf", Path(temporary) / "packed"
        if (source := asked.source) is None:
            save_random_llama(source := Path(temporary) / "source", **SIZES)
        write_gguf(source, file, "Q4_0")
        packed.mkdir()
        load_engine().pack(source, packed, weights="int4-group32")
        for path, weights in (file, "stored"), (source, "int4-group32"), (packed, "stored"):
            size = path if path.is_file() else path / "model.safetensors"
            command = [sys.executable, __file__, "--load", path, "--weights", weights]
            done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            name = {file: "GGUF Q4_0", packed: "packed"}.get(path, f"BF16 to {weights}")
            rows.append({"model": name, "file_mb": size.stat().st_size / MB, **found})
            print("  ".join(f"{each:.2f}" if isinstance(each, float) else f"{each}" for each in rows[-1].values()))
    reporting.write(asked.json, loads=rows)


if __name__ == "__main__":
    main()
