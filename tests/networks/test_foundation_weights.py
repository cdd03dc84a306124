"""Where weights are looked for, what their digest covers, and what is said of files that do not fit."""

import hashlib
import importlib.util
import sys

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks import sam
from nnunetv2_semi.networks.foundation_weights import (
    local_weights,
    read_tensors,
    require_same_parameters,
    weights_digest,
)


def test_random_weights_have_no_file():
    assert local_weights("random") is None


def test_an_existing_path_is_taken_as_it_is(tmp_path):
    assert local_weights(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("weights", ["nowhere/medsam_vit_b.pth", "facebook/sam-vit-base"])
def test_what_does_not_exist_is_not_downloaded_but_refused(weights, monkeypatch):
    monkeypatch.setattr("nnunetv2_semi.networks.foundation_weights._downloaded", lambda name: pytest.fail("downloads"))
    with pytest.raises(UserError, match=f"no weights of a foundation model at {weights}.*hub:owner/name.*random"):
        local_weights(weights)


def test_a_model_of_the_hub_is_asked_for_by_name_and_its_failure_is_one_message(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/absent":
            raise OSError("no network\nhere")
        (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert local_weights("hub:owner/name") == tmp_path
    assert asked == [("owner/name", ["config.json", "model*.safetensors"]),
                     ("owner/name", ["config.json", "pytorch_model*.bin"])], "of the kinds of weights only one"
    with pytest.raises(UserError, match=r"owner/absent cannot be had from the hub \(OSError: no network here\)"):
        local_weights("hub:owner/absent")


def test_digest_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights" * 1000)
    assert weights_digest(tmp_path / "a.pth") == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_digest_of_a_folder_covers_what_is_read_and_nothing_else(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    first = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("other")
    (tmp_path / "pytorch_model.bin").write_text("not read beside safetensors")
    assert weights_digest(tmp_path) == first
    digests = {first}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("other")
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 3


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no weights: neither model.safetensors nor pytorch_model.bin"):
        weights_digest(tmp_path)


def test_a_state_dict_is_found_under_model_and_without_the_prefix_of_several_gpus(tmp_path):
    weight = torch.ones(2)
    torch.save({"model": {"module.a.weight": weight}, "epoch": 3}, tmp_path / "training.pth")
    assert read_tensors(tmp_path / "training.pth").keys() == {"a.weight"}


def test_shards_in_a_folder_are_put_together(tmp_path):
    for shard, name in ((1, "a"), (2, "b")):
        torch.save({name: torch.full((1,), float(shard))}, tmp_path / f"pytorch_model-0000{shard}-of-00002.bin")
    assert read_tensors(tmp_path) == {"a": torch.ones(1), "b": torch.full((1,), 2.0)}


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(read_tensors(tmp_path)["a"], torch.ones(2))


@pytest.mark.parametrize(("content", "message"), [
    (b"no archive", "cannot be read as the weights"),
    ({"epoch": 3}, "holds no state dict"),
    ([torch.ones(1)], "holds no state dict"),
])
def test_files_that_are_no_weights_are_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"other.pth.*{message}"):
        read_tensors(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return pytest.fail, ("executed",)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "evil.pth")


def test_every_kind_of_difference_is_named():
    own = {"same": torch.ones(1), "missing": torch.ones(1), "longer": torch.ones(2, 3)}
    found = {"same": torch.ones(1), "unknown": torch.ones(1), "longer": torch.ones(2, 4)}
    with pytest.raises(UserError) as error:
        require_same_parameters(own, found, "weights.pth", "Mend it.")
    assert str(error.value) == (
        "The weights in weights.pth do not fit: of 3 parameters 1 are missing (missing); 1 are not known (unknown); "
        "1 have another shape (longer is (2, 4), must be (2, 3)). Mend it.")
    require_same_parameters(own, {name: value.clone() for name, value in own.items()}, "weights.pth")


def test_long_lists_are_cut():
    with pytest.raises(UserError, match=r"20 are missing \(0, 1, 2, 3, 4, 5, 6, 7 and 12 more\)"):
        require_same_parameters({str(i): torch.ones(1) for i in range(20)}, {}, "weights.pth")


def test_without_the_extra_sam_can_be_imported_and_says_what_to_install(monkeypatch):
    for package in ("transformers", "safetensors", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.spec_from_file_location("sam_without_the_extra", sam.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with pytest.raises(UserError, match=r'transformers: pip install "nnunetv2-semi\[foundation\]"'):
        sam.SAMFoundation.from_weights("random", 1, 2)
