"""Hash everything that the commands write, before and after a change that must change nothing.

    python -m benches.same before.json              # tiny model; --sample: the sample model and text, too (minutes)
    python -m benches.same after.json --against before.json

Builds, searches patterns, explains, traces, studies and compares, each by its command, and keeps the sha256 of every
table, page, picture and answer. With --against, names what differs and exits with 1. A table that differs is
described by its columns as well, so that a renamed column can be told from a changed number.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

Hashes = dict[str, str]
_TIMED = {"manifest.json", "study.json"}  # hold dates


def main() -> None:
    """Write the hashes, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--sample", action="store_true")
    given = parser.parse_args()
    os.environ["COLUMNS"] = "120"
    hashes: Hashes = {}
    out = given.out.absolute()
    before = json.loads(given.against.read_text()) if given.against else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        hashes |= tiny()
        if given.sample:
            hashes |= sample()
    out.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    differing = sorted(name for name in before if name in hashes and hashes[name] != before[name])
    gone = sorted(name for name in before if name not in hashes and (given.sample or name.startswith("tiny")))
    new = sorted(name for name in hashes if before and name not in before)
    answer = {"hashed": len(hashes), "differing": differing, "gone": gone, "new": new}
    print(json.dumps(answer if given.against else {"hashed": len(hashes)}, indent=1))
    sys.exit(bool(differing or gone))


def tiny() -> Hashes:
    """A random model of two layers, with everything that there is to measure."""
    from tiny import texts

    _tiny_model(Path("model"))
    Path("text.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "title": str(i), "topic": str(i % 3)}) + "\n"
            for i, text in enumerate(texts(150))
        )
    )
    Path("prompts.jsonl").write_text(
        '{"prompt": "Paris is the capital of", "target": " France", "foils": [" London", " Berlin"]}\n'
        '{"prompt": "the river in the city", "foils": " of"}\n'
    )
    sizes = ["--positions", "40", "--sentences", "6"]
    return {
        f"tiny/{name}": value
        for name, value in (
            commands("model", "text.jsonl", "run", [], sizes, "the city of Paris is in France", "L1N3")
            | call("compared", "compare", "run", "run", "--html", "compare.html")
            | folder(Path("compare_files"))
            | file(Path("compare.html"))
        ).items()
    }


def _tiny_model(path: Path) -> None:
    """A Llama that can spell the built-in questions word by word."""
    import families
    import tiny

    source = Path(__file__).parent.parent / "src"
    lines = next(source.rglob("city_in_country.jsonl")).read_text(encoding="utf-8").splitlines()
    spelled = {word for line in lines for text in json.loads(line).values() for word in text.split()}
    tiny.WORDS += sorted(spelled - set(tiny.WORDS))
    size = len(tiny.WORDS) + 8
    families.tiny("llama", **families._GQA | {"vocab_size": size}).save_pretrained(path)
    tiny.tokenizer(size).save_pretrained(path)


def sample() -> Hashes:
    """The sample model over the beginning of the sample text, with the cheap measurements."""
    Path("prompts.jsonl").write_text(
        '{"prompt": "The capital of France is", "target": " Paris", "foils": [" London"]}\n'
    )
    only = [
        "--only",
        "glance,distributions,values,value_ranks,keys,refinement",
        "--positions",
        "60",
        "--sentences",
        "4",
    ]
    hashes = commands(
        "sample:smollm2-135m", "sample:wikipedia", "sample", ["--limit", "6000"], only,
        "The city of Paris lies on the Seine.", "L29N253",
    )  # fmt: skip
    return {f"sample/{name}": value for name, value in hashes.items()}


def commands(
    model: str, corpus: str, run: str, limit: list[str], sizes: list[str], sentence: str, neuron: str
) -> Hashes:
    """What every command writes of one model and one text."""
    hashes = call(
        "built", "build", model, "--corpus", corpus, "--nulls", "random", "-o", run, "--dtype", "fp32", *limit
    )
    hashes |= call("patterns", "patterns", run)
    hashes |= call("patterns json", "patterns", run, "--json")
    for name in ("show", "show card"):
        address = [neuron] if name.endswith("card") else []
        hashes |= call(name, "show", run, *address, "--html", f"{run}-{name}.html")
        hashes |= call(f"{name} json", "show", run, *address, "--json") | file(Path(f"{run}-{name}.html"))
    hashes |= call("find tested", "find", run, "--tested", "--json")
    hashes |= call("find kurtosis", "find", run, "--sort", "kurtosis")
    hashes |= call("find promotes", "find", run, "--promotes", " Paris")
    hashes |= call("test", "test", run, neuron, "--pattern", "word:the", "--json")
    hashes |= call("trace", "trace", run, sentence, "--html", "trace.html") | file(Path("trace.html"))
    hashes |= call("trace json", "trace", run, sentence, "--json")
    prompt = json.loads(Path("prompts.jsonl").read_text().splitlines()[0])
    question = [prompt["prompt"], "--target", prompt["target"], "--foil", prompt["foils"][0], "--run", run]
    hashes |= call(
        "explain", "explain", model, *question, "--ablate", "3", "--html", "explain.html", "--dtype", "fp32"
    )
    hashes |= file(Path("explain.html"))
    hashes |= call("explain json", "explain", model, *question, "--json", "--dtype", "fp32")
    hashes |= call(
        "explain many", "explain", model, "--prompts", "prompts.jsonl", "-o", "t.parquet", "--dtype", "fp32"
    )
    hashes |= file(Path("t.parquet"))
    hashes |= call("study", "study", "-o", run, *sizes)
    hashes |= call("study json", "study", "-o", run, "--json", *sizes)
    hashes |= call("verify", "verify", run, "--sample", "2")
    return hashes | folder(Path(run))


def call(name: str, *arguments: str) -> Hashes:
    """The answer of a command on stdout; it must succeed."""
    from mnemoscope.cli import main

    print("+", "mnemoscope", *arguments, file=sys.stderr)
    said, before = io.StringIO(), sys.argv
    sys.argv = ["mnemoscope", *arguments]
    try:
        with contextlib.redirect_stdout(said):
            code = main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    assert not code, f"{name}: exit code {code}"
    return {f"stdout of {name}": _sha256(said.getvalue().encode())}


def folder(path: Path) -> Hashes:
    """Every file below a folder."""
    hashes: Hashes = {}
    for one in sorted(path.rglob("*")):
        if one.is_file() and one.name not in _TIMED and one.suffix != ".pdf":
            hashes |= file(one)
    return hashes


def file(path: Path) -> Hashes:
    """The bytes of a file; of a table also each of its columns."""
    hashes = {str(path): _sha256(path.read_bytes())}
    if path.suffix == ".parquet":
        for column in pl.read_parquet(path).iter_columns():
            hashes[f"{path}:{column.name}"] = _sha256(
                repr(column.dtype).encode() + json.dumps(column.to_list(), default=str).encode()
            )
    return hashes


def _sha256(content: bytes) -> str:
    """Of the content without the folder that it was made in."""
    return hashlib.sha256(content.replace(os.fsencode(Path.cwd()), b"")).hexdigest()[:16]


if __name__ == "__main__":
    main()
