from __future__ import annotations

import math
import os
import pickle
import random
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.data import loader as loader_module
from nnunetv2_semi.data.loader import BatchStream, SeededBatches, UnlabelledPatchLoader
from nnunetv2_semi.data.preprocessing import prepare_unlabelled


class Recorder:
    """A transform that remembers what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, **sample):
        self.calls.append({name: tensor.clone() for name, tensor in sample.items()})
        return sample


@pytest.fixture
def cases(tiny):
    return prepare(tiny)


def prepare(tiny, configuration="3d_fullres"):
    return prepare_unlabelled(
        *tiny.managers(configuration),
        tiny.dataset_json,
        num_processes=1,
        report=lambda line: None,
        show_progress_bar=False,
    )


def training_transforms(patch_size, use_mask_for_norm=(False, False)):
    return nnUNetTrainer.get_training_transforms(
        patch_size, (-0.5, 0.5), None, tuple(range(len(patch_size))), False, list(use_mask_for_norm)
    )


def make_loader(tiny, cases, *, patch_size=(16, 16, 16), batch_size=2, transforms=None, mask_needed=False, **changes):
    manager, _ = tiny.managers()
    dataset = nnUNetDatasetBlosc2(cases.folder, list(cases.identifiers))
    labels = manager.get_label_manager(dict(tiny.dataset_json, **changes))
    return UnlabelledPatchLoader(dataset, batch_size, patch_size, patch_size, labels, transforms, mask_needed)


def make_batches(tiny, cases, **seeds):
    loader = make_loader(tiny, cases, transforms=training_transforms((16, 16, 16)))
    return SeededBatches({"unlabelled": loader}, **({"seed": 3} | seeds))


def images(batches, indices):
    return [batches[index]["unlabelled"]["data"] for index in indices]


def take(stream, count):
    taken = [next(stream)["unlabelled"] for _ in range(count)]
    return [batch["data"] for batch in taken], [batch["keys"] for batch in taken]


def assert_all_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_batch_holds_patches_and_case_names_and_no_target(tiny, cases):
    loader = make_loader(tiny, cases, batch_size=3, transforms=training_transforms((16, 16, 16)))
    batch = loader.generate_train_batch()
    assert set(batch) == {"data", "keys"}
    assert batch["data"].shape == (3, 2, 16, 16, 16) and batch["data"].dtype == torch.float32
    assert len(batch["keys"]) == 3 and set(batch["keys"]) <= set(cases.identifiers)


def test_patches_are_cut_from_the_images(tiny, cases):
    loader = make_loader(tiny, cases, batch_size=1)
    np.random.seed(0)
    batch = loader.generate_train_batch()
    image = torch.from_numpy(loader._data.load_case(batch["keys"][0])[0][:])
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1).unfold(3, 16, 1)
    matches = (windows == batch["data"][0][:, None, None, None]).flatten(4).all(-1).all(0)
    assert matches.sum() == 1


def test_positions_are_random_and_reach_every_border(tiny, cases):
    loader = make_loader(tiny, cases, batch_size=1)
    shape = loader._data.load_case("un_a")[0].shape[1:]
    np.random.seed(0)
    lowest = np.array([loader.get_bbox(shape, False, None)[0] for _ in range(300)])
    assert lowest.min(0).tolist() == [0, 0, 0]
    assert (lowest.max(0) + 16).tolist() == list(shape)


@pytest.mark.parametrize("batch_size, share", [(1, 0.33), (2, 0.2), (3, 0.5), (4, 0.5), (1, 1.0)])
def test_the_share_on_foreground_holds_on_average_for_any_batch(tiny, cases, batch_size, share):
    loader = make_loader(tiny, cases, batch_size=batch_size)
    loader.foreground_share = share
    loader.foreground = {case: {1: np.zeros((1, 4), dtype=int)} for case in cases.identifiers}
    case = loader._data.load_case("un_a")
    loader._data.load_case = lambda _: (case[0][:], case[1][:], *case[2:])  # read once: 400 batches are drawn
    forced = []
    loader.get_bbox = lambda shape, on_foreground, voxels: forced.append(on_foreground) or ([0] * 3, [16] * 3)
    np.random.seed(0)
    for _ in range(400):
        loader.generate_train_batch()
    numbers = np.reshape(forced, (400, batch_size)).sum(1)
    assert np.mean(forced) == pytest.approx(share, abs=0.06)
    assert set(numbers) <= {int(batch_size * share), math.ceil(batch_size * share)}


def test_patches_on_foreground_are_of_cases_that_have_some(tiny, cases):
    loader = make_loader(tiny, cases, batch_size=4)
    loader.foreground_share = 0.5
    loader.foreground = {"un_a": {}, "un_b": {1: np.array([[0, 8, 8, 8]])}, "gone": {1: np.zeros((1, 4), dtype=int)}}
    np.random.seed(0)
    drawn = [loader.generate_train_batch()["keys"] for _ in range(20)]
    assert {key for keys in drawn for key in keys[2:]} == {"un_b"} < {key for keys in drawn for key in keys[:2]}
    loader.foreground = {}
    assert {key for _ in range(20) for key in loader.generate_train_batch()["keys"][2:]} == set(cases.identifiers)


def test_the_ignore_label_does_not_restrict_positions(tiny, cases):
    labels = {"background": 0, "organ": 1, "ignore": 2}
    loader = make_loader(tiny, cases, labels=labels)
    assert loader.generate_train_batch()["data"].shape == (2, 2, 16, 16, 16)


def test_2d_patches_are_slices_of_3d_cases(tiny):
    cases = prepare(tiny, "2d")
    transforms = training_transforms((16, 16))
    batch = make_loader(tiny, cases, patch_size=(16, 16), transforms=transforms).generate_train_batch()
    assert batch["data"].shape == (2, 2, 16, 16)
    plain = make_loader(tiny, cases, patch_size=(16, 16), batch_size=1)
    batch = plain.generate_train_batch()
    image = torch.from_numpy(plain._data.load_case(batch["keys"][0])[0][:])
    windows = image.unfold(2, 16, 1).unfold(3, 16, 1)
    assert (windows == batch["data"][0][:, None, None, None]).flatten(4).all(-1).all(0).sum() == 1


def test_the_mask_reaches_the_transforms_only_if_needed(tiny, cases):
    for mask_needed in (False, True):
        recorder = Recorder()
        # larger than the image: what is padded is outside
        make_loader(
            tiny, cases, patch_size=(40, 40, 40), transforms=recorder, mask_needed=mask_needed
        ).generate_train_batch()
        assert ("segmentation" in recorder.calls[0]) == mask_needed
    mask = recorder.calls[0]["segmentation"]
    assert mask.shape == (1, 40, 40, 40)
    assert set(mask.unique().tolist()) == {-1, 0}


def test_normalisation_within_the_mask_keeps_the_outside_at_zero(tiny):
    tiny.plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True, True]
    cases = prepare(tiny)
    size = (40, 40, 40)
    loader = make_loader(
        tiny, cases, patch_size=size, transforms=training_transforms(size, (True, True)), mask_needed=True
    )
    batches = SeededBatches({"unlabelled": loader}, seed=0)
    for image in images(batches, range(6)):
        # the image is smaller than the patch; rotated and scaled by at most 1 / 0.7 it does not reach the corners
        assert image[..., 0, 0, 0].abs().max() == 0
        assert image.abs().max() > 0.5


def test_batches_do_not_depend_on_the_number_of_workers(tiny, cases):
    batches = make_batches(tiny, cases)
    expected = images(batches, range(6))
    for workers, start_method in ((0, None), (2, "fork")):
        stream = BatchStream(batches, num_workers=workers, start_method=start_method)
        taken, _ = take(stream, 6)
        stream.close()
        assert_all_equal(taken, expected)


def test_batches_do_not_depend_on_the_number_of_threads(tiny, cases):
    batches = make_batches(tiny, cases)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = images(batches, range(4))
        torch.set_num_threads(2)
        assert_all_equal(images(batches, range(4)), expected)
    finally:
        torch.set_num_threads(threads)


def test_spawned_workers_make_the_same_batches(tiny, cases):
    batches = make_batches(tiny, cases)
    stream = BatchStream(batches, num_workers=1, start_method="spawn", length=2)
    taken = [item["unlabelled"]["data"] for item in stream]
    assert_all_equal(taken, images(batches, range(2)))


def test_a_stream_continues_where_another_ended(tiny, cases):
    first = BatchStream(make_batches(tiny, cases))
    take(first, 3)
    assert first.next_index == 3
    expected, expected_keys = take(first, 3)
    again = BatchStream(make_batches(tiny, cases), start=3)
    taken, keys = take(again, 3)
    assert_all_equal(taken, expected)
    assert keys == expected_keys


def test_batches_differ_by_index_seed_stream_and_rank(tiny, cases):
    made = images(make_batches(tiny, cases), range(3))
    for change in ({"seed": 4}, {"stream": "validation"}, {"rank": 1}):
        made += images(make_batches(tiny, cases, **change), [0])
    different = {image.numpy().tobytes() for image in made}
    assert len(different) == len(made)


@pytest.mark.parametrize("make", [RemoveRandomConnectedComponentFromOneHotEncodingTransform,
                                  partial(ApplyRandomBinaryOperatorTransform, strel_size=(1, 1))])
def test_a_cascades_batches_do_not_depend_on_earlier_ones(make):
    """Its transforms shuffle their channels in place."""
    class Loader:
        def __init__(self):
            self.transforms = make(channel_idx=[0, 1, 2, 3])
            self._data = SimpleNamespace(load_case=lambda case: (np.zeros((1, 2, 2)), None, None, {}))

        def generate_train_batch(self):
            self.transforms.get_parameters(image=None)
            return {"data": torch.zeros(1, 1, 2, 2), "keys": ["case"], "order": list(self.transforms.channel_idx)}

    at_once, one_by_one = (SeededBatches({"labelled": Loader()}, seed=0) for _ in range(2))
    orders = [one_by_one[index]["labelled"]["order"] for index in range(6)]
    assert at_once[5]["labelled"]["order"] == orders[5] and len(set(map(tuple, orders))) > 1


def test_a_loader_gives_the_same_batches_whatever_other_loaders_there_are(tiny, cases):
    def loader():
        return make_loader(tiny, cases, transforms=training_transforms((16, 16, 16)))

    alone = SeededBatches({"labelled": loader()}, seed=0)[5]["labelled"]
    together = SeededBatches({"first": loader(), "labelled": loader()}, seed=0)[5]
    assert torch.equal(alone["data"], together["labelled"]["data"])
    assert not torch.equal(together["first"]["data"], together["labelled"]["data"])


def test_nnunets_own_loader_is_repeatable_too(tiny, cases):
    def labelled():
        manager, _ = tiny.managers()
        dataset = nnUNetDatasetBlosc2(cases.folder, list(cases.identifiers))
        labels = manager.get_label_manager(tiny.dataset_json)
        size = (16, 16, 16)
        return nnUNetDataLoader(dataset, 2, size, size, labels, transforms=training_transforms(size))

    first = SeededBatches({"labelled": labelled()}, seed=1)
    second = SeededBatches({"labelled": labelled()}, seed=1)
    second[0]
    for index in (7, 2):
        assert torch.equal(first[index]["labelled"]["data"], second[index]["labelled"]["data"])
        assert torch.equal(first[index]["labelled"]["target"], second[index]["labelled"]["target"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_states_are_untouched(tiny, cases, workers):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stream = BatchStream(make_batches(tiny, cases), num_workers=workers)
    take(stream, 2)
    stream.close()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_the_random_states_are_restored_after_an_error(tiny, cases):
    batches = make_batches(tiny, cases)
    (tiny.unlabelled_folder / "un_a.b2nd").rename(tiny.unlabelled_folder / "gone")
    before = np.random.get_state()[1].tolist()
    with pytest.raises(Exception, match="un_a"):
        images(batches, range(20))
    assert np.random.get_state()[1].tolist() == before


def test_batches_pickle_small(tiny, cases):
    batches = make_batches(tiny, cases)
    restored = pickle.loads(pickle.dumps(batches))
    assert_all_equal(images(restored, [4]), images(batches, [4]))
    assert len(pickle.dumps(make_batches(tiny, cases))) < 20_000


def test_no_case_stays_open_and_none_is_read_at_the_start(tiny, cases):
    tiny_folder = str(tiny.unlabelled_folder)

    def open_files():
        with open("/proc/self/maps") as maps:
            mapped = sum(tiny_folder in line for line in maps)
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return mapped + sum(tiny_folder in os.readlink(link) for link in links if os.path.islink(link))

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("open files are listed through /proc")
    everything_absent = [f"absent_{index}" for index in range(1000)]
    stream = BatchStream(make_batches(tiny, type(cases)(tiny_folder, everything_absent)))
    stream.close()
    batches = make_batches(tiny, cases)
    for index in range(10):
        batches[index]
        assert open_files() == 0


class SlowFirstItem:
    """Item 0 is finished only after item 5 was made."""

    def __init__(self, made):
        self.made = made

    def __getitem__(self, index):
        if index == 5:
            self.made.touch()
        end = time.monotonic() + 60
        while index == 0 and not self.made.exists():
            assert time.monotonic() < end, "the other worker waits for this one"
            time.sleep(0.01)
        return {"labelled": {"index": index}}


def test_a_slow_batch_keeps_no_other_worker_waiting_and_the_order_is_kept(tmp_path):
    if not loader_module._AS_SOON_AS_READY:
        pytest.skip("torch before 2.6 gives out batches in turn")
    stream = BatchStream(SlowFirstItem(tmp_path / "made"), num_workers=2, length=8)
    assert [batch["labelled"]["index"] for batch in stream] == list(range(8))
    stream.close()


class OneSlowItem:
    def __getitem__(self, index):
        time.sleep(index == 3 and 2)
        return {"labelled": {"index": index}}


def test_while_a_slow_batch_is_waited_for_no_more_than_a_few_others_are_kept():
    stream = BatchStream(OneSlowItem(), num_workers=2)
    for index in range(40):
        assert next(stream)["labelled"]["index"] == index
        assert len(stream._early) < 8  # twice what two workers make ahead; hundreds could be made in 2 s
    stream.close()


def test_a_stream_of_given_length_ends(tiny, cases):
    stream = BatchStream(make_batches(tiny, cases), start=2, length=5)
    assert len(list(stream)) == 3


def test_closing_stops_the_workers_and_may_be_repeated(tiny, cases, processes):
    before = set(processes.children(os.getpid()))
    stream = BatchStream(make_batches(tiny, cases), num_workers=2)
    next(stream)
    workers = set(processes.children(os.getpid())) - before
    assert len(workers) >= 2
    stream.close()
    stream.close()
    assert processes.wait_until(lambda: not any(map(processes.is_running, workers)), 10)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_workers_stop_when_the_stream_is_garbage(tiny, cases, processes):
    before = set(processes.children(os.getpid()))
    stream = BatchStream(make_batches(tiny, cases), num_workers=2)
    workers = set(processes.children(os.getpid())) - before
    assert workers
    del stream
    assert processes.wait_until(lambda: not any(map(processes.is_running, workers)), 10)


def test_what_a_worker_raises_reaches_the_caller_and_workers_can_be_stopped(tiny, cases, processes):
    before = set(processes.children(os.getpid()))
    batches = make_batches(tiny, cases)
    for case in cases.identifiers:
        (tiny.unlabelled_folder / f"{case}.b2nd").unlink()
    stream = BatchStream(batches, num_workers=2)
    workers = set(processes.children(os.getpid())) - before
    try:
        next(stream)
    except Exception as error:
        assert ".b2nd" in str(error)
        stream.close()  # while the traceback still refers to the stream
        assert processes.wait_until(lambda: not any(map(processes.is_running, workers)), 10)
    else:
        pytest.fail("nothing was raised")


STREAM_SCRIPT = """
import time
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2_semi.data.loader import BatchStream, SeededBatches, UnlabelledPatchLoader

folder, names, ending = {folder!r}, {names!r}, {ending!r}
size = (16, 16, 16)
labels = LabelManager({{"background": 0, "organ": 1}}, None)
loader = UnlabelledPatchLoader(nnUNetDatasetBlosc2(folder, names), 2, size, size, labels, None, False)
stream = BatchStream(SeededBatches({{"unlabelled": loader}}, seed=0), num_workers=2, start_method="fork")
next(stream)
print("ready", flush=True)
time.sleep(2)  # the test lists the workers meanwhile
if ending == "error":
    raise RuntimeError("training failed")
time.sleep(0 if ending == "exit" else 1000)
"""


@pytest.mark.parametrize("ending", ["killed", "terminated", "error", "exit"])
def test_workers_end_with_their_parent_however_it_ends(cases, processes, ending):
    process = processes.start(STREAM_SCRIPT.format(folder=cases.folder, names=cases.identifiers, ending=ending))
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    workers = processes.children(process.pid)
    processes.seen.update(workers)
    assert len(workers) >= 2
    if ending in ("killed", "terminated"):
        process.send_signal(signal.SIGKILL if ending == "killed" else signal.SIGTERM)
    process.wait(timeout=30)
    assert processes.wait_until(lambda: not any(map(processes.is_running, workers)), 10)
