import contextlib
import itertools
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from dropit.training.checkpoint.files import find_damage, read_file
from dropit.training.errors import ConfigError, SetupError

KEY = "MODEL.PRETRAINED"


class Hostile:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"refused, it holds (_?io|builtins).open, and only tensors and plain values are read"),
        ({"pickle_protocol": 4}, "refused, it holds code, and only tensors and plain values are read"),
        ({"_use_new_zipfile_serialization": False}, "or one that holds more than tensors and plain values"),
    ],
)
def test_a_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "weights.pth", **options)
    with pytest.raises(SetupError, match=f"weights.pth: .*{message}") as caught:
        read_file(tmp_path / "weights.pth", KEY)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_without_safetensors_it_is_named(tmp_path, monkeypatch):
    save_file({"a": torch.rand(3)}, tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SetupError, match=r"weights.safetensors: needs safetensors: pip install safetensors"):
        read_file(tmp_path / "weights.safetensors", KEY)


OTHER_FILES = {
    "empty": (b"", "the file is empty"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file itself"),
    "HTML": (b"\n<!DOCTYPE html><html></html>", "a web page, not weights"),
    "text": (b"hello, world\n", "not a file of weights"),
    "JSON": (b'{"weight_map": {}}', "not a file of weights"),
    "zip cut off": (b"PK\x03\x04 cut off", "cut short or damaged"),
}


@pytest.mark.parametrize(("content", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_is_something_else_says_what_it_is(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(SetupError, match=f"^CKPT .*weights.pth: .*{message}") as caught:
        read_file(tmp_path / "weights.pth", "CKPT")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["pth", "legacy.pth", "safetensors"])
@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(tmp_path, form, part):
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file({"a": torch.rand(1000)}, path)
    else:
        torch.save({"a": torch.rand(1000)}, path, _use_new_zipfile_serialization=form == "pth")
    path.write_bytes(path.read_bytes()[: max(1, int(path.stat().st_size * part))])
    with pytest.raises(SetupError, match=f"weights.{form}: "):
        read_file(path, KEY)


def content():
    return {"state_dict": {f"layer{index}": torch.rand(500) for index in range(2)}, "epoch": 3, "config": "SEED: 1"}


def equal(ours, theirs):
    weights, others = ours["state_dict"], theirs["state_dict"]
    rest = [{key: value for key, value in each.items() if key != "state_dict"} for each in (ours, theirs)]
    return rest[0] == rest[1] and all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """Of 300 bits anywhere, which torch.load alone mostly reads as other weights, and of all in the directory."""
    path, written = tmp_path / "last.ckpt", content()
    torch.save(written, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    generator = torch.Generator().manual_seed(0)
    flips = [(place, place % 8) for place in torch.randint(directory, (300,), generator=generator).tolist()]
    refused = []
    for place, bit in [*flips, *itertools.product(range(directory, len(whole)), range(8))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert equal(read_file(path, KEY), written), (place, bit)
        except SetupError:
            refused.append(place)
    assert sum(place < directory for place in refused) > 200  # the others are in the padding between the tensors


def test_every_cut_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(content(), path)
    whole = path.read_bytes()
    assert not find_damage(path)
    for length in [*range(0, len(whole), 97), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        assert find_damage(path) == "cut short or damaged", length


@pytest.mark.parametrize("form", ["legacy", "safetensors"])
def test_damage_that_no_checksum_covers_is_no_accident(tmp_path, form):
    path = tmp_path / f"weights.{form}"
    if form == "legacy":
        torch.save({"a": torch.rand(10)}, path, _use_new_zipfile_serialization=False)
    else:
        save_file({"a": torch.rand(10)}, path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (120,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(SetupError):
            read_file(path, KEY)


def test_a_directory_names_the_weights_in_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r": a directory, not a file; it holds model.safetensors$"):
        read_file(tmp_path, KEY)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match=r"^CKPT .*weigths.pth: no such file; did you mean weights.pth\?"):
        read_file(tmp_path / "weigths.pth", "CKPT")
