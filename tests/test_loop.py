"""The loop: every batch once, resumable, the same with any number of workers; tested with the simplest state."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import model_folder, texts

from mnemoscope import load_corpus, load_model
from mnemoscope.errors import ActivationError, RunError
from mnemoscope.mine import loop
from mnemoscope.model.model import Model
from mnemoscope.records import Progress
from mnemoscope.text.corpus import write_plan
from mnemoscope.text.plan import Plan


class Counts:
    """How often each context was seen by each layer, and the shards that are held."""

    def __init__(self, contexts: int, fail_at: int | None = None) -> None:
        self.seen = np.zeros(contexts, np.int64)
        self.held: set[int] = set()
        self.fail_at = fail_at

    @property
    def shards(self) -> frozenset[int]:
        return frozenset(self.held)

    def update(self, layer: int, coefficients, batch, *_: object) -> None:  # type: ignore[no-untyped-def]
        assert tuple(coefficients.shape[:2]) == batch.tokens.shape
        self.seen[batch.contexts] += 1

    def finish_shard(self, shard: int) -> None:
        if shard == self.fail_at:
            raise ActivationError("layer 2 gave NaN")
        self.held.add(shard)

    def merge(self, other: Counts) -> None:
        assert not self.held & other.held
        self.held |= other.held
        self.seen += other.seen

    def save(self, path: Path) -> None:
        with (partial_file := path.with_suffix(".partial")).open("wb") as file:
            np.savez(file, seen=self.seen, held=np.array(sorted(self.held)))
        partial_file.replace(path)

    @classmethod
    def load(cls, path: Path) -> Counts:
        with np.load(path) as file:
            state = cls(len(file["seen"]))
            state.seen, state.held = file["seen"], set(file["held"].tolist())
        return state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Llama with its tokenizer."""
    return load_model(model_folder(tmp_path_factory.mktemp("model")), dtype="fp32")


@pytest.fixture
def plan(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of several small shards."""
    monkeypatch.setattr("mnemoscope.text.plan.SHARD_TOKENS", 200)
    return write_plan(load_corpus(texts(60)), model.tokenizer, tmp_path, context_length=64)


def _of_all(state: Counts, steps: list[Progress], model: Model, plan: Plan) -> bool:
    """Whether each layer saw each context once, all shards are held, and progress ended at the plan's tokens."""
    return (
        bool((state.seen == model.anatomy.n_layers).all())
        and state.shards == frozenset(range(plan.shards))
        and [step for step in steps if step.stage == "mining"][-1]
        == Progress("mining", plan.tokens, plan.tokens, "tokens")
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # two are resumed below
def test_every_context_is_seen_once_by_every_layer(model: Model, plan: Plan, workers: int) -> None:
    """Whatever the number of workers; progress ends at the plan's tokens."""
    steps: list[Progress] = []
    kind = loop.StateFactory(partial(Counts, plan.contexts), Counts.load)
    state = loop.run_shards(model, plan, kind, plan.folder, workers=workers, report=steps.append)
    assert plan.shards > 3
    assert _of_all(state, steps, model, plan)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_checkpointed_is_not_done_again(
    model: Model, plan: Plan, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure in the middle, a second call does the rest, and only that."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    failing = loop.StateFactory(partial(Counts, plan.contexts, 3), Counts.load)
    with pytest.raises(ActivationError, match="layer 2 gave NaN"):
        loop.run_shards(model, plan, failing, plan.folder, workers=1)
    kept = Counts.load(plan.folder / "state-0.npz")
    assert kept.shards == {0, 1, 2}
    kind = loop.StateFactory(partial(Counts, plan.contexts), Counts.load)
    steps: list[Progress] = []
    state = loop.run_shards(model, plan, kind, plan.folder, workers=workers, report=steps.append)
    assert steps[0].done == sum(plan.shard_tokens[:3])
    assert _of_all(state, steps, model, plan)


def test_what_a_file_holds_is_not_done_again(model: Model, plan: Plan) -> None:
    """A process that was lost after it had written its file, and before it said so, has another do the same."""
    kind = loop.StateFactory(partial(Counts, plan.contexts), Counts.load)
    mining, shards = loop.Mining(model, plan, kind, plan.folder), range(plan.shards)
    done: list[int] = []
    loop.mined(mining, mining.file("block"), shards[:2], done.append)
    state = loop.mined(mining, mining.file("block"), shards, done.append)
    assert sum(done) == plan.tokens and state.shards == frozenset(shards)
    assert _of_all(state, [Progress("mining", plan.tokens, plan.tokens, "tokens")], model, plan)


@pytest.mark.slow
def test_a_workers_error_reaches_the_caller(model: Model, plan: Plan) -> None:
    """An error of the tree is raised as itself from a worker process."""
    failing = loop.StateFactory(partial(Counts, plan.contexts, 1), Counts.load)
    with pytest.raises(ActivationError, match="layer 2 gave NaN"):
        loop.run_shards(model, plan, failing, plan.folder, workers=2)


def test_blocks_are_aligned_and_lose_nothing() -> None:
    """Few shards go one by one; many in blocks whose sums fold; each shard is in one block."""
    assert loop._blocks([3, 4, 9], 2) == [[3], [4], [9]]
    many = [shard for shard in range(200) if shard != 17]
    blocks = loop._blocks(many, 2)
    assert [shard for block in blocks for shard in block] == many
    assert all(len({shard // loop._BLOCK for shard in block}) == 1 for block in blocks)
    assert len(blocks) == 25


def test_two_builds_in_one_folder_are_refused(tmp_path: Path) -> None:
    """The second is told that another process builds here; the lock is gone when a process is killed."""
    run = tmp_path / "run"
    refused = pytest.raises(RunError, match=r"another process is building in \S+/run;")
    with loop.locked(run / ".lock", run), refused, loop.locked(run / ".lock", run):
        pass
    # The lock that `locked` takes, without what its module imports.
    script = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(run / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    with refused, loop.locked(run / ".lock", run):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with loop.locked(run / ".lock", run):
        assert not (run / "manifest.json").exists()


class Failing(Counts):
    """Fails in one shard, in the middle, so many times."""

    left = 0

    def update(self, layer: int, coefficients, batch, *_: object) -> None:  # type: ignore[no-untyped-def]
        super().update(layer, coefficients, batch)
        if Failing.left and layer == 1 and len(self.held) == 2:
            Failing.left -= 1
            raise OSError("the folder of the plan is\nnot there")


@pytest.mark.parametrize("checkpoint", [0.0, 60.0], ids=["kept", "not kept"])
def test_a_shard_that_fails_is_tried_again(
    model: Model, plan: Plan, checkpoint: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of its first try is left, nor told of twice; one that always fails is named after three tries, in a line,
    and then the same call goes on."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", checkpoint)
    kind = loop.StateFactory(partial(Failing, plan.contexts), Failing.load)
    steps: list[Progress] = []
    Failing.left = loop.TRIES
    said = (
        r"shard 2 failed 3 times, the last time by OSError: the folder .* is not there \(test_loop\.py:\d+\)"
    )
    with pytest.raises(RunError, match=said) as caught:
        loop.run_shards(model, plan, kind, plan.folder)
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, OSError)
    assert (plan.folder / "state-0.npz").exists() == (checkpoint == 0.0)
    Failing.left = loop.TRIES - 1
    state = loop.run_shards(model, plan, kind, plan.folder, report=steps.append)
    assert Failing.left == 0 and _of_all(state, steps, model, plan)


def test_a_state_that_cannot_begin_anew_is_not_tried_again(model: Model, plan: Plan) -> None:
    """Half a shard would be counted twice: what was raised is raised as it is."""
    Failing.left, state = 1, Failing(plan.contexts)
    kind = loop.StateFactory(lambda: state, state.load)
    with pytest.raises(OSError, match="not there"):
        loop.run_shards(model, plan, kind, plan.folder)
    assert Failing.left == 0


class Counted(Counts):
    """A state that knows how many of them there are, and were at the most."""

    alive = most = 0

    def __init__(self) -> None:
        super().__init__(1)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_files_are_added_up_with_two_states_in_memory(tmp_path: Path) -> None:
    """However many there are; what they take then, `benches.folding` weighs."""
    state = loop.folded(
        loop.StateFactory(Counted, lambda _: Counted()), [tmp_path / str(number) for number in range(50)]
    )
    assert isinstance(state, Counted) and (Counted.alive, Counted.most) == (1, 2)
