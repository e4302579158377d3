"""The public door: everything that the command line does, as functions and as methods of a `Run`.

    import mnemoscope as mn

    run = mn.open_run("runs/smollm2")
    run["L24N1005"]                         # a card: it prints, displays itself in a notebook, and saves a page
    run.find(promotes=" Paris")             # neurons, beside what chance would find
    run.test("L13N366", pattern="year")     # loads the run's own model when it is needed
    mn.explain(run.model, "The capital of France is", " Paris").save("paris.html")

Results are plain frozen values with `to_dict` and `save`; this module hands each its view. Reading a run imports no
torch: what needs the model imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemoscope import errors
from mnemoscope.api.run import Run, addresses, study_sizes
from mnemoscope.display import Report, Shown
from mnemoscope.errors import RunMissing
from mnemoscope.files import cache_folder, expanded, write
from mnemoscope.prediction.explanation import Explanation
from mnemoscope.records import NeuronId, check_address
from mnemoscope.results import Annotated, BuildPrice, ModelFacts, StudyReport, Verification
from mnemoscope.run.reading import Run as StoredRun
from mnemoscope.run.reading import open_run as open_stored
from mnemoscope.run.writing import is_finished
from mnemoscope.text import cache
from mnemoscope.views.faces import view_of

if TYPE_CHECKING:
    from mnemoscope.annotation.scores import Scores
    from mnemoscope.api.run import Address, ModelSource
    from mnemoscope.atlas.folder import StaticSite
    from mnemoscope.model.model import Model
    from mnemoscope.model.outline import Outline
    from mnemoscope.model.table import Outcome
    from mnemoscope.studies.measures.positions import Sizes
    from mnemoscope.text.corpus import Corpus
    from mnemoscope.tracing.traced import Trace


Shown.viewer = view_of

__all__ = [
    "DEMO_TOKENS",
    "FAST_TOKENS",
    "SAMPLE_MODEL",
    "SAMPLE_TEXT",
    "Explanation",
    "NeuronId",
    "Run",
    "annotated",
    "build",
    "build_part",
    "cache",
    "check",
    "compare",
    "demo",
    "demo_tokens",
    "errors",
    "explain",
    "explain_many",
    "families",
    "measurements",
    "merge",
    "open_run",
    "plan",
    "pull",
    "push",
    "score",
    "serve",
    "serve_folder",
    "site",
    "study",
    "study_sizes",
    "trace",
    "verify",
    "write_graph",
]

SAMPLE_MODEL, SAMPLE_TEXT = "sample:smollm2-135m", "sample:wikipedia"
# What two cores read in a little under three minutes: with tiles of bf16, with native bf16, and in fp32.
DEMO_TOKENS, DEMO_TOKENS_BF16, DEMO_TOKENS_FP32 = 250_000, 65_000, 40_000
FAST_TOKENS = 40_000  # of a study in ten minutes


def open_run(path: str | Path) -> Run:
    """Open a finished run in a folder, or behind a URL, of which only what is asked for is fetched; every table must be
    there with the size that the manifest says.

    `RunMissing` if there is none or it was never finished, `RunCorrupt` if a table is missing or short, `RunError` if
    an older or a newer mnemoscope wrote it, `RemoteError` if a URL cannot be read. ``Run.check`` reads every byte.
    """
    return Run.of(open_stored(path))


def build(
    model: ModelSource,
    corpus: Corpus | str | Path | list[str],
    path: str | Path,
    *,
    top: int = 50,
    nulls: Sequence[str] | None = None,
    units: str | None = None,
    device: str = "auto",
    workers: int = 1,
    engine: str = "processes",
    address: str | None = None,
    report: Report | None = None,
) -> Run:
    """Run a corpus through a model once and keep every neuron's triggers, distribution and value.

    model    what `load_model` takes, or its result
    corpus   what `load_corpus` takes, or its result
    path     the run's folder, or a URL to upload it to; an unfinished build goes on, a finished one is opened
    top      triggers kept for each neuron and polarity
    nulls    kinds of units that mean nothing, mined to compare with: ``random``, ``rotated``, ``shuffled``, and decoys
             of every neuron, ``chimera``, ``covariance``; the first two if None, () for none
    units    units to read instead of the model's neurons, as in `load_model`
    device   as in `load_model`; of several (``cuda:0,cuda:1``, or ``all``) each has a process of its own
    workers  processes; the result is the same for any number
    engine   ``processes`` of this machine, or those of a ``ray`` cluster whose machines share the folder
    address  of the cluster (``auto``: the one of this machine); one of this machine alone is started if None
    report   called with a `Progress` after every step

    `RunMismatch` if the folder holds something built from another model, corpus or options.
    """
    from mnemoscope.arguments import check_engine
    from mnemoscope.mine import cluster
    from mnemoscope.mine.build import build
    from mnemoscope.model.nulls import DEFAULT

    check_engine(engine, address)
    if units is not None or device != "auto":
        from mnemoscope.model.load import load_model

        model = load_model(model, units=units, device=device)
    kinds = DEFAULT if nulls is None else nulls
    ray = cluster.Ray(workers, address) if engine == "ray" else None
    return Run.of(
        build(model, corpus, path, top=top, nulls=kinds, workers=workers, engine=ray, report=report)
    )


def plan(
    model: ModelSource | Outline,
    corpus: Corpus | str | Path | list[str],
    path: str | Path = ".",
    *,
    top: int = 50,
    nulls: Sequence[str] | None = None,
    units: str | None = None,
    workers: int = 1,
    devices: int | None = None,
    report: Report | None = None,
) -> BuildPrice:
    """What `build` would take: tokens, time by stage, memory, disk, and what does not fit, from a few seconds of it.

    model    as in `build`; of a name whose weights are not on this machine, or do not fit into its memory, only the
             configuration and the tokenizer are read, and what is tried are layers with random weights
    path     where the run is to be, whose disk is looked at
    workers  processes on each device
    devices  how many there are such as the model's own, each of which mines a part (`build_part`); those that it was
             loaded for if None
    others   as in `build`

    Errors as of `build`.
    """
    from mnemoscope.location import Location, place
    from mnemoscope.mine.price import price
    from mnemoscope.model.load import load_model
    from mnemoscope.model.model import Model
    from mnemoscope.model.nulls import DEFAULT
    from mnemoscope.model.outline import Outline, load_or_outline
    from mnemoscope.text.corpus import Corpus, load_corpus

    text = corpus if isinstance(corpus, Corpus) else load_corpus(corpus)
    if isinstance(model, Outline) or (isinstance(model, Model) and units is None):
        loaded = model
    elif isinstance(model, str | Path):
        loaded = load_or_outline(model, units=units)
    else:
        loaded = load_model(model, units=units)
    folder = place(path)
    return price(
        loaded,
        text,
        cache_folder() if isinstance(folder, Location) else folder.absolute(),
        top=top,
        nulls=DEFAULT if nulls is None else nulls,
        workers=workers,
        devices=devices,
        report=report,
    )


def build_part(
    model: ModelSource,
    corpus: Corpus | str | Path | list[str],
    path: str | Path,
    shard: tuple[int, int],
    **options: Any,
) -> None:
    """Mine one part of a build, for many processes that share a folder, on one machine or several; see `merge`.

    shard    its number, from 0, and how many there are; every process gives the same model, corpus and options
    options  top, nulls, workers, report, as of `build`

    Errors as of `build`; `QueryError` if there is no such part.
    """
    from mnemoscope.arguments import check_part
    from mnemoscope.mine import parts
    from mnemoscope.mine.loop import Portion

    parts.mine(model, corpus, path, Portion(*check_part(*shard)), **options)


def merge(path: str | Path, model: ModelSource | None = None, *, report: Report | None = None) -> Run:
    """Make the run of parts that were mined in a folder; what is finished is opened.

    model  what `load_model` takes, or its result; None for where the parts had theirs from

    `RunError` if a part is not done; `RunMismatch` for another model.
    """
    from mnemoscope.mine import parts

    return Run.of(parts.merge(path, model, report=report))


def push(run: str | Path, url: str, *, overwrite: bool = False, report: Report | None = None) -> Run:
    """Upload a finished run to a URL of fsspec (``s3://bucket/run``, ``gs://``, ``hf://datasets/user/run`` ...), and
    open it there.

    overwrite  replace a run of another model or text that is there; one of the same is replaced anyway

    A run that was there stays whole until this one is, and an upload that was interrupted goes on. `RunError` if
    another run is there, `RemoteError` if it cannot be uploaded.
    """
    from mnemoscope.run import remote

    return Run.of(remote.push(run, url, overwrite=overwrite, report=report))


def pull(url: str, folder: str | Path, *, report: Report | None = None) -> Run:
    """Bring a run behind a URL to a folder, every byte compared with its manifest; returns it opened.

    `RunCorrupt` if a table is not what was uploaded; `RunError` if the folder holds something else.
    """
    from mnemoscope.run import remote

    return Run.of(remote.pull(url, folder, report=report))


def demo(path: str | Path = "runs/demo", *, limit: int | None = None, report: Report | None = None) -> Run:
    """Build a run of the sample model over the sample text (both are fetched once).

    limit  tokens that are read; else what this processor reads in about three minutes (`demo_tokens`)
    """
    from mnemoscope.model.load import load_model
    from mnemoscope.text.corpus import load_corpus

    text = load_corpus(SAMPLE_TEXT, limit=demo_tokens() if limit is None else limit)
    return build(load_model(SAMPLE_MODEL), text, path, report=report)


def demo_tokens() -> int:
    """Tokens that this processor reads in a little under three minutes."""
    from mnemoscope.model.model import native_bf16, tiles

    return DEMO_TOKENS if tiles() else DEMO_TOKENS_BF16 if native_bf16() else DEMO_TOKENS_FP32


def explain(
    model: ModelSource | StoredRun,
    prompt: str,
    target: str | None = None,
    foils: str | Sequence[str] = (),
    *,
    run: StoredRun | str | Path | None = None,
    **options: Any,
) -> Explanation:
    """Explain the prediction after a position of a prompt; see `Explanation` for what comes back.

    model      what `load_model` takes, its result, or a run, whose model and triggers are used
    target     the token to account for, by its text; the model's first choice if None
    foils      what it is compared with: one text or several
    run        a run of the same model, for triggers (and for ``ablate_to="mean"``)
    options    position (-1), target_id, foil_ids, decoder_prompt (""), lens ("frozen"), projection ("adaptive"),
               top (20), ablate (0), ablate_to, report, as in `mnemoscope.prediction.explain.explain`

    `QueryError` for a question without an answer, `RunMismatch` for a run of another model.
    """
    from mnemoscope.prediction.explain import explain

    model, opened = _model_and_run(model, run)
    return explain(model, prompt, target, foils, run=opened, **options)


def trace(
    source: ModelSource | StoredRun,
    text: str,
    neuron: Address | Sequence[Address] | None = None,
    *,
    decoder_prompt: str = "",
    top: int = 5,
    report: Report | None = None,
) -> Trace:
    """How neurons see a text of your own: given ones along it, or those that stand out at each token.

    source  a run or its folder, whose distributions say what is unusual; or a model, as in `load_model`: without a run
            there are no distributions, and what is listed is what writes most
    neuron, decoder_prompt, top, report  as in `Run.trace`
    """
    if not isinstance(source, StoredRun) and isinstance(source, str | Path) and is_finished(source):
        source = open_run(source)
    options: dict[str, Any] = {"decoder_prompt": decoder_prompt, "top": top, "report": report}
    if isinstance(source, StoredRun):
        return Run.of(source).trace(text, neuron, **options)
    wanted = addresses(neuron)
    for address in filter(lambda each: isinstance(each, str), wanted):
        check_address(str(address))
    from mnemoscope.tracing.trace import trace

    model, _ = _model_and_run(source, None)
    neurons = [model.cells.parse(each) if isinstance(each, str) else each for each in wanted]
    return trace(model, text, neurons=neurons, **options)


def explain_many(
    model: ModelSource | StoredRun,
    prompts: str | Path | Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    run: StoredRun | str | Path | None = None,
    **options: Any,
) -> Path:
    """Explain every prompt and write one Parquet table (docs/format.md); returns its path.

    prompts  a jsonl file, or records: prompt and, if wanted, target, foils, label, position, target_id, foil_ids
    options  lens, projection, top, ablate and report, as in `explain`
    """
    from mnemoscope.prediction.batch import explain_many

    model, opened = _model_and_run(model, run)
    return explain_many(model, prompts, path, run=opened, **options)


def _model_and_run(
    model: ModelSource | StoredRun, run: StoredRun | str | Path | None
) -> tuple[Model, StoredRun | None]:
    from mnemoscope.model.load import load_built, load_model
    from mnemoscope.model.model import Model

    if isinstance(model, StoredRun):
        run = model if run is None else run
        model = Run.of(model).model
    opened = run if run is None or isinstance(run, StoredRun) else open_stored(run)
    loaded = model if isinstance(model, Model) else load_model(model)
    return loaded if opened is None else load_built(opened, loaded), opened


def write_graph(explanation: Explanation, path: str | Path) -> Path:
    """Write an explanation as an attribution graph, one JSON file that Neuronpedia and circuit-tracer's viewer read.

    `QueryError` for an encoder-decoder, which it has no place for; `RunError` if it cannot be written.
    """
    from mnemoscope.exchange import graph
    from mnemoscope.exchange.written import as_json

    write(path, as_json(graph.graph(explanation)), "writing the graph")
    return expanded(path)


def study(
    model: ModelSource | None,
    corpus: Corpus | str | Path | list[str] | None,
    path: str | Path,
    *,
    only: str | None = None,
    fast: bool = False,
    shuffled: bool = False,
    workers: int = 1,
    report: Report | None = None,
    **sizes: Any,
) -> StudyReport:
    """Every figure and table of the study: build the run if need be, measure what it lacks, give the findings.

    model, corpus, path, workers  as in `build`; model and corpus may be None for a finished run
    shuffled                      a new run also mines neurons of a copy of the model whose weights are shuffled
    only, fast, sizes             as in `Run.study`; `fast` builds from 40,000 tokens unless `corpus` was loaded

    ``.save("report.html")`` writes the page. `RunMissing` if there is nothing to open and nothing to build from.
    """
    from mnemoscope.text.corpus import Corpus, load_corpus

    if is_finished(path) and _is_of(run := open_run(path), model, corpus):
        return run.study(only=only, fast=fast, shuffled=shuffled, model=model, report=report, **sizes)
    if model is None or corpus is None:
        raise RunMissing(
            f"studying: {path} holds no finished run; give a model and a corpus to build it from"
        )
    from mnemoscope.model.nulls import DEFAULT

    if not isinstance(corpus, Corpus):
        corpus = load_corpus(corpus, limit=FAST_TOKENS if fast else None)
    kinds = (*DEFAULT, "shuffled") if shuffled else DEFAULT
    run = build(model, corpus, path, nulls=kinds, workers=workers, report=report)
    return run.study(only=only, fast=fast, shuffled=shuffled, model=model, report=report, **sizes)


def _is_of(run: Run, model: object, corpus: object) -> bool:
    """Whether the run is named by what it was built from, or by its folder alone; `build` compares all else."""
    named = (str(model), str(corpus)) == (run.manifest.model.id, run.manifest.corpus.id)
    return named or model is None or corpus is None


def measurements(
    run: StoredRun | None = None, sizes: Sizes | None = None, *, only: str | None = None
) -> list[dict[str, Any]]:
    """What the study measures: name, title, items, cost, tables added, and the state in a run (``ready`` ...)."""
    if run is not None:
        return Run.of(run).measurements(sizes, only=only)
    from mnemoscope.studies import catalogue

    return catalogue.listed(None, sizes or study_sizes(), only)


def compare(
    *runs: StoredRun | str | Path,
    only: str | None = None,
    weights: bool = False,
    report: Report | None = None,
) -> StudyReport:
    """Runs side by side: the study's findings of all, and how stable each neuron's triggers are from each to the next.

    runs     two or more; of more than two their order counts (checkpoints of a training), and each figure's mean is
             told run by run as well
    only     measurements by name, with commas between; all if None
    weights  load the models of the runs, and say of each neuron what changed in its vectors and its coefficients

    ``.save("compare.html")`` writes the page.
    """
    from mnemoscope.studies.catalogue import compare

    opened = [run if isinstance(run, StoredRun) else open_stored(run) for run in runs]
    return compare(*opened, only=only, weights=weights, report=report)


def verify(run: StoredRun | str | Path, model: ModelSource | None = None, **options: Any) -> Verification:
    """Recompute what a run says from its model; see `Run.verify`."""
    opened = Run.of(run) if isinstance(run, StoredRun) else open_run(run)
    return opened.verify(model=model, **options)


def serve(
    *runs: StoredRun | str | Path,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8321,
    annotations: str | Path | None = None,
    workers: int = 1,
    ready: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> None:
    """Serve runs to the browser of this machine, until the process is interrupted; see `atlas.serving.serve`.

    Errors as of `open_run`; `RunError` too if the packages that a server needs are missing (``mnemoscope[web]``).
    """
    from mnemoscope.atlas.serving import serve

    opened = [Run.of(run) if isinstance(run, StoredRun) else open_run(run) for run in runs]
    options: dict[str, Any] = {"host": host, "port": port, "annotations": annotations, "workers": workers}
    serve(opened, model, **options, ready=ready, report=report)


def assist(run: StoredRun | str | Path, model: str | None = None) -> None:
    """Answer an assistant's questions about a run over standard input and output, until that ends.

    model  where to load the model from, to explain predictions too; without it, nothing is asked of a model

    Errors as of `open_run`; `RunError` too if the packages that it needs are missing (``mnemoscope[mcp]``).
    """
    from mnemoscope.atlas.serving import assist

    assist(Run.of(run) if isinstance(run, StoredRun) else open_run(run), model)


def site(
    run: StoredRun | str | Path, out: str | Path, *, workers: int = 1, report: Report | None = None
) -> StaticSite:
    """Write the reading pages of a run to a folder for any web server; see `atlas.folder.write`.

    Errors as of `open_run`; `RunError` too if the folder is not empty or cannot be written, or if the packages that
    make pages are missing (``mnemoscope[web]``).
    """
    from mnemoscope.arguments import check_least
    from mnemoscope.atlas.serving import writer

    check_least("writing a site", 1, workers=workers)
    opened = Run.of(run) if isinstance(run, StoredRun) else open_run(run)
    return writer()(opened, out, workers=workers, report=report)


def serve_folder(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a folder that `site` wrote, by ranges of bytes, until the process is interrupted. Errors as of `serve`."""
    from mnemoscope.atlas.serving import serve_folder

    serve_folder(folder, host=host, port=port, ready=ready)


def score(
    sheets: str | Path | Sequence[str | Path],
    *,
    key: str | Path | None = None,
    run: StoredRun | None = None,
) -> Scores:
    """Hits, false alarms on hidden nulls, and the agreement of several annotators (sheets: `Run.annotate`).

    sheets  one filled sheet of each annotator
    key     the sealed key, if it is not beside the first sheet under its own name
    run     when given, the sheets must be of it (`RunMismatch`)

    `SheetError` for whatever is not as it was written, or not as it should be filled in.
    """
    from mnemoscope.annotation import answers, scores

    paths = [sheets] if isinstance(sheets, str | Path) else list(sheets)
    return scores.score(*answers.read(paths, key=key, run=run))


def annotated(
    sheet: str | Path, neuron: str | tuple[int, int], *, key: str | Path | None = None
) -> Annotated:
    """One neuron's prefixes with all that was said of them, from a filled sheet; `SheetError` if it is not on it."""
    from mnemoscope.annotation import answers

    opened, (filled,) = answers.read([sheet], key=key)
    address = NeuronId.parse(neuron) if isinstance(neuron, str) else NeuronId(*neuron)
    return Annotated(address, filled.annotator, answers.annotated(opened, filled, address))


def families() -> list[Outcome]:
    """Every family of transformers' language models: the error of the parts of a tiny one, or why it is refused."""
    from mnemoscope.model.table import outcomes

    return outcomes()


def check(model: ModelSource, **loading: Any) -> ModelFacts:
    """Load a model and say what is known of it: family, sizes, the error of its parts' sum (`self_check`), and what
    TransformerLens calls its coefficients, where it has a name for them.

    loading  as in `load_model`; `ModelNotSupported` if the parts do not add up to the logits
    """
    from mnemoscope.model.load import load_model
    from mnemoscope.model.model import Model

    loaded = model if isinstance(model, Model) else load_model(model, **loading)
    entry = loaded.entry()
    named = not (entry.units or entry.experts or entry.encoder_layers)
    return ModelFacts(
        entry.model_dump()
        | {"known_family": loaded.anatomy.known, "dtype": loaded.dtype}
        | {"coefficients": "blocks.LAYER.mlp.hook_post in TransformerLens" if named else None}
    )


def __getattr__(name: str) -> Any:
    # Loading is re-exported when it is asked for: it needs torch.
    if name in ("Model", "load_model"):
        from mnemoscope.model.load import load_model
        from mnemoscope.model.model import Model

        return Model if name == "Model" else load_model
    if name in ("Corpus", "load_corpus"):
        from mnemoscope.text import corpus

        return getattr(corpus, name)
    raise AttributeError(f"module 'mnemoscope.api' has no attribute {name!r}")
