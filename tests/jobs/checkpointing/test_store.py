"""Any damage to a checkpoint is detected before a byte of it is loaded."""

import json
import random
import shutil
from pathlib import Path

import pytest

from maelstream.jobs.checkpointing.store import MANIFEST, NEWEST, CheckpointError, CheckpointStore
from tests.helpers.saved import control_group, save


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save(folder, step)
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> CheckpointStore:
    """A copy that tests may damage."""
    return CheckpointStore(shutil.copytree(whole, tmp_path / "checkpoints"))


def damage(folder: Path, draw: random.Random) -> str:
    """Cuts a file, deletes it or flips one of its bits; returns its name and the kind of damage."""
    file = draw.choice(sorted(folder.iterdir()))
    data, kind = bytearray(file.read_bytes()), draw.choice(["cut", "removed", "flipped"])
    if kind == "removed":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: draw.randrange(len(data))])
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
    return f"{file.name} {kind}"


def test_any_damage_is_detected_and_the_older_checkpoint_is_used(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(100):
        store = CheckpointStore(shutil.copytree(whole, tmp_path / str(number)))
        what = damage(store.at(2), draw)
        step, messages = store.newest_good(control_group())
        assert step == 1, what
        assert (
            len(messages) == 1 and str(store.at(2)) in messages[0] and "resuming from step-00000001" in messages[0]
        ), what
        assert store.steps() == [1] and store.at(2).with_suffix(".bad").is_dir()


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected(store: CheckpointStore) -> None:
    file = store.at(2) / MANIFEST
    data = file.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        file.write_bytes(changed)
        assert store.fault(2), (position, bytes(changed))


def test_each_rank_reads_its_share_of_the_files_and_all_shares_detect_everything(store: CheckpointStore) -> None:
    (store.at(2) / "state.json").write_text("{}")
    faults = [store.fault(2, share, 3) for share in range(3)]
    assert sum(bool(fault) for fault in faults) == 1
    assert "state.json has 2 bytes instead of" in "".join(faults)


def test_a_missing_checkpoint_that_newest_names_is_reported(store: CheckpointStore) -> None:
    shutil.rmtree(store.at(2))
    step, messages = store.newest_good(control_group())
    assert step == 1 and "has no step-00000002, which its file `newest` names" in messages[0]


def test_only_bad_checkpoints_are_an_error_and_none_at_all_starts_at_step_0(
    store: CheckpointStore, tmp_path: Path
) -> None:
    for step in (1, 2):
        (store.at(step) / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is good: restore one, or remove"):
        store.newest_good(control_group())
    assert CheckpointStore(tmp_path / "nothing").newest_good(control_group()) == (0, [])


def test_a_newest_file_without_checkpoints_does_not_restart_a_run(store: CheckpointStore) -> None:
    for step in (1, 2):
        shutil.rmtree(store.at(step))
    assert (store.folder / NEWEST).exists()
    with pytest.raises(CheckpointError, match="has no step-00000002"):
        store.newest_good(control_group())


def test_another_dataset_is_rejected(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="was trained on another dataset"):
        store.state(2, "e")


def test_the_manifest_lists_every_file(store: CheckpointStore) -> None:
    files = json.loads((store.at(2) / MANIFEST).read_text())["files"]
    assert files.keys() == {path.name for path in store.at(2).iterdir()} - {MANIFEST}
